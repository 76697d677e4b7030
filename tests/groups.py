"""Groups of tests for the workers of pytest-xdist, and their order (`make test`).

Each worker has its own session fixtures. So all tests of the real server form one group, which one
worker runs: the server starts once, and so does the model card's code. Tests that start Ray form
another, since memory is for one Ray at a time. Every other file is a group. Long groups come first,
so that short ones fill the end.

`--dist loadgroup` would do with marks, but pytest-xdist 3.8 passes its groups on in a test's name,
which pytest 9.2 no longer lets it change; they arrive as if there were no marks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

SERVER, RAY = "the real server", "Ray"
STARTS_RAY = {"ray", "driver", "side"}  # fixtures
# Session fixtures, from what takes longest: exports, torch alone.
COSTLY = ("build", "checkpoint")
FILE = "groups"  # the key in a worker's input for where it writes its tests' groups


def takes(item: pytest.Item, fixture: str) -> bool:
    """Whether a test needs this session fixture; others of the same name do not count."""
    # pytest has no public way to tell which of several fixtures of one name a test gets.
    known = getattr(item, "_fixtureinfo", None)
    definitions = known.name2fixturedefs.get(fixture) if known else None
    return bool(definitions) and definitions[-1].scope == "session"


def group(item: pytest.Item) -> str:
    if STARTS_RAY & {*getattr(item, "fixturenames", ())}:
        return RAY
    return SERVER if takes(item, "server") else str(item.path)


def rank(item: pytest.Item) -> int:
    """0 and 1 for the two groups of many files, then the place of the costliest fixture."""
    if group(item) in (SERVER, RAY):
        return (SERVER, RAY).index(group(item))
    return 2 + next((n for n, name in enumerate(COSTLY) if takes(item, name)), len(COSTLY))


def arrange(items: list[pytest.Item]) -> None:
    """Sort tests by groups; a group's own order stays as it is."""
    ranks: dict[str, int] = {}
    for item in items:
        ranks[group(item)] = min(rank(item), ranks.get(group(item), rank(item)))
    items.sort(key=lambda item: (ranks[group(item)], group(item)))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "loadgroup" and not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        config.pluginmanager.register(Distribution(Path(folder.name)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker: sort the tests and write their groups for the process that distributes them."""
    if worker := getattr(config, "workerinput", {}):
        arrange(items)
        groups = {item.nodeid: group(item) for item in items}
        Path(worker[FILE]).write_text(json.dumps(groups))


class Distribution:
    """Plugin of the process that distributes: gives each worker whole groups.

    Args:
        folder: where workers write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups: dict[str, str] = {}

    @pytest.hookimpl
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[FILE] = str(self._folder / f"{node.gateway.id}.json")

    @pytest.hookimpl
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        self._groups |= json.loads(Path(node.workerinput[FILE]).read_text())

    @pytest.hookimpl
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        from xdist.scheduler import LoadScopeScheduling

        groups = self._groups

        class Scheduling(LoadScopeScheduling):
            def _split_scope(self, nodeid: str) -> str:
                return groups[nodeid]

        config.option.loadscopereorder = False  # else by the number of tests
        return Scheduling(config, log)
