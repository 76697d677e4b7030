"""The order of the client's modules: each imports only what stands above it."""

from __future__ import annotations

from pathlib import Path

from tests.layers import below, imported, modules, vague

PACKAGE = Path(__file__).parents[2] / "client" / "triward"

LAYERS = {
    "the contract, and what can fail": "protocol connection errors deadline process stopping",
    "a request": "jsonvalue pil download media conversation tokens patches wire",
    "a server": "channel contract patience sharedmemory routing",
    "many requests": "grouping shelf many",
    "who asks": "base client aio",
    "with scores": "moments rewards.shaping rewards.buffer rewards.dynamic rewards retries jsonl",
    "in other libraries": "integrations.images integrations.chatml integrations.rows "
    "integrations.prompts integrations.datasets integrations.trl integrations.trl_selection "
    "integrations.verl integrations.verl_replay integrations.openrlhf integrations.swift "
    "integrations.areal integrations.skyrl integrations.nemo_rl integrations.roll",
    "commands": "table arguments options completion cli __main__",
}
ORDER = [name for names in LAYERS.values() for name in names.split()]


def test_every_module_has_its_place():
    assert sorted(modules(PACKAGE)) == sorted([*ORDER, "", "integrations"])


def test_a_module_imports_only_modules_above_it():
    assert below(PACKAGE, ORDER) == []


def test_tools_are_found_by_entry_points_alone():
    files = modules(PACKAGE).values()
    assert [p for p in files if any(n.split(".")[0] == "triward_tools" for n in imported(p))] == []


def test_a_call_is_made_in_one_place():
    """Blocking or in asyncio: what does not wait is written once."""
    files = modules(PACKAGE)
    shared = {"triward.contract", "triward.connection", "triward.wire", "triward.grouping.grouped"}
    assert imported(files["client"]) & shared == imported(files["aio"]) & shared == set()


def test_docstrings_name_the_thing():
    assert vague(PACKAGE) == []
