"""The models that a plan knows by name or from files, against what the engine loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from triward_server.config import ForwardConfig
from triward_server.engine.checkpoint import check_tensors, load_model
from triward_server.engine.packing import SortedBatch, sort_batch
from triward_server.engine.planning import plan
from triward_server.errors import ConfigError
from triward_server.export import random_checkpoint
from triward_server.schema import Features
from triward_server.sizing.models import Subject, subject_of
from triward_server.sizing.request import (
    RequestShape,
    alike,
    count,
    footing,
    micro_batches,
)


class TestNamed:
    @pytest.mark.parametrize("name", ["7b", "small"])
    def test_they_cost_what_the_checkpoint_costs(
        self, name: random_checkpoint.Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            random_checkpoint, "_write_weights",
            lambda output, *_: (output / "value_head.safetensors").touch(),
        )  # fmt: skip
        folder = tmp_path / "checkpoint"
        random_checkpoint.make_checkpoint(name, 0, folder)
        ours, theirs = subject_of(name, None, None, None), subject_of("", folder, None, None)
        assert theirs.checkpoint == folder
        same = {"title": "", "checkpoint": None, "geometry": theirs.geometry}
        assert replace(ours, **same) == replace(theirs, **same)

    def test_the_7b_is_as_large_as_published(self, large: Subject) -> None:
        """16.6 GB of bfloat16 with a vocabulary's head, which no reward reads: 1.1 GB."""
        assert large.weights == pytest.approx(15.5e9, rel=0.02)
        assert large.key_bytes == 57_344, "57 kB a token (docs/engine.md)"
        assert large.cost.per_token == pytest.approx(12.6e9, rel=0.01), "13.05e9 with all layers"

    def test_float8_halves_the_decoders_weights(self, large: Subject) -> None:
        half = subject_of("7b", None, None, "float8")
        assert 0.5 < half.weights / large.weights < 0.6

    def test_an_unknown_one_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="--model '70b': one of 7b, llama-8b, small"):
            subject_of("70b", None, None, None)


class TestFiles:
    def test_weights_are_those_that_are_loaded(self, checkpoint: Path) -> None:
        import torch

        subject = subject_of("", checkpoint, None, "bfloat16")
        model = load_model(checkpoint, torch.bfloat16, torch.device("cpu"))
        assert subject.weights == sum(weight.nbytes for weight in model.parameters())
        assert subject.cost == model.cost

    def test_a_repositorys_budgets_are_taken(self, build: Callable[..., Path]) -> None:
        repository = build("--max-batch-tokens", "2048", "--dtype", "float32")
        subject = subject_of("7b", None, repository, None)
        assert subject.forward.max_batch_tokens == 2048
        assert subject.dtype == "float32"
        with pytest.raises(ConfigError, match="was exported with float32"):
            subject_of("7b", None, repository, "bfloat16")


SHAPE = RequestShape(50, 20, 3, images=2, image_size=(112, 84))


class TestRequests:
    """A plan's batch beside the one that the engine makes of real features."""

    @pytest.fixture
    def real(self, checkpoint: Path) -> tuple[Subject, SortedBatch]:
        geometry = check_tensors(checkpoint).geometry
        rng = np.random.default_rng(0)

        def ids(count: int) -> NDArray[np.int32]:
            return rng.integers(100, 700, count).astype(np.int32)

        def request() -> Features:
            pads = np.full(12, geometry.image_token_id, np.int32)
            prompt = np.concatenate([ids(1), pads, ids(1), pads, ids(48)])
            media = tuple(rng.integers(0, 255, (84, 112, 3), np.uint8) for _ in range(2))
            return Features(prompt, tuple(ids(20) for _ in range(3)), media)

        subject = subject_of("", checkpoint, None, "float32")
        return subject, sort_batch({n: request() for n in range(4)}, geometry)

    def test_it_computes_as_much(self, real: tuple[Subject, SortedBatch]) -> None:
        subject, ordered = real
        place = footing(SHAPE, subject.geometry)
        assert (place.image_tokens, place.prompt, place.total) == (24, 74, 134)
        ours = alike(SHAPE, place, subject.geometry, 4)
        # A response may begin with the token of its neighbour: the real batch shares that, too.
        assert count(ours).flops(subject.cost) == pytest.approx(
            count(ordered).flops(subject.cost), rel=0.02
        )
        assert count(ours).patches == count(ordered).patches == 4 * 2 * 48

    def test_it_is_cut_alike(self, real: tuple[Subject, SortedBatch]) -> None:
        subject, ordered = real
        ours = alike(SHAPE, footing(SHAPE, subject.geometry), subject.geometry, 4)
        for limit in (100, 150, 300, 10_000):
            config = ForwardConfig(max_batch_tokens=limit, device="cpu", dtype="float32")
            cuts = plan(ordered, subject.cost, config)
            passes = micro_batches(ours, subject.cost, config)
            assert len(passes) == len(cuts), limit
            assert all(tokens <= max(limit, 94) for tokens, _ in passes)

    def test_a_prompt_that_is_remembered_costs_its_responses(self, large: Subject) -> None:
        shape = RequestShape(300, 250, 8, images=1)
        place = footing(shape, large.geometry)
        assert place.image_tokens == 999, "1024 x 768 (docs/benchmarks.md)"
        new, seen = (count(alike(shape, place, large.geometry, 1, each)) for each in (False, True))
        assert (new.tokens, seen.tokens) == (1299 + 2000, 2000)
        assert (new.patches, seen.patches) == (3996, 0)
        assert seen.pairs < new.pairs

    def test_tiles(self, ixc_folder: Path) -> None:
        subject = subject_of("", ixc_folder, None, "float32")
        place = footing(RequestShape(10, 5, 1, images=1), subject.geometry)
        assert place.grid
        assert place.image_tokens == subject.geometry.tokens(place.grid)
        assert count(alike(RequestShape(10, 5, 1, images=1), place, subject.geometry, 1)).patches
