"""Float8 linears: numerics against torch's own kernel, what is held in what, and what never is."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.engine.test_compile import batches, needs_compiler, request
from triward_server.config import ForwardConfig
from triward_server.engine import float8, weights
from triward_server.engine.checkpoint import check_tensors, empty_model, load_model
from triward_server.engine.float8 import E4M3, Float8Linear, multiply, quantise, quantise_weight
from triward_server.engine.layers import Linear
from triward_server.engine.scoring import Scorer
from triward_server.errors import CheckpointError, ConfigError, NonFiniteScore
from triward_server.export.verify import scorer_in
from triward_server.schema import Scores

CPU = torch.device("cpu")
FLOAT8 = ForwardConfig(dtype="float8", device="cpu", prefix_cache_bytes=0, embedding_cache_bytes=0)
NORMAL = 2.0**-6  # the least of e4m3 with all its bits


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, FLOAT8)


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    """Rows of very different size, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-30, 30, count)[:, None]
    return (torch.randn(count, width, generator=generator) * sizes).bfloat16()


def layer(inputs: int, outputs: int, bias: bool = True) -> Float8Linear:
    made = Float8Linear(inputs, outputs, bias)
    values, scale = quantise_weight(rows(outputs, inputs, seed=1).clamp(-9, 9))
    state = {"weight": values, "scale": scale}
    if bias:
        state["bias"] = torch.linspace(-3, 3, outputs).bfloat16()
    made.load_state_dict(state, assign=True)
    return made


def scores(scorer: Scorer, batch: Any) -> np.ndarray[Any, Any]:
    results = scorer.score(batch)
    assert all(isinstance(result, Scores) for result in results), results
    return np.concatenate([result.scores for result in results])  # type: ignore[union-attr]


class TestQuantise:
    def test_a_row_fills_the_range_and_loses_four_bits_of_mantissa(self) -> None:
        x = rows(64, 48)
        values, scale = quantise(x)
        assert values.dtype == E4M3 and scale.dtype == torch.float32
        assert (values.float().abs().amax(dim=1) == 448).all()
        back = values.double() * scale.double()
        normal = values.float().abs() >= NORMAL
        assert ((back - x).abs() <= x.double().abs() / 16)[normal].all()
        assert ((back - x).abs() <= scale * NORMAL / 16)[~normal].all()

    @pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, -1e-38, 3e38])
    def test_rows_at_the_ends_of_float32(self, value: float) -> None:
        x = torch.full((2, 16), value)
        x[1] = 1
        values, scale = quantise(x)
        assert values.float().isfinite().all() and scale.isfinite().all() and (scale > 0).all()
        back = values.double() * scale.double()
        assert torch.allclose(back[0], x[0].double(), rtol=1 / 16, atol=2e-40)
        assert (values[1].float() == 448).all()

    @pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
    def test_what_is_not_finite_never_becomes_a_number(self, value: float) -> None:
        x = rows(4, 32)
        x[2, 5] = value
        out = layer(32, 48)(x)
        assert not out[2].isfinite().any()
        assert out[[0, 1]].isfinite().all()

    def test_a_row_does_not_depend_on_its_neighbours(self) -> None:
        x = rows(32, 64)
        values, scale = quantise(x)
        for index in range(32):
            alone, its = quantise(x[index : index + 1])
            assert torch.equal(alone.view(torch.uint8)[0], values.view(torch.uint8)[index])
            assert torch.equal(its[0], scale[index])

    def test_weights_are_quantised_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = rows(70, 48)
        weight[3] = 0  # a channel that a model does not use
        whole, scale = quantise(weight.float())
        monkeypatch.setattr(float8, "_CHUNK", 16 * 48 + 1)
        values, pieces = quantise_weight(weight)
        assert torch.equal(values.view(torch.uint8), whole.view(torch.uint8))
        assert torch.equal(pieces, scale)
        assert (values[3].float() == 0).all() and scale[3] > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 5, 33])
def test_the_emulation_is_torchs_kernel(count: int, bias: bool) -> None:
    """`torch._scaled_mm`, which torch has for a CPU too; both round the same sum once."""
    made, x = layer(96, 64, bias), rows(count, 96).clamp(-100, 100)
    values, scale = quantise(x)
    kernels = torch._scaled_mm(
        values, made.weight.t(), scale, made.scale.t(), made.bias, out_dtype=torch.bfloat16
    )
    ours = multiply(values, scale, made.weight, made.scale, made.bias)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, kernels, rtol=2**-7, atol=1e-30)
    assert (ours == kernels).float().mean() > 0.98


def test_a_part_is_the_rows_of_the_whole() -> None:
    made, x = layer(64, 96), rows(7, 64).clamp(-100, 100)
    assert torch.equal(made.part(x, slice(16, 64)), made(x)[:, 16:64])


class TestLoading:
    def test_the_decoders_linears_alone_are_float8(self, scorer: Scorer) -> None:
        held = {name: t.dtype for name, t in scorer._model.state_dict().items()}
        in_float8 = {name for name, dtype in held.items() if dtype == E4M3}
        assert in_float8 == {
            f"language_model.layers.{i}.{name}.weight"
            for i in range(4)
            for name in (
                "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
            )
        }  # fmt: skip
        scales = {name.replace("weight", "scale") for name in in_float8}
        for name in held.keys() - in_float8:
            exact = name in scales or name.startswith("v_head.")
            assert held[name] == (torch.float32 if exact else torch.bfloat16), name

    def test_weights_are_the_checkpoints(self, scorer: Scorer, checkpoint: Path) -> None:
        exact = load_model(checkpoint, torch.float32, CPU).state_dict()
        for name, module in scorer._model.named_modules():
            if isinstance(module, Float8Linear):
                weight = exact[f"{name}.weight"]
                error = module.weight.float() * module.scale - weight
                assert error.norm() < 0.04 * weight.norm(), name
                assert (module.weight.float().abs().amax(dim=1) == 448).all()

    def test_no_matrix_outlives_its_quantisation(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The host never holds two copies of the weights: one matrix at most is there in both."""
        seen: list[weakref.ref[Tensor]] = []

        def watched(weight: Tensor) -> tuple[Tensor, Tensor]:
            alive = [each for each in seen if each() is not None]
            assert len(alive) <= 1, "matrices are kept beside their float8 values"
            seen.append(weakref.ref(weight))
            return quantise_weight(weight)

        monkeypatch.setattr(weights, "quantise_weight", watched)
        load_model(checkpoint, torch.bfloat16, CPU, float8=True)
        assert len(seen) == 16

    def test_layer_by_layer(self, scorer: Scorer, checkpoint: Path) -> None:
        streamed = scorer_in(checkpoint, check_tensors(checkpoint), CPU, True, "float8")
        batch = batches(scorer.geometry.image_token_id)[5]
        np.testing.assert_array_equal(scores(streamed, batch), scores(scorer, batch))

    def test_passes_are_priced_with_their_quantised_rows(self, checkpoint: Path) -> None:
        blueprint = check_tensors(checkpoint)
        plain, held = (
            empty_model(blueprint, torch.bfloat16, float8=each).cost for each in (False, True)
        )
        assert held == replace(plain, token_bytes=plain.token_bytes + 5 * blueprint.decoder.inner)

    def test_a_width_that_the_kernel_does_not_take(self) -> None:
        with pytest.raises(CheckpointError, match=r"gate is 24 to 32 wide, only multiples of 16"):
            float8.replace_linears(
                nn.ModuleDict({"mlp": nn.ModuleDict({"gate": Linear(24, 32, bias=False)})})
            )

    def test_a_gpu_without_float8(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        with pytest.raises(ConfigError, match=r"A100 has compute capability 8\.0, at least 8\.9"):
            float8.check_float8(torch.device("cuda:0"))
        for enough in ((8, 9), (9, 0), (12, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, e=enough: e)
            float8.check_float8(torch.device("cuda:0"))


class TestScores:
    def test_they_are_near_float32_and_not_bfloat16s(
        self, scorer: Scorer, checkpoint: Path
    ) -> None:
        batch = [each for many in batches(scorer.geometry.image_token_id) for each in many]
        exact, rounded = (
            scores(Scorer(checkpoint, replace(FLOAT8, dtype=dtype)), batch)
            for dtype in ("float32", "bfloat16")
        )
        found = scores(scorer, batch)
        errors = [np.sqrt(np.mean((s - exact) ** 2)) / exact.std() for s in (rounded, found)]
        assert errors[0] < 0.02 < errors[1] < 0.2, errors

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    @pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"])
    def test_activations_that_are_not_finite_are_an_error(
        self, value: float, name: str, checkpoint: Path
    ) -> None:
        scorer = Scorer(checkpoint, FLOAT8)
        module = scorer._model.language_model.layers[1].get_submodule(name)

        def spoil(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inputs[0][-1, 3] = value  # of the last conversation

        module.register_forward_pre_hook(spoil)
        batch = [request(0, 9, 4, image=None), request(0, 5, 6, image=None)]
        results = scorer.score(batch)
        assert sum(isinstance(each, NonFiniteScore) for each in results) == 1, results
        assert sum(isinstance(each, Scores) for each in results) == 1

    def test_deterministic(self, checkpoint: Path) -> None:
        """Quantisation is by row, so that company changes nothing; bitwise."""
        scorer = Scorer(checkpoint, replace(FLOAT8, deterministic=True))
        items = [i for batch in batches(scorer.geometry.image_token_id)[:6] for i in batch]
        together = scores(scorer, items)
        np.testing.assert_array_equal(
            np.concatenate([scores(scorer, [item]) for item in items]), together
        )

    def test_what_the_prefix_cache_keeps_is_bfloat16(self, checkpoint: Path) -> None:
        config = replace(FLOAT8, deterministic=True, prefix_cache_bytes=2**24)
        scorer = Scorer(checkpoint, config)
        assert {each.dtype for each in scorer._prefixes._pool} == {torch.bfloat16}
        item = request(0, 64, 9, 5, image=None)
        first = scores(scorer, [item])
        reused: list[int] = []
        [again] = scorer.score([item], observe=lambda done: reused.append(done.tokens_reused))
        assert sum(reused) == 64 and isinstance(again, Scores)
        np.testing.assert_array_equal(again.scores, first)

    def test_layers_are_traced_whole(self, scorer: Scorer, checkpoint: Path) -> None:
        """`fullgraph`: what a compiler could not follow would raise."""
        traced = Scorer(checkpoint, replace(FLOAT8, compile=True))
        traced._model.compile_layers(backend="eager")
        batch = batches(scorer.geometry.image_token_id)[5]
        np.testing.assert_allclose(scores(traced, batch), scores(scorer, batch), atol=1e-5)

    @needs_compiler
    @pytest.mark.slow
    def test_compiled(self, scorer: Scorer, checkpoint: Path) -> None:
        """Another order of sums may round an activation to its other neighbour in e4m3.

        So compiled scores are others, but no further from float32.
        """
        compiled = Scorer(checkpoint, replace(FLOAT8, compile=True))
        compiled._model.compile_layers()
        batch = [each for many in batches(scorer.geometry.image_token_id) for each in many]
        exact = scores(Scorer(checkpoint, replace(FLOAT8, dtype="float32")), batch)
        rms = [np.sqrt(np.mean((scores(s, batch) - exact) ** 2)) for s in (compiled, scorer)]
        assert rms[0] < 1.3 * rms[1], rms


def test_a_text_model(tmp_path: Path) -> None:
    """Norms behind both halves, and heads of another width."""
    from triward_server.export.random_text_checkpoint import make_text_checkpoint

    folder = tmp_path / "gemma2"
    make_text_checkpoint("gemma2", "tiny", 0, folder)
    item = request(0, 20, 5, 9, image=None)
    found, exact = (
        scores(Scorer(folder, replace(FLOAT8, dtype=dtype)), [item])
        for dtype in ("float8", "float32")
    )
    assert 0 < np.abs(found - exact).max() < 1
    shutil.rmtree(folder)
