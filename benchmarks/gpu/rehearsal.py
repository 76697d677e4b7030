"""The command on a machine that has nothing but what a bare GPU machine has.

    python -m benchmarks.gpu.rehearsal --device cpu --size tiny

Options are the command's. Whatever else is installed is hidden: it can be neither imported nor
found in this process. What is seen is what `machine.txt` names and, in turn, needs, and what
`carried.txt` names.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MACHINE, CARRIED = (Path(__file__).parent / name for name in ("machine.txt", "carried.txt"))
OURS = {"benchmarks", "triward", "triward_server"}
# That these cannot be imported is asserted; `hide` hides more.
ABSENT = (
    "accelerate", "av", "grpc", "pytriton", "rapidjson", "tritonclient", "trl", "pytest",
)  # fmt: skip


class Hiding:
    """A finder that does not find what has some top-level names."""

    def __init__(self, finder: Any, hidden: frozenset[str]) -> None:
        self._finder, self._hidden = finder, hidden

    def find_spec(self, name: str, *rest: Any) -> Any:
        """Find a module as the real finder does, or not at all."""
        hidden = name.split(".")[0] in self._hidden
        return None if hidden else self._finder.find_spec(name, *rest)

    def __getattr__(self, name: str) -> Any:
        """Leave all else to the real finder."""
        return getattr(self._finder, name)


def listed(path: Path) -> list[str]:
    """Return the requirements of a list."""
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def hide() -> frozenset[str]:
    """Hide all packages that the lists do not allow; return their top-level names."""
    allowed = {canonicalize_name(Requirement(line).name) for line in listed(CARRIED)}
    waiting = listed(MACHINE)
    while waiting:
        name = canonicalize_name(Requirement(waiting.pop()).name)
        if name not in allowed:
            allowed.add(name)
            waiting += _needs(name)
    there = packages_distributions().items()
    hidden = frozenset(
        module
        for module, owners in there
        if module not in OURS and not allowed & {canonicalize_name(owner) for owner in owners}
    )
    sys.meta_path[:] = [Hiding(finder, hidden) for finder in sys.meta_path]
    return hidden


def _needs(name: str) -> list[str]:
    try:
        lines = map(Requirement, requires(name) or ())
    except PackageNotFoundError:
        return []
    return [each.name for each in lines if not each.marker or each.marker.evaluate({"extra": ""})]


def check_hidden() -> None:
    """Raise `AssertionError` if something that is absent on a bare machine can be imported."""
    for name in ABSENT:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} can be imported, a bare GPU machine does not have it")


if __name__ == "__main__":
    hide()
    check_hidden()

    from benchmarks.commands import run_main
    from benchmarks.gpu.__main__ import main

    run_main(main)
