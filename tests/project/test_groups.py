"""Workers of pytest-xdist: who shares a server or Ray is in one of them; long groups come first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomllib

from tests.conftest import ROOT, pytest_collection_modifyitems

CONFTEST = """
import os
from pathlib import Path
import pytest
from tests.groups import SERVER, group

@pytest.fixture(scope="session")
def server():
    with Path("starts").open("a") as starts:
        starts.write("x")

@pytest.fixture(scope="session")
def checkpoint(): pass

@pytest.fixture(scope="session")
def client(server): pass

@pytest.fixture
def ray(): pass

@pytest.fixture
def side(): pass

@pytest.fixture(autouse=True)
def record(request):
    with Path(os.environ["PYTEST_XDIST_WORKER"]).open("a") as file:
        print(request.node.nodeid, file=file)
    if group(request.node) == SERVER:
        with Path("served").open("a") as file:
            print(request.node.nodeid, file=file)
"""
TESTS = {
    "test_a": "def test_quick(): pass\ndef test_served(server): pass",
    "test_b": "def test_light(): pass\ndef test_quick(): pass",
    "test_c": "def test_asked(client): pass",
    "test_d": "def test_read(checkpoint): pass\ndef test_more(): pass",
    # A double of that name: it has nothing to share.
    "test_e": "import pytest\n@pytest.fixture\ndef server(): pass\ndef test_fake(server): pass",
    "test_f": "def test_light(): pass\ndef test_ray(ray): pass",
    "test_g": "def test_trainer(side): pass",
}


def run(folder: Path) -> dict[str, list[str]]:
    """The tests of each worker, in their order."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name, text in TESTS.items():
        (folder / f"{name}.py").write_text(text)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-n2", "--dist=loadgroup",
         "-p", "tests.groups", "-p", "no:cacheprovider"],
        cwd=folder, check=True, timeout=120, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
             "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    return {worker: (folder / worker).read_text().split() for worker in ("gw0", "gw1")}


def test_a_group_stays_together(tmp_path: Path) -> None:
    workers = run(tmp_path)
    assert (tmp_path / "starts").read_text() == "x", "the server started once"
    assert (tmp_path / "served").read_text().split() == [
        "test_a.py::test_served", "test_c.py::test_asked",
    ]  # fmt: skip
    groups = [
        ["test_a.py::test_served", "test_c.py::test_asked"],
        ["test_d.py::test_read", "test_d.py::test_more"],
        ["test_a.py::test_quick"],
        ["test_b.py::test_light", "test_b.py::test_quick"],
        ["test_e.py::test_fake"],
        ["test_f.py::test_ray", "test_g.py::test_trainer"],
        ["test_f.py::test_light"],
    ]
    assert sorted(chain(*workers.values())) == sorted(chain(*groups))
    for group in groups:
        [tests] = [tests for tests in workers.values() if group[0] in tests]
        first = tests.index(group[0])
        assert tests[first : first + len(group)] == group, "in the order of its files"
    assert {workers["gw0"][0], workers["gw1"][0]} == {groups[0][0], groups[5][0]}, "long ones first"


def test_every_test_is_in_one_run() -> None:
    """Of `make test`, the two more of `make test-all`, and `make soak`."""
    commands = (ROOT / "Makefile").read_text().split("\ntest-all:")[1].split("\nlint:")[0]
    default = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    of_test = re.findall(r"-m '(.*)'$", default["addopts"])
    runs = [*of_test, *re.findall(r"\$\(PYTEST\).* -m '?([\w ]+)'?$", commands, re.MULTILINE)]
    assert len(runs) == 4
    # Whatever is `alone` is slow, by tests/conftest.py.
    for slow, alone, soak in product((False, True), repeat=3):
        marks = {"slow": slow or alone, "alone": alone, "soak": soak}
        assert sum(eval(run, {}, marks) for run in runs) == 1, marks


@pytest.mark.parametrize(("mark", "marks"), [("alone", ["slow"]), ("soak", [])])
def test_what_is_alone_is_slow(mark: str, marks: list[str]) -> None:
    added: list[str] = []
    item = SimpleNamespace(get_closest_marker=mark.__eq__, add_marker=added.append)
    pytest_collection_modifyitems([item])  # type: ignore[list-item]
    assert added == marks
