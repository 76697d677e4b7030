"""What the steps share: checkpoints made once, models loaded once, workloads, and who is right."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.gpu.card import Card
from benchmarks.measure import features, scores, timed
from benchmarks.workloads import (
    LARGE_IMAGE,
    SMALL_IMAGE,
    GroupSizes,
    Workload,
    odd_sizes,
    workloads,
)
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.backbone import RewardModel
from triward_server.engine.checkpoint import load_model
from triward_server.engine.scoring import Scorer
from triward_server.export.random_checkpoint import Size, make_checkpoint
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features

GATE = "group-16"  # the workload whose scores are compared with float32
# Our bfloat16 may be this much further from float32 than the card's bfloat16, root mean square.
GATE_RATIO = 1.2
_SHAPES: dict[Size, GroupSizes] = {
    "tiny": GroupSizes(image=(112, 84), prompt=12, response=(3, 9)),  # a rehearsal takes minutes
    "small": SMALL_IMAGE,
    "7b": LARGE_IMAGE,
}


class Bench:
    """One size of model on one device. What is large is loaded at its first use.

    Args:
        size: of the random checkpoint.
        device: where everything runs.
        dtype: `bfloat16`, or `float32`.
        folder: of the checkpoints, which outlive the run.
        compile_: whether layers are compiled where a step is about that.
    """

    def __init__(
        self, size: Size, device: str, dtype: str, folder: Path, compile_: bool = True
    ) -> None:
        self.size, self.device = size, torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._folder, self._compiles = folder, compile_
        self.workloads = workloads(_SHAPES[size])
        if size == "tiny":
            self.workloads["singles"] = Workload(self.workloads["singles"].groups[:2])
        self.config = ForwardConfig(
            dtype="bfloat16" if dtype == "bfloat16" else "float32",
            device=device,
            prefix_cache_bytes=0,
            embedding_cache_bytes=0,  # a pass that repeats must not be faster for it
        )
        self.warm_up_s: dict[str, float] = {}

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the weights; made if no earlier run has."""
        made = self._folder / f"{self.size}-{self.device.type}"
        if not made.is_dir():
            new = made.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)  # of a run that was stopped
            make_checkpoint(self.size, 0, new, str(self.device))
            new.rename(made)
        return made

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """The server's, with Pillow."""
        return Preprocessor(self.checkpoint, PreprocessConfig())

    @cached_property
    def _model(self) -> RewardModel:
        return load_model(self.checkpoint, self.dtype, self.device)

    @cached_property
    def eager(self) -> Scorer:
        """Our model, nothing compiled. It is gone once `compiled` is there."""
        return self._warm("eager", Scorer(self.checkpoint, self.config, model=self._model))

    @cached_property
    def compiled(self) -> Scorer:
        """The same weights with compiled layers, as a GPU serves them."""
        self.forget("eager")
        config = replace(self.config, compile=self._compiles)
        return self._warm("compiled", Scorer(self.checkpoint, config, model=self._model))

    @cached_property
    def exact(self) -> Scorer:
        """Deterministic mode, compiled; weights of its own."""
        config = replace(self.config, compile=self._compiles, deterministic=True)
        return self._warm("deterministic", Scorer(self.checkpoint, config))

    @cached_property
    def float8(self) -> Scorer:
        """The language model's linears in float8, compiled as `compiled` is; weights of its own."""
        config = replace(self.config, dtype="float8", compile=self._compiles)
        return self._warm("float8", Scorer(self.checkpoint, config))

    @cached_property
    def float8_eager(self) -> Scorer:
        """Likewise, nothing compiled."""
        config = replace(self.config, dtype="float8")
        return self._warm("float8_eager", Scorer(self.checkpoint, config))

    @cached_property
    def card(self) -> Card:
        """The card's model in our dtype."""
        return Card(self.checkpoint, self.dtype, self.device)

    @cached_property
    def truth(self) -> np.ndarray[Any, Any]:
        """Scores of the gate's conversations in float32, without TF32; alone in memory."""
        self.forget("eager", "compiled", "exact", "card", "_model")
        matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, convolution.allow_tf32
        matmul.allow_tf32 = convolution.allow_tf32 = False
        try:
            return np.array(self._score_gate(Card(self.checkpoint, torch.float32, self.device)))
        finally:
            matmul.allow_tf32, convolution.allow_tf32 = before
            self._collect()

    def _score_gate(self, card: Card) -> list[float]:
        return [card.score(messages) for messages in self.workloads[GATE].conversations()]

    def forget(self, *names: str) -> None:
        """Free models."""
        for name in names:
            self.__dict__.pop(name, None)
        self._collect()

    def features(self, workload: Workload) -> list[Features]:
        """Return a workload's requests."""
        return [features(self.preprocessor, group) for group in workload.groups]

    def odd_sizes(self) -> list[Features]:
        """Return requests whose images must all be resized."""
        return self.features(odd_sizes())[: 2 if self.size == "tiny" else None]

    def gate(self, mode: Literal["eager", "compiled", "exact"]) -> dict[str, Any]:
        """Compare our scores and the card's with the card's in float32, which is computed first."""
        truth = self.truth
        card = np.array(self._score_gate(self.card))
        scorer: Scorer = getattr(self, mode)
        return judge(truth, card, np.array(scores(scorer, self.features(self.workloads[GATE]))))

    def _warm(self, name: str, scorer: Scorer) -> Scorer:
        self.warm_up_s[name] = round(timed(scorer.warm_up), 3)
        return scorer

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def judge(truth: Any, card: Any, ours: Any) -> dict[str, Any]:
    """Say how far two sets of scores are from float32's, and whether ours is near enough.

    Args:
        truth: float [N], the card's in float32.
        card: likewise in the dtype that is served.
        ours: likewise, Triward's.
    """
    card_rms, ours_rms = (float(np.sqrt(np.mean((s - truth) ** 2))) for s in (card, ours))
    # Pairs that the card's own rounding cannot swap must not be swapped by ours.
    gap = truth[:, None] - truth[None]
    clear = np.abs(gap) > 2 * np.abs(card - truth).max()
    swapped = clear & (np.sign(gap) != np.sign(ours[:, None] - ours[None]))
    # Where the card itself computes in float32 only rounding is left, which the tests bound.
    allowed = max(GATE_RATIO * card_rms, 1e-4 * max(1.0, float(np.abs(truth).max())) / 4)
    passed = bool(np.isfinite(ours).all() and ours_rms <= allowed and not swapped.any())
    return {
        "conversations": len(truth),
        "score_range": [float(truth.min()), float(truth.max())],
        "card_rms": card_rms,
        "ours_rms": ours_rms,
        "ratio": ours_rms / card_rms if card_rms else None,
        "ours_max": float(np.abs(ours - truth).max()),
        "clear_pairs": int(clear.sum()) // 2,
        "swapped_pairs": int(swapped.sum()) // 2,
        "passed": passed,
    }
