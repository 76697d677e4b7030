"""torch.compile: few graphs, all before ready, and the same scores."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triward_server.config import ForwardConfig
from triward_server.schema import Features, Scores
from triward_server.scoring import Scorer

COMPILED = ForwardConfig(dtype="float32", device="cpu", compile=True)

# The row-wise halves of both towers' layers, and the language model's again for a single row.
MAX_GRAPHS = 12


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def request(image_id: int, prompt: int, *responses: int, image: tuple[int, int] | None) -> Features:
    rng = np.random.default_rng(prompt)
    ids = rng.integers(0, 700, prompt).astype(np.int32)
    images: tuple[Any, ...] = ()
    if image:
        height, width = image
        pads = np.full(height * width, image_id, np.int32)
        ids = np.concatenate([ids, pads])
        images = (rng.integers(0, 256, (28 * height, 28 * width, 3), dtype=np.uint8),)
    answers = tuple(rng.integers(0, 700, n).astype(np.int32) for n in responses)
    return Features(ids, answers, images)


def batches(image_id: int) -> list[list[Features]]:
    """Every kind of shape: one row, one conversation, shared prompts, images, many requests."""
    make: Callable[..., Features] = lambda *a, image=None: request(image_id, *a, image=image)  # noqa: E731
    return [
        [make(0, 1)],
        [make(3, 4)],
        [make(16, 16)],
        [make(128, 64, 32, 16)],
        [make(5, 9, image=(1, 1))],
        [make(40, 7, 7, image=(2, 8)), make(40, 1), make(0, 300, image=(8, 4))],
        [make(n, 5, n + 1, image=(n, 2)) for n in range(1, 9)],
    ]


def assert_close(scorer: Scorer, plain: Scorer) -> None:
    for batch in batches(plain.geometry.image_token_id):
        for one, other in zip(scorer.score(batch), plain.score(batch), strict=True):
            assert isinstance(one, Scores) and isinstance(other, Scores)
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-5)


def test_nothing_is_compiled_after_warm_up(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    scorer = Scorer(checkpoint, COMPILED)
    compile_layers = scorer._model.compile_layers
    monkeypatch.setattr(scorer._model, "compile_layers", lambda: compile_layers(backend=count))
    scorer.warm_up()
    warm = len(graphs)
    assert 0 < warm <= MAX_GRAPHS
    assert_close(scorer, Scorer(checkpoint, replace(COMPILED, compile=False)))
    assert len(graphs) == warm, "a request paid for a compilation"


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_compiled_code_scores_the_same(checkpoint: Path) -> None:
    """The compiler that a GPU uses, here with its C++ half."""
    scorer = Scorer(checkpoint, COMPILED)
    scorer.warm_up()
    assert_close(scorer, Scorer(checkpoint, replace(COMPILED, compile=False)))


def test_layers_ask_the_device_for_nothing(checkpoint: Path) -> None:
    """On the meta device a value cannot be read, so a layer that waited for one would raise."""
    scorer = Scorer(checkpoint, replace(COMPILED, compile=False))
    model = scorer._model
    inputs: list[tuple[Any, ...]] = []
    for tower in (model.visual, model.language_model):
        for layer in list(tower.blocks if tower is model.visual else tower.layers)[:1]:
            layer.register_forward_pre_hook(lambda _, values: inputs.append(values))
    scorer.score(batches(scorer.geometry.image_token_id)[5])
    assert len(inputs) == 2
    model.to("meta")
    with pytest.raises(Exception, match=r"meta|Meta"):  # the check itself: reading does raise
        torch.ones(2, device="meta").sum().item()
    for tower, (x, rotary, layout) in zip(
        (model.visual, model.language_model), inputs.copy(), strict=True
    ):
        rows = layout.key_rows
        on_meta = replace(layout, key_rows=None if rows is None else rows.to("meta"))
        layers = tower.blocks if tower is model.visual else tower.layers
        out = layers[0](x.to("meta"), tuple(t.to("meta") for t in rotary), on_meta)
        assert out.shape == x.shape and out.device.type == "meta"
