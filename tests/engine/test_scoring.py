"""The scorer: budgets, isolation of failures, and a model that reacts to all it is given."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.features import scores_of
from triward_server.config import ForwardConfig, from_parameters, on_instance
from triward_server.engine import attention, packing
from triward_server.engine.arena import Arena
from triward_server.engine.attention import Layout, make_layout, varlen
from triward_server.engine.packing import SortedBatch
from triward_server.engine.scoring import Scorer
from triward_server.errors import (
    ConfigError,
    ForwardError,
    InvalidRequest,
    NonFiniteScore,
    Unavailable,
)
from triward_server.schema import Features
from triward_server.testing.oracle import fp32_budget


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu"))


def request(prompt: int, *responses: int, images: int = 0, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, 700, n).astype(np.int32)  # noqa: E731
    pictures = tuple(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8) for _ in range(images))
    return Features(draw(prompt), tuple(map(draw, responses)), pictures)


def with_image(scorer: Scorer, seed: int = 0) -> Features:
    """100 tokens around an image of 6 x 5 tokens, and a response of 40."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 700, 140).astype(np.int32)
    pad = np.full(30, scorer.geometry.image_token_id, np.int32)
    image = rng.integers(0, 256, (140, 168, 3), dtype=np.uint8)
    return Features(np.concatenate([text[:50], pad, text[50:100]]), (text[100:],), (image,))


def test_scores_react_to_every_token(scorer: Scorer) -> None:
    features = with_image(scorer)
    base = scores_of(scorer.score([features])[0])[0]
    text = np.flatnonzero(features.prompt_ids != scorer.geometry.image_token_id)
    changed = []
    for at in text:
        prompt = features.prompt_ids.copy()
        prompt[at] = (prompt[at] + 1) % 700
        changed.append(Features(prompt, features.response_ids, features.media))
    for at in range(40):
        response = features.response_ids[0].copy()
        response[at] = (response[at] + 1) % 700
        changed.append(Features(features.prompt_ids, (response,), features.media))
    deltas = np.array([abs(scores_of(r)[0] - base) for r in scorer.score(changed)])
    noise = abs(scores_of(scorer.score([features, features])[1])[0] - base)
    assert deltas.min() > max(1e-4, 10 * noise), f"token {deltas.argmin()} moves nothing"
    assert np.median(deltas) > 0.1


def test_scores_react_to_every_pixel(scorer: Scorer) -> None:
    """One channel of one pixel of each 14 x 14 patch, changed by half its range."""
    features = with_image(scorer)
    base = scores_of(scorer.score([features])[0])[0]
    rng = np.random.default_rng(5)
    changed = []
    for row in range(10):
        for column in range(12):
            image = features.media[0].copy()
            y, x, channel = 14 * row + rng.integers(14), 14 * column + rng.integers(14), row % 3
            image[y, x, channel] ^= 128
            changed.append(Features(features.prompt_ids, features.response_ids, (image,)))
    noise = abs(scores_of(scorer.score([features, features])[1])[0] - base)
    deltas = np.array([abs(scores_of(r)[0] - base) for r in scorer.score(changed)])
    assert deltas.min() > max(1e-5, 10 * noise), f"patch {deltas.argmin()} moves nothing"
    assert np.median(deltas) > fp32_budget(base)


def test_micro_batches_do_not_change_scores(checkpoint: Path, scorer: Scorer) -> None:
    small = ForwardConfig(
        dtype="float32", device="cpu", max_batch_tokens=400, max_batch_patches=200
    )
    tight = Scorer(checkpoint, small)
    batch = [with_image(scorer, seed) for seed in range(5)]
    batch += [request(50, 9, 80, 3, 200, 31, seed=9), request(0, 30)]
    for whole, cut in zip(scorer.score(batch), tight.score(batch), strict=True):
        np.testing.assert_allclose(scores_of(whole), scores_of(cut), rtol=1e-5, atol=1e-5)


def test_bad_requests_leave_their_neighbours_alone(scorer: Scorer) -> None:
    good, unplaced, empty = request(20, 5), request(20, 5, images=1), request(20, 0)
    expected = scores_of(scorer.score([good])[0])
    first, no_place, middle, nothing, last = scorer.score([good, unplaced, good, empty, good])
    assert isinstance(no_place, InvalidRequest) and "placeholders" in str(no_place)
    assert isinstance(nothing, InvalidRequest) and "0 tokens" in str(nothing)
    for result in (first, middle, last):
        np.testing.assert_allclose(scores_of(result), expected, rtol=1e-5)


def test_a_score_that_is_not_finite_is_an_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu"))
    scorer._model.language_model.embed_tokens.weight[5] = float("nan")
    poisoned = Features(np.array([1], np.int32), (np.array([5], np.int32),))
    both = Features(np.array([1], np.int32), (np.array([2], np.int32), np.array([5], np.int32)))
    fine, first, second = scorer.score([request(3, 4), poisoned, both])
    assert 5 not in request(3, 4).prompt_ids, "the good request must not hold the poisoned token"
    assert np.isfinite(scores_of(fine)).all()
    assert isinstance(first, NonFiniteScore)
    assert isinstance(second, NonFiniteScore) and "responses[1]" in str(second)


def test_a_failing_forward_pass_is_one_requests_error(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All five share a micro-batch at first; only those that fail alone answer an error."""
    forward = scorer._passes.launch

    def fail_on_long(ordered: SortedBatch, chosen: Sequence[int], *rest: Any) -> Any:
        if any(ordered.branches[index].prompt_length == 30 for index in chosen):
            raise RuntimeError("no kernel")
        return forward(ordered, chosen)

    monkeypatch.setattr(scorer._passes, "launch", fail_on_long)
    lengths = [5, 30, 6, 30, 7]
    results = scorer.score([request(n, 4) for n in lengths])
    for length, result in zip(lengths, results, strict=True):
        if length == 30:
            assert isinstance(result, ForwardError) and "no kernel" in str(result)
        else:
            assert np.isfinite(scores_of(result)).all()


def test_a_failed_allocation_on_a_cpu_is_halved_and_then_unavailable(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has no type for it there, but its own words; Python and numpy have one."""
    scorer = Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu"))
    forward, seen = scorer._passes.launch, []

    def fail_on_long(ordered: SortedBatch, chosen: Sequence[int], *_: Any) -> Any:
        lengths = [ordered.branches[index].prompt_length for index in chosen]
        if 30 in lengths:
            torch.empty(2**55)
        if 31 in lengths:
            np.empty(2**55)
        return forward(ordered, chosen)

    monkeypatch.setattr(scorer._passes, "launch", fail_on_long)
    lengths = [5, 30, 6, 31, 7]
    results = scorer.score([request(n, 4) for n in lengths], observe=seen.append)
    for length, result in zip(lengths, results, strict=True):
        if length >= 30:
            assert isinstance(result, Unavailable) and "free memory" in str(result)
        else:
            assert np.isfinite(scores_of(result)).all()
    assert any(each.out_of_memory for each in seen)


def test_warm_up_fails_where_the_model_cannot_run(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or Triton would say ready and answer INTERNAL to everybody."""
    scorer = Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu"))
    monkeypatch.setattr(scorer._passes, "launch", lambda *_: 1 / 0)
    with pytest.raises(ForwardError, match="ZeroDivisionError"):
        scorer.warm_up()


def test_warm_up_tries_the_largest_pass_whole(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that the device cannot keep is found out before the model is ready."""
    config = ForwardConfig(dtype="float32", device="cpu", max_batch_tokens=2000)
    scorer = Scorer(checkpoint, config)
    forward = scorer._passes.launch
    tried: list[int] = []

    def record(ordered: SortedBatch, chosen: Sequence[int], *rest: Any) -> Any:
        tried.append(len(packing.pack(ordered, chosen).input_ids))
        if tried[-1] > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ordered, chosen)

    monkeypatch.setattr(scorer._passes, "launch", record)
    with pytest.raises(Unavailable, match="2000 tokens, which max_batch_tokens"):
        scorer.warm_up()
    assert tried == [2000], "nothing smaller is run before it"


def test_warm_up_goes_from_the_largest_pass_down(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen by the first sizes that are met suits large passes."""
    scorer = Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu", max_batch_tokens=700))
    forward = scorer._passes.launch
    tried: list[int] = []

    def record(ordered: SortedBatch, chosen: Sequence[int], *rest: Any) -> Any:
        tried.append(len(packing.pack(ordered, chosen).input_ids))
        return forward(ordered, chosen)

    monkeypatch.setattr(scorer._passes, "launch", record)
    scorer.warm_up()
    assert tried == [700, 131, 23, 1]


def test_warm_up_leaves_no_trace(checkpoint: Path) -> None:
    scorer = Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu"))
    scorer.warm_up()
    assert scorer._model.embeddings.nbytes == 0


def test_value_head_stays_float32(checkpoint: Path, tmp_path: Path) -> None:
    """A head whose weights bfloat16 cannot hold is not rounded in a bfloat16 model."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    file = folder / "value_head.safetensors"
    exact = torch.linspace(0.1, 0.2, 128)[None]
    assert not torch.equal(exact, exact.bfloat16().float())
    save_file({"v_head.summary.weight": exact, "v_head.summary.bias": torch.ones(1)}, file)
    model = Scorer(folder, ForwardConfig(dtype="bfloat16", device="cpu"))._model
    assert torch.equal(model.v_head.summary.weight, exact)
    assert model.language_model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_varlen_equals_attention_written_out(causal: bool, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 3, 1, 7, 7, 7, 2]
    total = sum(lengths)
    q = torch.randn(total, 4, 8, generator=generator)
    k, v = (torch.randn(total, 4 // groups, 8, generator=generator) for _ in range(2))
    layout = make_layout(lengths, causal, Arena(torch.device("cpu")), torch.float32)
    assert isinstance(layout, Layout) and layout.kernel == "sdpa"
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = owner[:, None] == owner[None]
    if causal:
        allowed &= torch.ones(total, total).tril().bool()
    logits = torch.einsum("thd,shd->hts", q, k.repeat_interleave(groups, 1)) / 8**0.5
    weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = torch.einsum("hts,shd->thd", weights, v.repeat_interleave(groups, 1))
    torch.testing.assert_close(varlen(q, k, v, layout), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [4, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_with_shared_keys(
    block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes behind short, long and no ancestors, whatever way is the shortest for the kernel."""
    monkeypatch.setattr(attention, "_CPU_BLOCK", block)
    monkeypatch.setattr(attention, "_MASK_ROWS", block)
    monkeypatch.setattr(attention, "_masks", {})
    generator = torch.Generator().manual_seed(0)
    # A root of 6; behind it nodes of 13, 2, 2 and 1; behind that of 13 another of 11.
    parents = {0: [], 1: [0], 2: [0], 3: [0], 4: [0], 5: [0, 1]}
    lengths = [6, 13, 2, 2, 1, 11]
    rows = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    paths = [np.concatenate([rows[n] for n in [*parents[node], node]]) for node in parents]
    q = torch.randn(sum(lengths), 4, 8, generator=generator).to(dtype)
    k, v = (torch.randn(sum(lengths), 2, 8, generator=generator).to(dtype) for _ in range(2))
    layout = make_layout(
        lengths,
        True,
        Arena(torch.device("cpu")),
        dtype,
        [len(p) for p in paths],
        np.concatenate(paths),
    )
    out = varlen(q, k, v, layout)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for own, path in zip(rows, paths, strict=True):
        for row in own:
            seen = path[path <= row]
            keys, values = (t[seen].double().repeat_interleave(2, 1) for t in (k, v))
            weights = torch.einsum("hd,shd->hs", q[row].double(), keys).div(8**0.5).softmax(-1)
            expected = torch.einsum("hs,shd->hd", weights, values).to(dtype)
            torch.testing.assert_close(out[row], expected, rtol=tolerance, atol=tolerance)


def test_config_errors_name_the_parameter() -> None:
    with pytest.raises(ConfigError, match="'dtype' = 'int8'"):
        from_parameters(ForwardConfig, {"dtype": {"string_value": "int8"}})
    with pytest.raises(ConfigError, match="'max_batch_tokens' = '0'"):
        from_parameters(ForwardConfig, {"max_batch_tokens": {"string_value": "0"}})
    with pytest.raises(ConfigError, match="'colour'"):
        from_parameters(ForwardConfig, {"colour": {"string_value": "red"}})
    assert on_instance("cuda", "3") == "cuda:3"
    assert on_instance("cuda:1", "3") == "cuda:1"
    assert on_instance("cpu", "3") == "cpu"
