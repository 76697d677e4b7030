"""The restatement of IXC-2.5-Reward against scores of the published classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fonts import FREE_FONT
from tests.ixc_golden import golden_cases, golden_checkpoint
from triward_server.export.ixc_reference import IxcOracle
from triward_server.export.reference import fp32_budget

GOLDEN = json.loads(Path(__file__).with_name("ixc_golden.json").read_text())["published"]
CASES = golden_cases()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> IxcOracle:
    folder = tmp_path_factory.mktemp("ixc") / "checkpoint"
    golden_checkpoint(folder, FREE_FONT)
    return IxcOracle(folder)


def test_all_have_a_score() -> None:
    assert GOLDEN.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_published_classes(name: str, oracle: IxcOracle) -> None:
    inputs = oracle.inputs(CASES[name])
    assert len(inputs.ids) == GOLDEN[name]["tokens"]
    score = oracle.score_inputs(inputs.ids, inputs.canvases)
    assert abs(score - GOLDEN[name]["score"]) <= fp32_budget(score)
