"""The tree: what is shared is computed once, and every score is as if nothing were."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.features import scores_of
from triward_server.config import ForwardConfig
from triward_server.engine import geometry, packing
from triward_server.engine.geometry import Geometry
from triward_server.engine.packing import SortedBatch
from triward_server.engine.planning import Cost, plan
from triward_server.engine.scoring import Scorer
from triward_server.errors import Cancelled, ForwardError, InvalidRequest, Unavailable
from triward_server.schema import Features
from triward_server.testing.oracle import Oracle, fp32_budget

CPU = ForwardConfig(dtype="float32", device="cpu")
FORGETFUL = replace(CPU, prefix_cache_bytes=0)
GEOMETRY = Geometry(image_token_id=9, patch_size=14, merge_size=2, vocab_size=99, max_tokens=999)
COST = Cost(
    per_token=1000, per_score=9, per_pair=1, per_patch=50, token_bytes=100, key_bytes=7,
    patch_bytes=30,
)  # fmt: skip

rng = np.random.default_rng(0)
# Two of one shape, one flipped, one of another shape.
IMAGES = [rng.integers(0, 256, (56, 84, 3), dtype=np.uint8) for _ in range(2)]
IMAGES += [IMAGES[0][::-1].copy(), rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)]

# Few tokens, so that prefixes meet by chance: at any depth, nested, equal, one inside another.
runs = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
prompts = st.lists(
    st.one_of(runs, st.integers(0, len(IMAGES) - 1).map(lambda index: ("image", index))), max_size=4
)
responses = st.lists(st.lists(runs, min_size=1, max_size=3), min_size=1, max_size=4)
batches = st.lists(st.tuples(prompts, responses), min_size=1, max_size=4)


def features(prompt: Any, answers: Any, image_id: int) -> Features:
    ids: list[int] = []
    images = []
    for item in prompt:
        if item[0] == "image":
            images.append(IMAGES[item[1]])
            # Every template puts tokens around an image; transformers relies on it.
            ids += [4, *[image_id] * (images[-1].size // 3 // 784), 5]
        else:
            ids += item
    flat = [np.array([i for run in answer for i in run], np.int32) for answer in answers]
    return Features(np.array(ids, np.int32), tuple(flat), tuple(images))


def build(batch: Any, image_id: int) -> list[Features]:
    return [features(prompt, answers, image_id) for prompt, answers in batch]


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, CPU)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, replace(CPU, deterministic=True))


ONE = (1, 2, 3)
IMAGE = [("image", 0)]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=batches)
@example(batch=[([ONE, *IMAGE, ONE], [[ONE]]), ([ONE, ("image", 2), ONE], [[ONE]])])
@example(batch=[([ONE, *IMAGE], [[ONE], [ONE, ONE]])] * 3)
@example(batch=[([], [[ONE], [ONE, ONE], [(1, 2)], [(1,)]])])
@example(batch=[([*IMAGE, ("image", 1), *IMAGE], [[ONE]]), ([*IMAGE, ("image", 1)], [[ONE]])])
def test_random_trees_equal_the_oracle(batch: Any, scorer: Scorer, oracle: Oracle) -> None:
    items = build(batch, scorer.geometry.image_token_id)
    for item, result in zip(items, scorer.score(items), strict=True):
        for score, expected in zip(scores_of(result), oracle.score_features(item), strict=True):
            assert abs(score - expected) <= fp32_budget(expected)


@settings(max_examples=300, deadline=None)
@given(batch=batches)
def test_the_tree_holds_every_conversation_once(batch: Any) -> None:
    """Each distinct prefix is one row; following a conversation's keys spells it."""
    items = build(batch, GEOMETRY.image_token_id)
    ordered = packing.sort_batch(dict(enumerate(items)), GEOMETRY)
    packed = packing.pack(ordered, range(len(ordered.branches)))
    prefixes = {
        tuple(branch.keys[: end + 1].tolist())
        for branch in ordered.branches
        for end in range(len(branch.keys))
    }
    assert len(packed.input_ids) == sum(packed.node_lengths) == len(prefixes)
    assert min(packed.node_lengths) > 0, "a node without tokens is a sequence for nothing"
    ends = np.cumsum(packed.key_lengths)
    for branch, node in zip(ordered.branches, packed.scored, strict=True):
        rows = packed.key_rows[ends[node] - packed.key_lengths[node] : ends[node]]
        expected = np.maximum(branch.keys, 0)
        np.testing.assert_array_equal(packed.input_ids[rows], expected)
        np.testing.assert_array_equal(packed.positions[:, rows], branch.positions)
        assert rows[-1] == np.cumsum(packed.node_lengths)[node] - 1
    assert len(packed.media) == len({i.digest for i in packed.media})
    shown = [image.tobytes() for item in items for image in item.media]
    assert {image.pixels.tobytes() for image in packed.media} == set(shown)


@settings(max_examples=300, deadline=None)
@given(batches, st.integers(1, 60), st.integers(1, 60), st.integers(1000, 10**6))
def test_plan_keeps_its_budgets(batch: Any, tokens: int, patches: int, flops: int) -> None:
    items = build(batch, GEOMETRY.image_token_id)
    ordered = packing.sort_batch(dict(enumerate(items)), GEOMETRY)
    config = replace(
        CPU, max_batch_tokens=tokens, max_batch_patches=patches, max_batch_tflop=flops / 1e12
    )
    micro_batches = plan(ordered, COST, config)
    assert [i for chosen in micro_batches for i in chosen] == list(range(len(ordered.branches)))

    def fits(chosen: Sequence[int]) -> bool:
        packed = packing.pack(ordered, chosen)
        seen = sum(GEOMETRY.grid(image.pixels).patches for image in packed.media)
        pairs = sum(
            keys * (keys + 1) // 2 - (keys - own) * (keys - own + 1) // 2
            for own, keys in zip(packed.node_lengths, packed.key_lengths, strict=True)
        )
        work = 1000 * len(packed.input_ids) + 9 * len(chosen) + pairs + 50 * seen
        return len(packed.input_ids) <= tokens and seen <= patches and work <= flops

    for chosen in micro_batches:
        assert len(chosen) == 1 or fits(chosen)
    for one, next_ in pairwise(micro_batches):
        assert not fits([*one, next_[0]]), "it would have fitted into the one before"


@settings(max_examples=300, deadline=None)
@given(batches, st.integers(500, 20_000), st.booleans())
def test_plan_keeps_its_memory(batch: Any, size: int, canonical: bool) -> None:
    """Of tokens, patches and every node's keys, which shared prompts make many."""
    items = build(batch, GEOMETRY.image_token_id)
    ordered = packing.sort_batch(dict(enumerate(items)), GEOMETRY, canonical)
    micro_batches = plan(ordered, COST, replace(CPU, max_batch_bytes=size))
    assert [i for chosen in micro_batches for i in chosen] == list(range(len(ordered.branches)))
    for chosen in micro_batches:
        packed = packing.pack(ordered, chosen)
        patches = sum(GEOMETRY.grid(image.pixels).patches for image in packed.media)
        needed = 100 * len(packed.input_ids) + 7 * sum(packed.key_lengths) + 30 * patches
        assert len(chosen) == 1 or needed <= size


def test_shared_tokens_are_computed_once(scorer: Scorer) -> None:
    """Eight responses cost the prompt once, in one request or in eight of one batch."""
    prompt = np.arange(1, 401, dtype=np.int32)
    answers = tuple(np.full(20, n, np.int32) for n in range(401, 409))
    together = [Features(prompt, answers)]
    apart = [Features(prompt, (answer,)) for answer in answers]
    for batch in (together, apart):
        ordered = packing.sort_batch(dict(enumerate(batch)), scorer.geometry)
        assert len(packing.pack(ordered, range(8)).input_ids) == 400 + 8 * 20
    one = scores_of(scorer.score(together)[0])
    np.testing.assert_allclose(
        one, [scores_of(r)[0] for r in scorer.score(apart)], rtol=1e-5, atol=1e-5
    )


def large(image_id: int) -> list[Features]:
    """Requests whose trees differ with every subset: shared prompts, images, nested responses."""
    draw = np.random.default_rng(4)
    text = draw.integers(1, 700, 200).astype(np.int32)
    pads = [np.full(6, image_id, np.int32), np.full(4, image_id, np.int32)]
    answers = tuple(draw.integers(1, 700, n).astype(np.int32) for n in (3, 50, 17, 1))
    seen = np.concatenate([text[:90], pads[0], text[:31]])
    both = np.concatenate([seen, pads[1]])
    return [
        Features(seen, answers, (IMAGES[0],)),
        Features(seen, answers[:2], (IMAGES[1],)),
        Features(both, (answers[0], np.concatenate([answers[0], answers[1]])), (*IMAGES[::3],)),
        Features(text, answers[::-1]),
        Features(text[:100], (text[100:], text[100:150], answers[3])),
        Features(text[:0], (text, text[:7])),
    ]


def test_deterministic_scores_do_not_depend_on_company(exact: Scorer) -> None:
    """Bitwise: alone, in any subset, in any order, one response at a time, cache cold or warm."""
    batch = large(exact.geometry.image_token_id)
    expected = [scores_of(result) for result in exact.score(batch)]
    for first in range(len(batch)):
        order = [*range(first, len(batch)), *range(first)][: 1 + first]
        for index, result in zip(order, exact.score([batch[i] for i in order]), strict=True):
            np.testing.assert_array_equal(scores_of(result), expected[index])
    for item, row in zip(batch, expected, strict=True):
        for answer, score in zip(item.response_ids, row, strict=True):
            (alone,) = exact.score([replace(item, response_ids=(answer,))])
            assert scores_of(alone)[0] == score
    exact._model.embeddings.clear()
    for result, row in zip(exact.score(batch[::-1]), expected[::-1], strict=True):
        np.testing.assert_array_equal(scores_of(result), row)


def test_changing_one_item_leaves_the_others(exact: Scorer) -> None:
    batch = large(exact.geometry.image_token_id)
    expected = [scores_of(result) for result in exact.score(batch)]
    for changed in range(len(batch)):
        other = replace(batch[changed], response_ids=(np.arange(1, 30, dtype=np.int32),))
        results = exact.score([*batch[:changed], other, *batch[changed + 1 :]])
        for index, result in enumerate(results):
            if index != changed:
                np.testing.assert_array_equal(scores_of(result), expected[index])


def test_a_deterministic_score_does_not_depend_on_its_twin(exact: Scorer) -> None:
    """A response of one token has one query, which the kernel rounds by how many there are."""
    image_id = exact.geometry.image_token_id or 0
    for count in (2, 5):
        group = features([*IMAGE, *IMAGE], [[(1,)]] * count, image_id)
        alone = features([*IMAGE, *IMAGE], [[(1,)]], image_id)
        expected = scores_of(exact.score([alone])[0])
        np.testing.assert_array_equal(scores_of(exact.score([group])[0]), expected.repeat(count))


def test_deterministic_scores_are_the_oracles(exact: Scorer, oracle: Oracle) -> None:
    for item in large(exact.geometry.image_token_id):
        (result,) = exact.score([item])
        for score, expected in zip(scores_of(result), oracle.score_features(item), strict=True):
            assert abs(score - expected) <= fp32_budget(expected)


def test_default_scores_are_bounded_by_rounding(scorer: Scorer) -> None:
    """The bound that the documentation states for the default mode in float32."""
    batch = large(scorer.geometry.image_token_id)
    for item, together in zip(batch, scorer.score(batch), strict=True):
        (alone,) = scorer.score([item])
        np.testing.assert_allclose(scores_of(together), scores_of(alone), rtol=1e-5, atol=1e-5)


class TestCache:
    """Image embeddings are remembered by content, in a bounded number of bytes."""

    def request(self, scorer: Scorer, image: np.ndarray) -> Features:
        pad = np.full(image.size // 3 // 784, scorer.geometry.image_token_id, np.int32)
        return Features(pad, (np.arange(9, dtype=np.int32),), (image,))

    def test_a_hit_equals_a_miss(self, checkpoint: Path) -> None:
        scorer = Scorer(checkpoint, FORGETFUL)
        cache = scorer._model.embeddings
        request = self.request(scorer, IMAGES[0])
        miss = scores_of(scorer.score([request])[0])
        assert (cache.hits, cache.misses, cache.nbytes) == (0, 1, 6 * 128 * 4)
        hit = scores_of(scorer.score([request])[0])
        assert (cache.hits, cache.misses) == (1, 1)
        np.testing.assert_array_equal(miss, hit)

    def test_other_content_or_size_misses(self, checkpoint: Path) -> None:
        """Other pixel limits give other pixels, here the same bytes in another shape."""
        scorer = Scorer(checkpoint, FORGETFUL)
        reshaped = IMAGES[0].reshape(84, 56, 3)
        batch = [self.request(scorer, image) for image in (IMAGES[0], reshaped, IMAGES[2])]
        together = [scores_of(r)[0] for r in scorer.score(batch)]
        assert scorer._model.embeddings.misses == 3
        assert len({round(float(score), 3) for score in together}) == 3

    def test_the_oldest_makes_room(self, checkpoint: Path) -> None:
        scorer = Scorer(checkpoint, replace(FORGETFUL, embedding_cache_bytes=2 * 6 * 128 * 4))
        cache = scorer._model.embeddings
        for image in IMAGES[:3]:
            scorer.score([self.request(scorer, image)])
        assert cache.nbytes == 2 * 6 * 128 * 4
        scorer.score([self.request(scorer, IMAGES[2])])
        scorer.score([self.request(scorer, IMAGES[0])])
        assert (cache.hits, cache.misses) == (1, 4)

    @pytest.mark.parametrize("size", [0, 100])
    def test_what_does_not_fit_is_not_kept(self, size: int, checkpoint: Path) -> None:
        scorer = Scorer(checkpoint, replace(FORGETFUL, embedding_cache_bytes=size))
        request = self.request(scorer, IMAGES[0])
        first, second = (scores_of(scorer.score([request])[0]) for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert scorer._model.embeddings.nbytes == 0


def test_cancelled_requests_cost_nothing_more(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked before each micro-batch; what is left of a cancelled request is not computed."""
    scorer = Scorer(checkpoint, replace(CPU, max_batch_tokens=40))
    batch = [
        Features(np.full(20, n, np.int32), tuple(np.full(15, a, np.int32) for a in (1, 2, 3)))
        for n in (1, 2, 3)
    ]
    computed: list[int] = []
    forward = scorer._passes.launch

    def record(ordered: SortedBatch, chosen: Sequence[int], *rest: Any) -> Any:
        computed.extend(ordered.branches[i].request for i in chosen)
        return forward(ordered, chosen)

    monkeypatch.setattr(scorer._passes, "launch", record)
    results = scorer.score(batch, lambda index: index == 1 and 1 in computed)
    assert isinstance(results[1], Cancelled)
    assert computed == [0, 0, 0, 1, 2, 2, 2]
    assert all(np.isfinite(scores_of(results[i])).all() for i in (0, 2))


def test_out_of_memory_halves_and_names_what_does_not_fit(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(checkpoint, CPU)
    forward = scorer._passes.launch
    attempts: list[int] = []
    memory: list[weakref.ref[torch.Tensor]] = []
    still_held: list[int] = []

    def little_memory(ordered: SortedBatch, chosen: Sequence[int], *rest: Any) -> Any:
        still_held.append(sum(tensor() is not None for tensor in memory))
        activations = torch.empty(8)
        memory.append(weakref.ref(activations))
        tokens = len(packing.pack(ordered, chosen).input_ids)
        attempts.append(tokens)
        if tokens > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(ordered, chosen)

    monkeypatch.setattr(scorer._passes, "launch", little_memory)
    batch = [
        Features(np.full(10, n, np.int32), (np.full(length, 7, np.int32),))
        for n, length in enumerate((10, 30, 80, 20, 40))
    ]
    results = scorer.score(batch)
    assert attempts[0] == 230
    assert set(still_held) == {0}, "a failed pass keeps its tensors while its halves are tried"
    assert isinstance(results[2], Unavailable) and "90 tokens" in str(results[2])
    for index in (0, 1, 3, 4):
        assert np.isfinite(scores_of(results[index])).all()
    assert not any(isinstance(result, ForwardError) for result in results)


def test_the_first_id_beyond_the_vocabulary_is_refused() -> None:
    def features(last: int) -> Features:
        return Features(np.array([1], np.int32), (np.array([2, last], np.int32),), (), ())

    geometry.check(features(GEOMETRY.vocab_size - 1), GEOMETRY, ForwardConfig())
    with pytest.raises(InvalidRequest, match=r"input_ids\[2\]: id 99, the vocabulary has 99"):
        geometry.check(features(GEOMETRY.vocab_size), GEOMETRY, ForwardConfig())
