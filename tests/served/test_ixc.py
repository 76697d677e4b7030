"""IXC-2.5-Reward: the same client, and the restatement's number for every conversation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Served
from tests.conversations import Messages, image, picture, says, user
from tests.ixc_conversations import PLACE, ixc_conversations
from triward import InvalidRequest, RewardClient
from triward_server.export.ixc_reference import IxcOracle
from triward_server.export.reference import fp32_budget
from triward_server.serving.watchdog import check_once

# Of all kinds, and soon computed; the slow tier has all.
DOZEN = (
    "text/emoji", "text/system", "text/turns", "size/60x400", "size/504x1", "size/333x777",
    "tiles/24", "format/rgba.png", "images/3", "places/turns", "places/in-response-too",
    "video/5-tall",
)  # fmt: skip


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Messages]:
    return ixc_conversations(tmp_path_factory.mktemp("ixc-media"))


@pytest.fixture(scope="module")
def oracle(ixc_checkpoint: Path) -> IxcOracle:
    return IxcOracle(ixc_checkpoint)


@pytest.fixture(scope="module")
def model(served: Callable[..., Served], ixc_checkpoint: Path) -> Served:
    return served("ixc", source=ixc_checkpoint)


@pytest.fixture(scope="module")
def client(model: Served) -> RewardClient:
    return model.client


def agree(
    client: RewardClient, oracle: IxcOracle, cases: dict[str, Messages], threads: int = 16
) -> float:
    """Compare scores with the restatement's, alone and in company; the largest distance."""
    expected = {name: oracle.score(messages) for name, messages in cases.items()}
    alone = {name: client.score(messages) for name, messages in cases.items()}
    names = list(cases)
    random.Random(3).shuffle(names)
    with ThreadPoolExecutor(threads) as pool:
        together = dict(zip(names, pool.map(client.score, map(cases.get, names)), strict=True))
    wrong = {
        name: (alone[name], score)
        for name, score in expected.items()
        if abs(alone[name] - score) > fp32_budget(score)
    }
    assert wrong == {}
    for name in cases:
        assert together[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), name
    assert np.std(list(expected.values())) > 0.5, "scores that do not differ prove nothing"
    distances = [abs(alone[name] - expected[name]) / max(1, abs(expected[name])) for name in cases]
    print(f"{len(cases)} conversations, largest relative distance {max(distances):.1e}")
    return max(distances)


def test_served_scores_equal_the_restatement(
    client: RewardClient, oracle: IxcOracle, conversations: dict[str, Messages]
) -> None:
    assert len(conversations) >= 60
    agree(client, oracle, {name: conversations[name] for name in DOZEN})


@pytest.mark.slow
def test_all_served_scores_equal_the_restatement(
    client: RewardClient, oracle: IxcOracle, conversations: dict[str, Messages]
) -> None:
    agree(client, oracle, conversations)


def test_a_group_scores_as_its_members_alone(
    client: RewardClient, oracle: IxcOracle, conversations: dict[str, Messages]
) -> None:
    prompt = conversations["images/2"][:-1]
    responses = ["The first.", "", "Neither.", f"{PLACE}", "</s>[UNUSED_TOKEN_130]"]
    scores = client.score_responses(prompt, responses)
    for response, score in zip(responses, scores, strict=True):
        expected = oracle.score([*prompt, says(response)])
        assert abs(score - expected) <= fp32_budget(expected), response
    assert client.rank(prompt, responses) == list(np.argsort(scores)[::-1])
    first, second = responses[:2]
    assert client.compare(prompt, first, second) == (scores[0] > scores[1])


def test_the_canary_and_the_files_of_the_export(model: Served) -> None:
    check_once(model.server.http, model.repository, 60, deep=True)
    public = model.repository / "ixc" / "1"
    files = json.loads((public / "manifest.json").read_text())["files"]
    assert {"preprocess/checkpoint/tokenizer.json", "preprocess/checkpoint/SimHei.ttf"} <= {*files}


SEVERAL = [image(picture(40, 40, 0)), image(picture(40, 50, 1))]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no places": (user(*SEVERAL, "Compare."), "0 places <ImageHere>.* for 2"),
    "a place too many": (user(SEVERAL[0], PLACE * 2), "2 places <ImageHere>.* for 1"),
    "Qwen's option": (
        user({**SEVERAL[0], "max_pixels": 9}, "?"), r"max_pixels: 9 was given; .*no such option"
    ),
    "tiles": (user({**SEVERAL[0], "hd_num": 99}, "?"), r"content\[0\].hd_num: .* 64, got 99"),
    "flat": (user(image(picture(600, 1, 0)), "?"), r"media\[0\]: .* 0 pixels long"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, client: RewardClient) -> None:
    message, words = REFUSED[name]
    with pytest.raises(InvalidRequest, match=words):
        client.score([message, says("Yes.")])
