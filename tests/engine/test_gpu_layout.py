"""What suits a GPU and changes no score: grouped heads as they are, and aligned rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triward_server.config import ForwardConfig
from triward_server.engine import attention, kernels
from triward_server.engine.arena import Arena
from triward_server.engine.checkpoint import check_tensors, empty_model
from triward_server.engine.scoring import Scorer
from triward_server.engine.weights import read_state
from triward_server.export import random_checkpoint
from triward_server.schema import Features, Scores
from triward_server.testing.oracle import Oracle, fp32_budget

CPU = ForwardConfig(dtype="float32", device="cpu")


def grouped(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
    """A varlen kernel in torch's place, which lets query heads share a key head."""
    layout = attention.make_layout([5, 3], True, Arena(query.device), query.dtype)
    return attention.varlen(query, key, value, replace(layout, kernel="sdpa"))


def ignorant(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
    """One that reads the first key head for all, without a word."""
    same = [t[:, :1].expand(-1, query.shape[1], -1) for t in (key, value)]
    return grouped(query, *(same if key.shape[1] < query.shape[1] else (key, value)))


def refusing(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
    if query.shape[1] != key.shape[1]:
        raise RuntimeError("Number of heads in key/value must equal number of heads in query")
    return grouped(query, key, value)


@pytest.mark.parametrize(
    ("kernel", "works"), [(grouped, True), (ignorant, False), (refusing, False)]
)
def test_grouped_heads_are_tried(kernel: Any, works: bool) -> None:
    assert kernels.groups_heads(kernel, torch.device("cpu")) is works


def test_grouped_heads_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's kernel has no parameter for them; the layers of a pass do not ask again."""
    calls: list[int] = []

    def kernel(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        calls.append(key.shape[1])
        return grouped(query, key, value)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    assert kernels.repeats_keys(), "without a GPU there is nothing to try"
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.torch, "device", lambda name: cpu)
    assert not any(kernels.repeats_keys() for _ in range(3))
    assert calls == [2, 4]


def test_a_probe_that_faults_is_no_answer() -> None:
    def kernel(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal instruction was encountered")

    with pytest.raises(torch.AcceleratorError):
        kernels.groups_heads(kernel, torch.device("cpu"))


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkpoint whose vision tower is 100 wide inside, as 7B's is 3,420."""
    dimensions = replace(random_checkpoint.SIZES["tiny"], vision_inner=100)
    monkeypatch.setitem(random_checkpoint.SIZES, "tiny", dimensions)
    random_checkpoint.make_checkpoint("tiny", 0, tmp_path / "odd")
    yield tmp_path / "odd"


def test_a_widened_tower_is_the_same_function(odd: Path) -> None:
    wide = Scorer(odd, CPU)
    blueprint = check_tensors(odd)
    model = empty_model(blueprint, torch.float32)
    state = read_state(odd, torch.float32, torch.device("cpu"), lambda name: True)
    model.load_state_dict(state, assign=True)
    plain = Scorer(odd, CPU, model=model.requires_grad_(False).eval())
    inner = [scorer._model.visual.blocks[0].mlp.down_proj.in_features for scorer in (wide, plain)]
    assert inner == [128, 100]
    pads = np.full(30, wide.geometry.image_token_id, np.int32)
    image = np.random.default_rng(0).integers(0, 256, (140, 168, 3), dtype=np.uint8)
    ids = np.arange(20, dtype=np.int32)
    features = Features(np.concatenate([ids, pads]), (ids + 50,), (image,))
    [one], [other] = wide.score([features]), plain.score([features])
    assert isinstance(one, Scores) and isinstance(other, Scores)
    [truth] = Oracle(odd).score_features(features)
    assert abs(one.scores[0] - other.scores[0]) < fp32_budget(truth) / 10
    assert abs(one.scores[0] - truth) < fp32_budget(truth)
