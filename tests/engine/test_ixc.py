"""IXC-2.5-Reward in the engine: tiles, separators, partial LoRA; every score is the restatement's.

Requests are token ids and canvases; what makes those of messages is tested beside the intake.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engine.ixc import CANVASES, batches, canvas, conversation
from tests.engine.test_compile import needs_compiler
from tests.features import scores_of
from triward_server.config import ForwardConfig
from triward_server.engine import attention, clip_tower, packing
from triward_server.engine.checkpoint import check_tensors, empty_model
from triward_server.engine.geometry import Geometry, check
from triward_server.engine.layers import LowRank
from triward_server.engine.passes import Pass
from triward_server.engine.planning import price
from triward_server.engine.scoring import Scorer, warm_up_requests
from triward_server.errors import InvalidRequest
from triward_server.export.ixc_network import IxcNetwork, Mistake
from triward_server.export.ixc_reference import IxcOracle
from triward_server.export.random_ixc_checkpoint import make_ixc_checkpoint
from triward_server.export.reference import fp32_budget
from triward_server.export.verify import scorer_in
from triward_server.schema import Features, Grid

CPU = ForwardConfig(dtype="float32", device="cpu")
FORGETFUL = replace(CPU, prefix_cache_bytes=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ixc") / "checkpoint"
    make_ixc_checkpoint("tiny", 0, path)
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(folder, FORGETFUL)


@pytest.fixture(scope="module")
def ixc(folder: Path) -> IxcOracle:
    return IxcOracle(folder)


class Rounded(IxcNetwork):
    """The restatement with results of linear layers and norms in bfloat16."""

    def embed_canvas(self, canvas: Any) -> Tensor:
        return super().embed_canvas(canvas).bfloat16().float()

    def _linear(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        return super()._linear(name, x.bfloat16().float(), mask).bfloat16().float()

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return super()._norm(name, x).bfloat16().float()


def expected(oracle: IxcOracle, item: Features) -> list[float]:
    """The restatement's scores, one conversation at a time."""
    prompt = item.prompt_ids.tolist()
    return [oracle.score_inputs([*prompt, *r.tolist()], item.media) for r in item.response_ids]


def assert_right(oracle: IxcOracle, items: Sequence[Features], results: Sequence[Any]) -> None:
    for item, result in zip(items, results, strict=True):
        for score, wanted in zip(scores_of(result), expected(oracle, item), strict=True):
            assert abs(score - wanted) <= fp32_budget(wanted), (score, wanted)


def assert_equal(results: Sequence[Any], others: Sequence[Any]) -> None:
    for one, other in zip(results, others, strict=True):
        np.testing.assert_allclose(scores_of(one), scores_of(other), rtol=1e-5, atol=1e-5)


def image(*indices: int) -> list[tuple[str, int]]:
    return [("image", index) for index in indices]


TEXT = (7, 8, 9, 10, 11)
# Text, one to four images, tall, wide, one tile, 9 and 24 tiles, images side by side and apart.
PROMPTS: dict[str, list[Any]] = {
    "text": [TEXT],
    "one tile": [*image(0), TEXT],
    "wide": [*image(1), TEXT],
    "tall": [*image(2), TEXT],
    "9 tiles": [*image(3), TEXT],
    "24 tiles": [*image(4), TEXT],
    "behind the text": [TEXT, *image(6)],
    "two side by side": [TEXT, *image(0, 5), TEXT],
    "the same twice": [*image(6), TEXT, *image(6), TEXT],
    "three": [TEXT, *image(1), TEXT, *image(2, 0), TEXT],
    "four": [*image(0), TEXT, *image(1), TEXT, *image(5), (3, 4), *image(6), TEXT],
}


def requests(geometry: Geometry) -> list[Features]:
    """Each prompt with three responses, of other lengths each."""
    return [
        conversation(prompt, [[(20 + i, *range(3, 4 + 5 * n))] for n in range(3)], geometry)
        for i, prompt in enumerate(PROMPTS.values())
    ]


class TestScores:
    def test_they_are_the_restatements(self, scorer: Scorer, ixc: IxcOracle) -> None:
        """And those of one conversation are those of the batch."""
        items = requests(scorer.geometry)
        together = scorer.score(items)
        assert_right(ixc, items, together)
        for item, result in zip(items, together, strict=True):
            for answer, score in zip(item.response_ids, scores_of(result), strict=True):
                [alone] = scorer.score([replace(item, response_ids=(answer,))])
                np.testing.assert_allclose(scores_of(alone), [score], rtol=1e-5, atol=1e-5)

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(sequence=st.lists(batches, min_size=1, max_size=3), room=st.integers(0, 80),
           tokens=st.sampled_from([40, 100, 10_000]))  # fmt: skip
    def test_random_trees_in_turn(
        self, sequence: Any, room: int, tokens: int, scorer: Scorer, folder: Path, ixc: IxcOracle
    ) -> None:
        """Prefixes that end inside an image, in the tree and in a cache of a few tokens."""
        decoder = scorer._model.language_model.decoder
        token = 4 * decoder.layers * 2 * decoder.kv_heads * decoder.head_dim
        config = replace(CPU, prefix_cache_bytes=room * token, max_batch_tokens=tokens)
        small = Scorer(folder, config, model=scorer._model)
        for batch in sequence:
            items = [conversation(*each, scorer.geometry) for each in batch]
            assert_right(ixc, items, small.score(items))

    def test_a_cached_prefix_ends_inside_an_image(self, folder: Path, ixc: IxcOracle) -> None:
        """The rest of the image is computed with its update; the pool holds 30 tokens."""
        scorer = Scorer(folder, replace(CPU, prefix_cache_bytes=0))
        decoder = scorer._model.language_model.decoder
        token = 4 * decoder.layers * 2 * decoder.kv_heads * decoder.head_dim
        cached = Scorer(folder, replace(CPU, prefix_cache_bytes=30 * token), model=scorer._model)
        item = conversation([*image(3), TEXT], [[(20,)]], scorer.geometry)
        seen: list[Pass] = []
        end = scorer.geometry.read_id
        for answer in (21, 22):
            one = replace(item, response_ids=(np.array([answer, end], np.int32),))
            results = cached.score([one], observe=seen.append)
            assert_right(ixc, [one], results)
        assert [each.tokens_reused for each in seen] == [0, 30]
        assert scorer.geometry.tokens(scorer.geometry.grid(CANVASES[3])) > 30

    def test_deterministic_scores_do_not_depend_on_company(
        self, folder: Path, ixc: IxcOracle
    ) -> None:
        exact = Scorer(folder, replace(CPU, deterministic=True))
        items = requests(exact.geometry)
        together = [scores_of(each) for each in exact.score(items)]
        assert_right(ixc, items[1:4], exact.score(items[1:4]))
        for item, scores in zip(items, together, strict=True):
            [alone] = exact.score([item])
            np.testing.assert_array_equal(scores_of(alone), scores)
        for result, scores in zip(exact.score(items[::-1]), together[::-1], strict=True):
            np.testing.assert_array_equal(scores_of(result), scores)

    def test_bfloat16_is_as_near_as_its_own_noise(self, folder: Path, ixc: IxcOracle) -> None:
        """Judged by the restatement with all that goes between its layers rounded."""
        half = Scorer(folder, replace(FORGETFUL, dtype="bfloat16"))
        items = requests(half.geometry)
        found = np.concatenate([scores_of(each) for each in half.score(items)])
        exact = np.concatenate([expected(ixc, item) for item in items])
        rounded = IxcOracle(folder)
        rounded.network = Rounded(folder)
        noise = np.concatenate([expected(rounded, item) for item in items]) - exact
        assert 0 < np.sqrt(np.mean(noise**2)) < 0.2 * exact.std()
        assert np.abs(found - exact).max() < 2 * np.abs(noise).max()

    def test_streamed_scores_are_equal(self, scorer: Scorer, folder: Path) -> None:
        streamed = scorer_in(folder, check_tensors(folder), torch.device("cpu"), True, "float32")
        items = requests(scorer.geometry)[::4]
        for one, other in zip(streamed.score(items), scorer.score(items), strict=True):
            np.testing.assert_array_equal(scores_of(one), scores_of(other))

    def test_float8_keeps_the_updates_in_bfloat16(self, folder: Path, scorer: Scorer) -> None:
        held = Scorer(folder, replace(FORGETFUL, dtype="float8"))
        updates = [m for m in held._model.modules() if isinstance(m, LowRank)]
        assert len(updates) == 4 * held._model.language_model.decoder.layers
        assert {p.dtype for m in updates for p in m.parameters()} == {torch.bfloat16}
        items = requests(scorer.geometry)
        found, exact = (
            np.concatenate([scores_of(each) for each in s.score(items)]) for s in (held, scorer)
        )
        assert np.sqrt(np.mean((found - exact) ** 2)) < 0.3 * exact.std()


# What is wrong before there are ids and canvases is tested beside the intake.
INTAKE = {"bilinear without antialias", "BOS before the text"}


class TestMistakes:
    @pytest.mark.parametrize("mistake", sorted(set(get_args(Mistake)) - INTAKE))
    def test_one_is_another_score(self, mistake: Any, scorer: Scorer, folder: Path) -> None:
        """The restatement with one of them is far from the engine."""
        wrong = IxcOracle(folder, mistake)
        item = conversation([*image(6), TEXT], [[(20, 21, 22)], [(23,)]], scorer.geometry)
        ids = item.prompt_ids
        if mistake == "separators missing":
            side = (scorer.geometry.tile or 0) // 2
            surplus = 1 + (2 + 1) * side  # of an image with two rows of tiles
            ids = np.delete(ids, np.arange(1, 1 + surplus))
        [result] = scorer.score([item])
        others = expected(wrong, replace(item, prompt_ids=ids))
        for score, other in zip(scores_of(result), others, strict=True):
            assert abs(score - other) > 10 * fp32_budget(other)

    def test_media_of_another_block(
        self, scorer: Scorer, ixc: IxcOracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Runs that are counted from the row's beginning, not their block's."""
        monkeypatch.setattr(attention, "_CPU_BLOCK", 32)
        items = requests(scorer.geometry)[1:6]
        assert_right(ixc, items, scorer.score(items))
        right = attention._runs_of_media

        def late(rows: Any, lengths: Sequence[int]) -> Iterator[Any]:
            for runs in right(rows, lengths):
                yield None if runs is None else (runs - 1).clamp(min=0)

        monkeypatch.setattr(attention, "_runs_of_media", late)
        with pytest.raises(AssertionError):
            assert_right(ixc, items, scorer.score(items))


class TestTower:
    def test_embeddings_are_the_restatements(self, scorer: Scorer, ixc: IxcOracle) -> None:
        """Of all images as one row, and of one by itself."""
        grids = [scorer.geometry.grid(each) for each in CANVASES]
        wanted = [ixc.network.embed_canvas(each) for each in CANVASES]
        together = scorer._model._encode(CANVASES, grids)
        torch.testing.assert_close(together, torch.cat(wanted), rtol=1e-4, atol=1e-5)
        alone = scorer._model._encode(CANVASES[2:3], grids[2:3])
        torch.testing.assert_close(alone, wanted[2], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("rows", "columns", "tokens"), [(1, 1, 841), (2, 3, 2861), (3, 3, 4081), (4, 5, 8501)]
    )
    def test_tokens_of_published_tiles(self, rows: int, columns: int, tokens: int) -> None:
        """Three of them are the counts that the published README and code give."""
        geometry = replace(TILED, tile=40)
        assert geometry.tokens(Grid(1, 40 * rows, 40 * columns)) == tokens
        assert len(clip_tower.order(rows, columns, 20)) == tokens

    def test_an_image_shown_again_is_not_encoded_again(self, folder: Path) -> None:
        scorer = Scorer(folder, replace(FORGETFUL, embedding_cache_bytes=1 << 20))
        item = conversation([*image(3), TEXT], [[(20,)]], scorer.geometry)
        seen: list[Pass] = []
        first, again = (scores_of(scorer.score([item], observe=seen.append)[0]) for _ in range(2))
        assert [each.images_cached for each in seen] == [0, 1]
        np.testing.assert_array_equal(first, again)


TILED = Geometry(
    image_token_id=9, patch_size=14, merge_size=2, vocab_size=99, max_tokens=999, tile=4
)


class TestRequests:
    """A caller of `reward_forward` may send anything."""

    def item(self, pixels: Any, count: int) -> Features:
        return Features(np.full(count, 9, np.int32), (np.ones(1, np.int32),), (pixels,))

    def test_whole_tiles_are_accepted(self) -> None:
        check(self.item(canvas(2, 3), 35), TILED, CPU)

    def test_the_head_is_read_at_its_token_alone(self, folder: Path, scorer: Scorer) -> None:
        """`[UNUSED_TOKEN_130]`, which the template writes: a caller's own ids may end otherwise."""
        end = json.loads((folder / "config.json").read_text())["image_token_id"] + 130
        assert scorer.geometry.read_id == end
        ids = np.array([1, *TEXT], np.int32)
        answers = [np.array(answer, np.int32) for answer in ([20, end], [20, 21])]
        fine, *refused = scorer.score([
            Features(ids, (answers[0],)), Features(ids, (answers[1],)), Features(ids, (*answers,)),
        ])  # fmt: skip
        assert np.isfinite(scores_of(fine)).all()
        for number, each in enumerate(refused):
            words = f"conversation {number} ends with id 21, the head is read at {end}"
            assert isinstance(each, InvalidRequest) and words in str(each)

    def test_half_a_tile(self) -> None:
        with pytest.raises(InvalidRequest, match=r"grids\[0\].*\[1, 2, 4\].*multiples of 4"):
            check(self.item(np.zeros((28, 56, 3), np.uint8), 13), TILED, CPU)

    def test_a_video(self) -> None:
        with pytest.raises(InvalidRequest, match=r"grids\[0\].*only images are read"):
            check(self.item(np.zeros((2, 56, 56, 3), np.uint8), 13), TILED, CPU)

    def test_too_few_placeholders(self) -> None:
        with pytest.raises(InvalidRequest, match=r"34 media placeholders .* take 35"):
            check(self.item(canvas(2, 3), 34), TILED, CPU)

    @pytest.mark.parametrize("tokens", [5, 23, 131, 1031])
    def test_warm_up_has_images_where_they_fit(self, tokens: int) -> None:
        requests = warm_up_requests(max(tokens, 23), replace(TILED, max_tokens=4099), True)
        assert sum(sum(each.token_counts[:1]) for each in requests) <= max(tokens, 23)
        for each in requests:
            check(each, replace(TILED, max_tokens=4099), CPU)
        assert any(each.media for each in requests) == (tokens >= 26)


class TestCosts:
    def test_updates_are_priced(self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the FLOPs of the products that a pass makes, in each layer and in part of the last."""
        added, flops = LowRank.add_, list[int]()

        def counted(self: LowRank, y: Tensor, x: Tensor, runs: Tensor, outputs: slice) -> None:
            rows = sum(end - first for first, end in runs.tolist())
            flops.append(2 * rows * (self.A.numel() + self.B[outputs].numel()))
            added(self, y, x, runs, outputs)

        monkeypatch.setattr(LowRank, "add_", counted)
        item = conversation([*image(3)], [[(20,)]], scorer.geometry)
        ordered = packing.sort_batch({0: item}, scorer.geometry)
        tokens = scorer.geometry.tokens(ordered.media[0].grid)
        scorer.score([item])
        assert sum(flops) == scorer.cost.per_media_token * tokens
        assert ordered.media[0].patches == 16 * 10
        per_token, cost = price(ordered, 0, 0, frozenset(), scorer.cost), scorer.cost
        plain = price(ordered, 0, 0, frozenset(), replace(cost, per_media_token=0))
        assert per_token[2] - plain[2] == cost.per_media_token * tokens

    def test_an_images_tokens_cost_more_than_text(self, folder: Path) -> None:
        cost = empty_model(check_tensors(folder), torch.float32).cost
        assert 0 < cost.per_media_token < cost.per_token
        assert cost.media_token_bytes == 4 * 2 * 8


class TestCompiled:
    @pytest.fixture(autouse=True)
    def forget_graphs(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def test_nothing_is_compiled_after_warm_up(
        self, folder: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the number of images: where their rows are is no part of the code."""
        graphs: list[torch.fx.GraphModule] = []

        def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        compiled = Scorer(folder, replace(FORGETFUL, compile=True))
        compile_layers = compiled._model.compile_layers
        monkeypatch.setattr(
            compiled._model, "compile_layers", lambda: compile_layers(backend=count)
        )
        compiled.warm_up()
        warm = len(graphs)
        # Halves of both towers' layers; the language model's with media, too, and on a CPU with
        # media in a block that does not begin the row; and again for a single row.
        assert 0 < warm <= 2 + 4 + 2 * 3 + 4
        compiled._passes.recompile = True  # or shapes without code would run as written, unnoticed
        for items in ([each] for each in requests(scorer.geometry)):
            assert_equal(compiled.score(items), scorer.score(items))
        everything = requests(scorer.geometry)
        assert_equal(compiled.score(everything), scorer.score(everything))
        assert len(graphs) == warm, "a request paid for a compilation"

    @needs_compiler
    @pytest.mark.slow
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_compiled_code_scores_the_same(
        self, deterministic: bool, folder: Path, scorer: Scorer
    ) -> None:
        config = replace(FORGETFUL, compile=True, deterministic=deterministic)
        compiled = Scorer(folder, config)
        compiled.warm_up()
        items = requests(scorer.geometry)
        assert_equal(compiled.score(items), scorer.score(items))


class TestUpdates:
    def test_they_are_added_to_their_rows_alone(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x, a, b, y = (
            torch.randn(size, generator=generator) for size in ((9, 6), (4, 6), (10, 2), (9, 10))
        )
        update = LowRank(6, 10, 2, parts=2)
        update.load_state_dict({"A": a, "B": b})
        rows = [1, 2, 5]
        wanted = y.clone()
        for half in (0, 1):
            low = x[rows] @ a[2 * half : 2 * half + 2].t()
            wanted[rows, 5 * half : 5 * half + 5] += low @ b[5 * half : 5 * half + 5].t()
        with torch.inference_mode():
            update.add_(y, x, torch.tensor([[1, 3], [5, 6], [0, 0]]), slice(None))
        torch.testing.assert_close(y, wanted)

    def test_runs_by_block(self) -> None:
        rows = np.array([0, 1, 2, 7, 8, 9, 12])
        runs = [*attention._runs_of_media(rows, [5, 3, 2, 2, 1])]
        found = [None if each is None else each.tolist() for each in runs]
        none = [[0, 0], [0, 0]]  # behind all, for the compiler
        assert found == [[[0, 3], *none], [[2, 3], *none], [[0, 2], *none], None, [[0, 1], *none]]
