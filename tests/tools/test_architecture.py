"""The order of the tools' modules: each imports only what stands above it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from tests.layers import below, imported, modules, vague

PACKAGE = Path(__file__).parents[2] / "tools" / "triward_tools"

LAYERS = {
    "": "inputs jobs offline listening",
    "selection": "limits best pairing rules columns verdicts source summary tasks preference sink "
    "parts picture job files rows",
    "evaluation": "results sections text wording images published tables tallies rewardbench2 "
    "formats asking ledger arithmetic statistics facts comparison charts pictures report run",
    "gateway": "settings texts vllm sglang trainers addresses media asking counters app run",
    "playground": "asking bars form snippets score scoredrows scored figures gallery page files "
    "agreement sides compare origin app",
    "on a cluster": "ray ray_server",
    "commands": "cli_selection cli_evaluation cli_gateway cli_playground",
}
ROOMS = ("selection", "evaluation", "gateway")
FOLDERS = (*ROOMS, "playground")  # which shows what the others make
ORDER = [
    name if room not in FOLDERS else f"{room}.{name}"
    for room, names in LAYERS.items()
    for name in names.split()
]


def test_every_module_has_its_place():
    assert sorted(modules(PACKAGE)) == sorted([*ORDER, "", *FOLDERS])


def test_a_module_imports_only_modules_above_it():
    assert below(PACKAGE, ORDER) == []


@pytest.mark.parametrize(("room", "other"), list(permutations(ROOMS, 2)))
def test_rooms_do_not_know_each_other(room, other):
    files = [path for name, path in modules(PACKAGE).items() if name.startswith(room)]
    assert len(files) > 10
    wrong = f"triward_tools.{other}"
    assert [p for p in files if any(name.startswith(wrong) for name in imported(p))] == []


def test_the_server_is_not_imported():
    roots = {name.split(".")[0] for p in modules(PACKAGE).values() for name in imported(p)}
    assert "triward" in roots
    assert "triward_server" not in roots


def test_docstrings_name_the_thing():
    assert vague(PACKAGE) == []
