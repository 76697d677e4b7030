"""The prefix cache: what it has is not computed again, and no score shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.test_engine import CPU, FORGETFUL, IMAGES, batches, build, features
from tests.features import scores_of
from triward_server.engine import packing
from triward_server.engine.packing import MediaNumbers
from triward_server.engine.passes import Pass
from triward_server.engine.prefix_cache import PrefixCache, Recall
from triward_server.engine.prefixes import PrefixIndex
from triward_server.engine.scoring import Scorer
from triward_server.errors import Cancelled, ForwardError, NonFiniteScore, Unavailable
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.schema import Features, Scores
from triward_server.testing.oracle import Oracle, TextOracle, fp32_budget

TOKEN_BYTES = 4 * 2 * 2 * 32 * 4  # of the tiny checkpoint: layers, K and V, key heads, width, fp32
ONE = (1, 2, 3)
Check = Callable[[Features, Any], None]


def budget(tokens: int) -> int:
    return tokens * TOKEN_BYTES


@pytest.fixture
def scorer(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, CPU)


@pytest.fixture(scope="module")
def right(oracle: Oracle) -> Check:
    """Compares a result with the oracle, which is asked once about each conversation."""
    known: dict[Any, list[float]] = {}

    def check(item: Features, result: Any) -> None:
        key = (
            item.prompt_ids.tobytes(),
            *(ids.tobytes() for ids in item.response_ids),
            *((pixels.shape, pixels.tobytes()) for pixels in item.media),
        )
        if key not in known:
            known[key] = oracle.score_features(item)
        for score, expected in zip(scores_of(result), known[key], strict=True):
            assert abs(score - expected) <= fp32_budget(expected)

    return check


def passes(scorer: Scorer, *batch: Features) -> list[Pass]:
    seen: list[Pass] = []
    assert all(isinstance(r, Scores) for r in scorer.score(batch, observe=seen.append))
    return seen


def group(prompt: Sequence[Any], answers: int, first: int = 0, image_id: int = 0) -> Features:
    """A prompt and responses of 5 tokens, numbered."""
    return features(prompt, [[[7, 8, 9, first + n, 4]] for n in range(answers)], image_id)


LONG = [(5, 6, 7, 8) * 10]


def test_a_second_wave_computes_its_responses(scorer: Scorer, right: Check) -> None:
    image_id = scorer.geometry.image_token_id or 0
    prompt = [*LONG, ("image", 0), *LONG]
    first, second = (group(prompt, 8, 10 * wave, image_id) for wave in range(2))
    [once] = passes(scorer, first)
    size = len(first.prompt_ids)
    assert (once.tokens, once.tokens_reused, once.images) == (size + 3 + 8 * 2, 0, 1)
    assert once.prefix_bytes == budget(size), "responses of a group do not last"
    [again] = passes(scorer, second)
    assert (again.tokens, again.tokens_reused) == (3 + 8 * 2, size)
    assert again.tokens_saved == 7 * (size + 3)
    assert again.images == 0, "an image whose tokens are cached is not encoded, nor looked up"
    right(second, scorer.score([second])[0])


def test_a_dialogue_computes_what_is_new(scorer: Scorer, right: Check) -> None:
    turns = np.random.default_rng(1).integers(0, 700, (6, 50)).astype(np.int32)
    for count in range(1, 6):
        prompt = np.concatenate(list(turns[:count]))
        item = Features(prompt, (turns[count],))
        [seen] = passes(scorer, item)
        assert (seen.tokens, seen.tokens_reused) == ((50, 50 * count) if count > 1 else (100, 0))
        right(item, scorer.score([item])[0])


def test_a_conversation_seen_before_costs_a_token(scorer: Scorer, right: Check) -> None:
    item = features(LONG, [[ONE]], 0)
    passes(scorer, item)
    [seen] = passes(scorer, item)
    assert (seen.tokens, seen.tokens_reused) == (1, 42)
    right(item, scorer.score([item])[0])


def test_a_probe_computes_everything(scorer: Scorer) -> None:
    """Or a health check would ask the cache in place of the model."""
    item = features(LONG, [[ONE]], 0)
    passes(scorer, item)
    for _ in range(2):
        [seen] = passes(scorer, replace(item, probe=True))
        assert (seen.tokens, seen.tokens_reused) == (43, 0)
    other = features([*LONG, ONE], [[ONE]], 0)
    passes(scorer, replace(other, probe=True))
    [seen] = passes(scorer, other)
    assert seen.tokens_reused == 43, "of the first item; a probe leaves nothing"


def test_micro_batches_of_one_batch_share(checkpoint: Path, right: Check) -> None:
    """What the plan counts in each of them is computed in the first."""
    scorer = Scorer(checkpoint, replace(CPU, max_batch_tokens=60))
    item = group(LONG, 12)
    first, *rest = passes(scorer, item)
    assert first.tokens_reused == 0 and rest
    assert {each.tokens_reused for each in rest} == {40}
    right(item, scorer.score([item])[0])


def test_deterministic_hits_are_bitwise_misses(checkpoint: Path) -> None:
    exact = replace(CPU, deterministic=True)
    scorer = Scorer(checkpoint, exact)
    image_id = scorer.geometry.image_token_id or 0
    prompt = [*LONG, ("image", 0), ONE]
    longer = [*prompt, (7, 8, 9, 1, 4), *LONG]
    for wanted in (group(prompt, 3, 0, image_id), group(longer, 2, 0, image_id)):
        fresh = Scorer(checkpoint, replace(exact, prefix_cache_bytes=0))
        expected = scores_of(fresh.score([wanted])[0])
        for _ in range(2):
            np.testing.assert_array_equal(scores_of(scorer.score([wanted])[0]), expected)
        (seen,) = passes(scorer, wanted)
        assert seen.tokens_reused == len(wanted.prompt_ids), "and the prompt is found whole"


sequences = st.lists(batches, min_size=2, max_size=4)


@pytest.mark.parametrize("deterministic", [False, True])
def test_random_batches_in_turn(
    deterministic: bool, checkpoint: Path, oracle: Oracle, right: Check
) -> None:
    check_random_batches(40, deterministic, checkpoint, oracle, right)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_many_random_batches_in_turn(
    deterministic: bool, checkpoint: Path, oracle: Oracle, right: Check
) -> None:
    check_random_batches(300, deterministic, checkpoint, oracle, right)


def check_random_batches(
    count: int, deterministic: bool, checkpoint: Path, oracle: Oracle, right: Check
) -> None:
    """Nested prefixes, too little room, other images, callers that leave, passes that fail."""
    config = replace(CPU, deterministic=deterministic)
    forgetful = Scorer(checkpoint, replace(config, prefix_cache_bytes=0))
    reused = evicted = 0

    @settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(sequences, st.integers(0, 60), st.integers(10, 80), st.data())
    def run(sequence: Any, room: int, tokens: int, data: Any) -> None:
        nonlocal reused, evicted
        small = replace(config, prefix_cache_bytes=budget(room), max_batch_tokens=tokens)
        scorer = Scorer(checkpoint, small, model=forgetful._model)
        for each in sequence:
            items = build(each, scorer.geometry.image_token_id or 0)
            failing = data.draw(st.sampled_from([None, None, torch.OutOfMemoryError, ValueError]))
            leaving = data.draw(st.sampled_from([-1, -1, 0]))
            seen: list[Pass] = []
            with pytest.MonkeyPatch.context() as patch:
                if failing:
                    fail_once(scorer, failing, patch)
                results = scorer.score(items, lambda i, gone=leaving: i == gone, seen.append)
            reused += sum(each.tokens_reused for each in seen)
            for index, (item, result) in enumerate(zip(items, results, strict=True)):
                if index == leaving:
                    assert isinstance(result, Cancelled)
                elif isinstance(result, ForwardError | Unavailable):
                    assert failing
                elif deterministic:
                    expected = scores_of(forgetful.score([item])[0])
                    np.testing.assert_array_equal(scores_of(result), expected)
                else:
                    right(item, result)
            assert scorer._prefixes.nbytes <= budget(room)
        evicted += scorer._prefixes.evicted

    run()
    assert reused and evicted, "or nothing was tried"


def fail_once(scorer: Scorer, error: type[Exception], patch: pytest.MonkeyPatch) -> None:
    """Let the next pass fail in the middle of its layers."""
    join, calls = Recall.join, []

    def fail(self: Recall, layer: int, own: Any) -> Any:
        calls.append(layer)
        if len(calls) == 3:
            raise error("in the middle")
        return join(self, layer, own)

    patch.setattr(Recall, "join", fail)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[bytes], float]]:
    """A model with windows and capped products, and its oracle, asked once about each."""
    folder = tmp_path_factory.mktemp("gemma") / "checkpoint"
    make_text_checkpoint("gemma2", "tiny", 0, folder)
    oracle = TextOracle(folder)

    @cache
    def score(ids: bytes) -> float:
        return oracle.score_ids(np.frombuffer(ids, np.int32))

    return folder, score


def test_windows_and_caps_behind_cached_tokens(
    gemma: tuple[Path, Callable[[bytes], float]],
) -> None:
    """Prefixes shorter and longer than the window, in any order."""
    folder, score = gemma
    rng = np.random.default_rng(0)
    text = rng.integers(3, 700, 600).astype(np.int32)
    scorer = Scorer(folder, CPU)
    reused = 0
    for _ in range(60):
        begin, end = sorted(rng.integers(1, 400, 2))
        answers = tuple(text[end : end + n] for n in rng.integers(2, 90, rng.integers(1, 4)))
        item = Features(text[: max(begin, 1)], answers)
        seen: list[Pass] = []
        [result] = scorer.score([item], observe=seen.append)
        reused += sum(each.tokens_reused for each in seen)
        for ids, ours in zip(answers, scores_of(result), strict=True):
            expected = score(np.concatenate([item.prompt_ids, ids]).tobytes())
            assert abs(ours - expected) <= fp32_budget(expected)
    assert reused > 5000


class TestControls:
    """What must not happen shows in a score."""

    PROMPT = (*LONG, ("image", 0), *LONG)

    def waves(self, scorer: Scorer) -> tuple[Features, Features]:
        image_id = scorer.geometry.image_token_id or 0
        first, second = (group(self.PROMPT, 2, 10 * wave, image_id) for wave in range(2))
        return first, second

    def test_nothing_broken(self, scorer: Scorer, right: Check) -> None:
        first, second = self.waves(scorer)
        scorer.score([first])
        right(second, scorer.score([second])[0])

    def test_a_stale_slot(self, scorer: Scorer, right: Check) -> None:
        first, second = self.waves(scorer)
        scorer.score([first])
        slot = int(scorer._prefixes._index.match(first.prompt_ids[:5].astype(np.int64))[-1])
        for layer in scorer._prefixes._pool:
            layer[slot] = layer[slot + 1].clone() + 1
        with pytest.raises(AssertionError):
            right(second, scorer.score([second])[0])

    def test_a_wrong_position(
        self, scorer: Scorer, right: Check, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if what is cached took no place."""
        first, second = self.waves(scorer)
        scorer.score([first])
        pack = packing.pack

        def shifted(*args: Any) -> Any:
            batch = pack(*args)
            return replace(batch, positions=batch.positions - batch.positions.min())

        monkeypatch.setattr(packing, "pack", shifted)
        with pytest.raises(AssertionError):
            right(second, scorer.score([second])[0])

    def test_another_image_under_equal_ids(
        self, scorer: Scorer, right: Check, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MediaNumbers, "first", lambda self, item, tokens: 0)
        first, second = self.waves(scorer)
        scorer.score([first])
        with pytest.raises(AssertionError):
            other = replace(second, media=(IMAGES[1],))
            right(other, scorer.score([other])[0])

    def test_a_row_too_far(
        self, scorer: Scorer, right: Check, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Keys and values of a neighbour are kept in place of a token's."""
        first, second = self.waves(scorer)
        keep = PrefixIndex.keep

        def off_by_one(self: PrefixIndex, keys: Any, computed: int) -> Any:
            known, slots = keep(self, keys, computed)
            return known + 1, slots

        monkeypatch.setattr(PrefixIndex, "keep", off_by_one)
        scorer.score([first])
        with pytest.raises(AssertionError):
            right(second, scorer.score([second])[0])


class TestMemory:
    def test_without_room_nothing_is_kept(self, checkpoint: Path, right: Check) -> None:
        scorer = Scorer(checkpoint, FORGETFUL)
        for _ in range(2):
            [seen] = passes(scorer, group(LONG, 2))
            assert (seen.tokens_reused, seen.prefix_bytes) == (0, 0)
        assert scorer._prefixes._pool == []

    def test_the_pool_has_the_bytes_it_was_given(self, checkpoint: Path) -> None:
        scorer = Scorer(checkpoint, replace(CPU, prefix_cache_bytes=budget(100) + 7))
        assert sum(layer.nbytes for layer in scorer._prefixes._pool) == budget(100)
        for prompt in range(5):
            [seen] = passes(scorer, group([(prompt, prompt), *LONG], 2))
            assert seen.prefix_bytes <= budget(100)
        assert scorer._prefixes.evicted

    def test_a_prompt_longer_than_the_pool_is_kept_in_part(
        self, checkpoint: Path, right: Check
    ) -> None:
        scorer = Scorer(checkpoint, replace(CPU, prefix_cache_bytes=budget(30)))
        first, second = group(LONG, 2), group(LONG, 2, 20)
        passes(scorer, first)
        [seen] = passes(scorer, second)
        assert seen.tokens_reused == 30
        right(second, scorer.score([second])[0])

    def test_out_of_memory_frees_the_pool_first(
        self, scorer: Scorer, right: Check, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pass that fits without it is not halved; the next batch has half of it."""
        batch = [group([*LONG, (n, n)], 1) for n in range(4)]
        passes(scorer, batch[0])
        whole = scorer._prefixes._index.capacity
        sizes = []
        call = type(scorer._model).__call__

        def scarce(self: Any, packed: Any, *rest: Any) -> Any:
            sizes.append(len(packed.node_lengths))
            if scorer._prefixes._pool:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return call(self, packed, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(type(scorer._model), "__call__", scarce)
            results = scorer.score(batch)
        assert len(sizes) == 2, "once with the pool, once without, and not in halves"
        for item, result in zip(batch, results, strict=True):
            right(item, result)
        passes(scorer, batch[0])
        assert scorer._prefixes._index.capacity == whole // 2
        [seen] = passes(scorer, batch[0])
        assert seen.tokens_reused

    def test_a_pass_that_fails_leaves_nothing(
        self, scorer: Scorer, right: Check, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its slots hold what nobody computed to the end."""
        item = group(LONG, 1)
        with monkeypatch.context() as patch:
            fail_once(scorer, ValueError, patch)
            [result] = scorer.score([item])
        assert isinstance(result, ForwardError)
        assert scorer._prefixes.nbytes == 0
        right(item, scorer.score([item])[0])

    def test_what_is_not_finite_does_not_stay(self, scorer: Scorer, right: Check) -> None:
        """A fault of the device in one pass is not every later pass's."""
        item = group(LONG, 2)
        passes(scorer, item)
        for layer in scorer._prefixes._pool:
            layer.fill_(torch.nan)
        [result] = scorer.score([item])
        assert isinstance(result, NonFiniteScore)
        right(item, scorer.score([item])[0])


# A path is a string of few letters; what is kept of it, a dict from each beginning to a slot.
paths = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(lambda p: np.array(p, np.int64))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 12), st.lists(st.lists(paths, min_size=1, max_size=4), max_size=12))
def test_an_index_never_mixes_slots_up(room: int, sequence: list[list[Any]]) -> None:
    index = PrefixIndex(room)
    held: dict[bytes, int] = {}  # by path: the slot that its last token was given
    for batch in sequence:
        index.begin()
        found: dict[bytes, int] = {}  # of this batch, which must stay
        for path in batch:
            for end, slot in enumerate(index.match(path), 1):
                assert held[path[:end].tobytes()] == slot
                found[path[:end].tobytes()] = slot
        for path in batch:
            known, slots = index.keep(path, len(path))
            for end, slot in enumerate(slots, known + 1):
                held = {p: s for p, s in held.items() if s != slot}
                held[path[:end].tobytes()] = slot
                found[path[:end].tobytes()] = slot
            assert len(index.match(path)) == known + len(slots)
            if known + len(slots) < len(path):
                assert index.size == room, "room was left"
        assert len(set(found.values())) == len(found), "two tokens in one slot"
        for path in batch:
            for end, slot in enumerate(index.match(path), 1):
                assert found.get(path[:end].tobytes()) == slot, "of the batch, and gone"
        assert index.size <= room


def test_a_branch_is_used_longer_than_its_leaves() -> None:
    index = PrefixIndex(6)
    keys = lambda *values: np.array(values, np.int64)  # noqa: E731
    for path in (keys(1, 2, 3), keys(1, 2, 4), keys(5, 6)):
        index.begin()
        index.keep(path, len(path))
    index.begin()
    index.match(keys(1, 2, 4))
    index.begin()
    index.keep(keys(7, 8), 2)
    assert [len(index.match(p)) for p in (keys(1, 2, 3), keys(1, 2, 4), keys(5, 6))] == [2, 3, 0]
    assert index.evicted == 3


def test_whole_paths_share_nothing() -> None:
    index = PrefixIndex(8, whole=True)
    keys = np.arange(5)
    assert index.keep(keys, 5)[0] == 0
    assert len(index.match(keys[:4])) == 0 and len(index.match(keys)) == 5
    index.begin()
    _, slots = index.keep(keys[:4], 4)
    assert len(slots) == 4 and len(index.match(keys)) == 0, "it had to make room"
    assert index.keep(np.arange(9), 9)[1].size == 0, "in part is not at all"


def test_forgotten_media_get_new_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_KNOWN_MEDIA", 2)
    numbers = MediaNumbers()
    first = [numbers.first((bytes([n]), 0.0), 4) for n in range(3)]
    assert first == [0, 4, 8]
    assert numbers.first((bytes([2]), 0.0), 4) == 8
    assert numbers.first((bytes([0]), 0.0), 4) == 12
    assert numbers.first((bytes([2]), 0.5), 4) == 16, "another speed, other positions"


@pytest.mark.parametrize(
    ("config", "free", "expected"),
    [
        (replace(CPU, prefix_cache_bytes=123), 0, 123),
        (CPU, 0, 256 * 1024**2),
        (replace(CPU, device="cuda", max_batch_bytes=10, embedding_cache_bytes=5), 50, 35),
        (replace(CPU, device="cuda", max_batch_bytes=10, embedding_cache_bytes=5), 90, 40),
        (replace(CPU, device="cuda", max_batch_bytes=10, embedding_cache_bytes=5), 12, 0),
    ],
)
def test_default_sizes(
    config: Any, free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triward_server.engine.prefix_cache import prefix_bytes

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 100))
    assert prefix_bytes(config, torch.device(config.device)) == expected


def test_a_pool_that_does_not_fit_is_none(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    decoder = scorer._model.language_model.decoder
    cache = PrefixCache(budget(100), decoder, torch.float32, torch.device("cpu"), False)
    assert cache._pool == [] and cache._index.capacity == 50
