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

from tests.conftest import Served
from triward import RewardClient
from triward_server.config import ForwardConfig
from triward_server.engine.attention import Layout
from triward_server.engine.prefix_cache import Recall
from triward_server.engine.scoring import Scorer
from triward_server.schema import Features, Scores

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)

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
    scorer._passes.recompile = True  # or shapes without code would run as written, unnoticed
    assert_close(scorer, Scorer(checkpoint, replace(COMPILED, compile=False)))
    assert len(graphs) == warm, "a request paid for a compilation"


@needs_compiler
@pytest.mark.slow
def test_compiled_code_scores_the_same(checkpoint: Path) -> None:
    """The compiler that a GPU uses, here with its C++ half."""
    scorer = Scorer(checkpoint, COMPILED)
    scorer.warm_up()
    assert_close(scorer, Scorer(checkpoint, replace(COMPILED, compile=False)))


def test_compiled_layers_never_compile_for_a_request(checkpoint: Path) -> None:
    """Even shapes that nothing was compiled for: they run as they are written."""
    scorer = Scorer(checkpoint, COMPILED)
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    scorer._model.compile_layers(backend=count)
    scorer._passes.recompile = False
    assert_close(scorer, Scorer(checkpoint, replace(COMPILED, compile=False)))
    assert graphs == []


@pytest.mark.slow
@needs_compiler
def test_deterministic_and_compiled(checkpoint: Path) -> None:
    """Both are on by flag on a GPU; bitwise stays bitwise."""
    scorer = Scorer(checkpoint, replace(COMPILED, deterministic=True))
    scorer.warm_up()
    items = [i for batch in batches(scorer.geometry.image_token_id) for i in batch]
    for item, together in zip(items, scorer.score(items), strict=True):
        (alone,) = scorer.score([item])
        assert isinstance(alone, Scores) and isinstance(together, Scores)
        np.testing.assert_array_equal(alone.scores, together.scores)


@pytest.mark.slow
@needs_compiler
def test_served(served: Callable[..., Served], client: RewardClient, cases: dict[str, Any]) -> None:
    """Compiled inside Triton's stub process, before the model is ready."""
    some = list(cases.values())[::6]
    compiled = served("compiled", "--compile").client
    np.testing.assert_allclose(
        compiled.score_many(some), client.score_many(some), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_layers_ask_the_device_for_nothing(kernel: Any, checkpoint: Path) -> None:
    """On the meta device a value cannot be read: a layer that waited for one would raise."""
    config = ForwardConfig(dtype="bfloat16", device="cpu")
    scorer = Scorer(checkpoint, config)
    model = scorer._model
    calls: list[tuple[torch.nn.Module, tuple[Any, ...]]] = []
    for module in (model.visual.blocks[0], model.language_model):
        module.register_forward_pre_hook(lambda module, values: calls.append((module, values)))
    batch = batches(scorer.geometry.image_token_id)[5]
    for item in batch:  # so that there is something to recall
        scorer.score([replace(item, response_ids=item.response_ids[:1])])
    scorer._model.embeddings.clear()
    calls.clear()
    scorer.score([replace(batch[0], media=tuple(255 - m for m in batch[0].media)), *batch])
    assert len(calls) == 2
    model.to("meta")
    with pytest.raises(RuntimeError, match="meta"):  # the check itself: reading does raise
        torch.ones(2, device="meta").sum().item()

    def on_meta(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(on_meta, value))
        if callable(value):  # the prefix cache's
            return Recall(**{k: on_meta(v) for k, v in vars(value.__self__).items()}).join
        if isinstance(value, Layout):
            tensors = {k: v.to("meta") for k, v in vars(value).items() if torch.is_tensor(v)}
            return replace(value, kernel=kernel, **tensors)
        return value if isinstance(value, slice) else value.to("meta")

    for module, values in calls.copy():
        out = module(*on_meta(values))
        assert out.device.type == "meta" and out.shape[1] == values[0].shape[1]
