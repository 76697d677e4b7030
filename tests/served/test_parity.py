"""The served score is the model card's, whatever is sent and in whatever company."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.asking import wait_until
from tests.conftest import Served
from tests.conversations import Messages
from triward import RewardClient
from triward_server.config import ForwardConfig
from triward_server.engine import attention, backbone, packing, positions
from triward_server.engine.scoring import Scorer
from triward_server.schema import Features
from triward_server.testing.oracle import Oracle, fp32_budget

THREADS = 32


class Counted:
    """Triton's counters of the forward model, from now on."""

    def __init__(self, metric: Callable[[str, str], float]) -> None:
        self._read = lambda name: metric(f"nv_inference_{name}", "reward_forward")
        self._executions, self._inferences = self._read("exec_count"), self._read("count")

    def executions(self, inferences: int) -> float:
        """Those of so many requests. Triton counts a batch after it has sent its answers."""
        wait_until(lambda: self._read("count") - self._inferences >= inferences)
        # One that was answered before may have been counted since.
        assert self._read("count") - self._inferences <= inferences + 1
        return self._read("exec_count") - self._executions


@pytest.fixture(scope="module")
def one_by_one(client: RewardClient, cases: dict[str, Messages]) -> dict[str, float]:
    return {name: client.score(messages) for name, messages in cases.items()}


def test_there_are_at_least_sixty_cases(cases: dict[str, Messages]) -> None:
    assert len(cases) >= 60
    scored = [messages[-1]["content"] for messages in cases.values()]
    assert "" in scored and any(text.startswith("\n") for text in scored)


def test_long_response_has_4000_tokens(oracle: Oracle, cases: dict[str, Messages]) -> None:
    text = cases["text/4000-tokens"][-1]["content"]
    assert len(oracle.processor.tokenizer(text)["input_ids"]) >= 4000


def test_served_scores_equal_the_oracle_in_fp32(
    one_by_one: dict[str, float], reference: dict[str, float]
) -> None:
    wrong = {
        name: (one_by_one[name], expected)
        for name, expected in reference.items()
        if abs(one_by_one[name] - expected) > fp32_budget(expected)
    }
    assert wrong == {}
    assert np.std(list(reference.values())) > 1, "scores that do not differ would prove nothing"


@pytest.mark.parametrize("order", ["as-listed", "shuffled"])
def test_single_equals_batch(
    order: str,
    client: RewardClient,
    cases: dict[str, Messages],
    one_by_one: dict[str, float],
    metric: Callable[[str, str], float],
) -> None:
    names = list(cases)
    if order == "shuffled":
        random.Random(7).shuffle(names)
    counted = Counted(metric)
    with ThreadPoolExecutor(THREADS) as pool:
        together = dict(zip(names, pool.map(client.score, map(cases.get, names)), strict=True))
    executions = counted.executions(len(names))
    assert executions < len(names), "nothing was batched, so nothing was compared"
    for name in names:
        assert together[name] == pytest.approx(one_by_one[name], rel=1e-5, abs=1e-5), name


def test_dynamic_batching_is_real(
    client: RewardClient, cases: dict[str, Messages], metric: Callable[[str, str], float]
) -> None:
    """Mixed shapes from 32 threads share forward passes: fewer than half as many as requests."""
    mixed = [m for name, m in cases.items() if name.split("/")[0] in ("format", "images", "turns")]
    load = [mixed[index % len(mixed)] for index in range(8 * THREADS)]
    counted = Counted(metric)
    scores = client.score_many(load, concurrency=THREADS)
    assert len(scores) == len(load)
    assert counted.executions(len(load)) < len(load) / 2


def test_responses_of_one_request_score_as_alone(
    client: RewardClient, cases: dict[str, Messages]
) -> None:
    prompt = cases["images/3"][:-1]
    responses = [cases[name][-1]["content"] for name in cases if name.startswith("text/")]
    together = client.score_responses(prompt, responses)
    for response, score in zip(responses, together, strict=True):
        alone = client.score([*prompt, {"role": "assistant", "content": response}])
        assert score == pytest.approx(alone, rel=1e-5, abs=1e-5)
    assert client.rank(prompt, responses)[0] == int(np.argmax(together))


def test_served_bf16_scores_are_within_the_oracles_own_spread(
    served: Callable[..., Served],
    checkpoint: Path,
    cases: dict[str, Messages],
    reference: dict[str, float],
) -> None:
    """bf16 is judged by the card's own distance from its fp32 scores, on the same cases."""
    card = Oracle(checkpoint, dtype=torch.bfloat16)
    exact = np.array(list(reference.values()))
    spread = np.abs(np.array([card.score(m) for m in cases.values()]) - exact)
    client = served("bf16", "--dtype=bfloat16").client
    ours = np.abs(np.array(client.score_many(cases.values())) - exact)
    print(
        f"bf16 to fp32, max and rms: card {spread.max():.4f} {_rms(spread):.4f}, "
        f"served {ours.max():.4f} {_rms(ours):.4f}"
    )
    assert spread.max() > 10 * fp32_budget(1), "bf16 noise is there to be measured"
    assert ours.max() <= spread.max()
    assert _rms(ours) <= _rms(spread)


def _rms(values: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(values)))


# Mistakes that peers make, as controls: parity must notice each, or it proves nothing.


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> Scorer:
    # Without caches: a control changes what is computed, not what is remembered.
    config = ForwardConfig(
        dtype="float32", device="cpu", embedding_cache_bytes=0, prefix_cache_bytes=0
    )
    return Scorer(checkpoint, config)


@pytest.fixture(scope="module")
def features(scorer: Scorer) -> Features:
    rng = np.random.default_rng(3)
    pad = scorer.geometry.image_token_id
    text = rng.integers(0, 700, 60).astype(np.int32)
    prompt = np.concatenate([text[:20], np.full(30, pad, np.int32), text[20:40]])
    image = rng.integers(0, 256, (140, 168, 3), dtype=np.uint8)
    return Features(prompt, (text[40:],), (image,))


@pytest.fixture(scope="module")
def group(features: Features) -> Features:
    """Two responses, so that a branch has more keys than queries."""
    return replace(features, response_ids=(*features.response_ids, np.arange(9, dtype=np.int32)))


def test_control_positions_at_the_token_count(
    scorer: Scorer, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _score(scorer, features)

    def by_token(ids: np.ndarray, *_: object) -> tuple[np.ndarray, int]:
        return positions.text_positions(0, len(ids)), len(ids)

    monkeypatch.setattr(packing, "mrope_positions", by_token)
    assert abs(_score(scorer, features) - right) > 10 * fp32_budget(right)


def test_control_attention_that_is_not_causal(
    scorer: Scorer, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _score(scorer, features)
    make_layout = backbone.make_layout

    def broken(lengths: Any, causal: bool, *rest: Any, **options: Any) -> Any:
        return make_layout(lengths, False, *rest, **options)

    monkeypatch.setattr(backbone, "make_layout", broken)
    assert abs(_score(scorer, features) - right) > 10 * fp32_budget(right)


def test_control_causal_aligned_top_left(
    scorer: Scorer, group: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is_causal=True means to torch when there are more keys than queries."""
    right = _score(scorer, group)

    def top_left(queries: int, keys: int, *_: object) -> torch.Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril()

    monkeypatch.setattr(attention, "_lower_right", top_left)
    assert abs(_score(scorer, group) - right) > 10 * fp32_budget(right)


def test_control_keys_of_another_branch(
    scorer: Scorer, group: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each branch sees as many keys as it should, but not its own."""
    right = _score(scorer, group)
    pack = packing.pack

    def broken(*arguments: Any) -> packing.PackedBatch:
        batch = pack(*arguments)
        return replace(batch, key_rows=batch.key_rows[::-1].copy())

    monkeypatch.setattr(packing, "pack", broken)
    assert abs(_score(scorer, group) - right) > 10 * fp32_budget(right)


def test_control_sharing_under_equal_ids_with_different_images(
    scorer: Scorer, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests that differ in their image alone, told apart by nothing but its digest."""
    pair = [features, replace(features, media=(features.media[0][::-1].copy(),))]
    alone = [_score(scorer, item) for item in pair]

    def together() -> list[float]:
        return [float(r.scores[0]) for r in scorer.score(pair)]  # type: ignore[union-attr]

    assert together() == pytest.approx(alone, rel=1e-5, abs=1e-5)
    monkeypatch.setattr(packing, "digests", lambda media: [b"one for all"] * len(media))
    assert together() != pytest.approx(alone, rel=1e-3, abs=1e-3)


def test_control_windows_that_are_ignored(
    scorer: Scorer, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _score(scorer, features)
    tower = scorer._model.visual
    everywhere = replace(tower.config, fullatt_block_indexes=tuple(range(tower.config.depth)))
    monkeypatch.setattr(tower, "config", everywhere)
    assert abs(_score(scorer, features) - right) > 10 * fp32_budget(right)


def test_control_images_in_the_wrong_order(scorer: Scorer, features: Features) -> None:
    pad = np.full(30, scorer.geometry.image_token_id, np.int32)
    prompt = np.concatenate([features.prompt_ids, pad])
    images = (features.media[0], features.media[0][::-1].copy())
    right = _score(scorer, Features(prompt, features.response_ids, images))
    swapped = _score(scorer, Features(prompt, features.response_ids, images[::-1]))
    assert abs(swapped - right) > 10 * fp32_budget(right)


def _score(scorer: Scorer, features: Features) -> float:
    (result,) = scorer.score([features])
    return float(result.scores[0])  # type: ignore[union-attr]
