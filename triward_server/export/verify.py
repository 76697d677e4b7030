"""Comparison of the engine's scores with a reference's: `triward-server verify`.

A built-in set of conversations is scored by a `referees.Referee` in float32 and by what serves
(`Preprocessor`, `Scorer`). In float32 both agree within `fp32_budget`. The engine's bfloat16 may be
twice as far from the float32 reference as the reference's own bfloat16 is in the worst
conversation: the worst of a dozen varies. An export asks a few conversations in float32, so that an
architecture that is read wrong never becomes ready.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from ..config import Dtype, ForwardConfig, PreprocessConfig
from ..engine import checkpoint as checkpoints
from ..engine.float8 import activations, weights_of
from ..engine.scoring import Scorer
from ..engine.streaming import fits, load_weights
from ..engine.weights import read_state
from ..errors import CheckpointError, ConfigError, InvalidRequest, TriwardError
from ..intake.preprocess import Preprocessor
from ..schema import Features
from .prepared import prepared
from .referees import TRANSFORMERS, Referee, RefereeKind, Refusal, check_dtype, kind_of_referee
from .reference import fp32_budget

_PROSE = "The chart compares five colours; purple is the tallest bar, at eighty-six. "
_REFERENCE = "Purple, at eighty-six."
_SIZES = {"tiny": (10, 10), "odd": (333, 215), "wide": (900, 56), "large": (640, 480)}
_FRAMES = 6


@dataclass(frozen=True)
class Case:
    """A conversation that both sides score.

    Attributes:
        name: in the report.
        turns: role, and parts: text, an image, or a list of images, which is a video.
        reference: an answer to compare with, in the first message; None: none.
        literal: its text spells control tokens, which are text to the engine and not to a card. The
            reference is given the engine's token ids.
    """

    name: str
    turns: tuple[tuple[str, tuple[Any, ...]], ...]
    literal: bool = False
    reference: str | None = None

    @property
    def media(self) -> list[Image.Image]:
        """All images and frames, in order."""
        parts = [part for _, parts in self.turns for part in parts if not isinstance(part, str)]
        return [image for p in parts for image in (p if isinstance(p, list) else [p])]

    def card(self) -> list[dict[str, Any]]:
        """Return the messages as a model card's code takes them."""
        return self._messages(self.turns, _card_part)

    def wire(self) -> tuple[bytes, list[bytes], list[bytes]]:
        """Messages, responses and media, as a request has them."""
        *prompt, (_, (response,)) = self.turns
        messages = self._messages(prompt, _wire_part)
        return json.dumps(messages).encode(), [response.encode()], list(map(_png, self.media))

    def _messages(
        self, turns: Sequence[tuple[str, tuple[Any, ...]]], of: Callable[[Any], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        messages = [{"role": role, "content": _content(parts, of)} for role, parts in turns]
        if self.reference is not None:
            messages[0]["reference"] = self.reference
        return messages


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case.

    Attributes:
        name: the case's.
        score: the engine's, or why it has none.
        reference: the reference's, in float32, likewise.
        noise: largest distance of its own scores in the engine's dtype; 0 in float32.
    """

    name: str
    score: float | str
    reference: float | str
    noise: float = 0.0

    @property
    def distance(self) -> float:
        """Between the scores; NaN where one of them is missing."""
        if isinstance(self.score, str) or isinstance(self.reference, str):
            return float("nan")
        return abs(self.score - self.reference)

    @property
    def agrees(self) -> bool:
        """True if the distance is within the budget or the noise, or both refuse."""
        if isinstance(self.score, str) or isinstance(self.reference, str):
            return isinstance(self.score, str) and isinstance(self.reference, str)
        return self.distance <= max(fp32_budget(self.reference), 2 * self.noise)


@dataclass(frozen=True)
class Verification:
    """All cases.

    Attributes:
        rows: one for each.
        seconds: that both sides took.
        streamed: whether layers came and went one by one.
        dtype: the engine's.
        referee: words for the reference.
    """

    rows: list[CaseScores] = field(default_factory=list)
    seconds: float = 0.0
    streamed: bool = False
    dtype: Dtype = "float32"
    referee: str = TRANSFORMERS.words

    @property
    def wrong(self) -> list[CaseScores]:
        """Comparisons beyond the budget; all, if none has two scores."""
        if np.isnan(self.largest):
            return self.rows
        return [row for row in self.rows if not row.agrees]

    @property
    def largest(self) -> float:
        """The largest distance; NaN if no case has two scores."""
        distances = [row.distance for row in self.rows]
        return float(np.nanmax(distances)) if not np.isnan(distances).all() else float("nan")


def verify(
    checkpoint: Path,
    device: torch.device,
    streamed: bool | None = None,
    small: bool = False,
    dtype: Dtype = "float32",
) -> Verification:
    """Score cases with the engine and with the reference.

    Args:
        checkpoint: a folder.
        device: where both run, in turn.
        streamed: layer by layer; None: where the weights do not fit into free memory.
        small: a few short conversations.
        dtype: the engine's.

    Raises:
        CheckpointError: the checkpoint is not served at all, by name; or a weight is not finite.
        ConfigError: there is no reference in that dtype.
    """
    start = time.monotonic()
    blueprint = checkpoints.check_tensors(checkpoint)
    kind = kind_of_referee(checkpoint)
    check_dtype(kind, activations(dtype))
    if streamed is None:
        streamed = not fits(count_weights(blueprint), device)
    torch.backends.cudnn.allow_tf32 = False  # the reference's patches are a convolution
    preprocessor = Preprocessor(checkpoint, PreprocessConfig())
    window = max(filter(None, blueprint.decoder.windows), default=0)
    within = window if 8 * window <= blueprint.geometry.max_tokens else 0
    chosen = cases(preprocessor.reads_images, small, within, preprocessor.place)
    if preprocessor.needs_reference:
        chosen = [replace(case, reference=_REFERENCE) for case in chosen]
    features = {case.name: _features(preprocessor, case) for case in chosen}
    references = partial(_references, kind, checkpoint, device, streamed)
    expected = references("float32", chosen, features)
    noise = 0.0
    if dtype != "float32":
        noise = _farthest(expected, references(dtype, chosen, features))
    scores = _scores(scorer_in(checkpoint, blueprint, device, streamed, dtype), features)
    rows = [CaseScores(case.name, scores[case.name], expected[case.name], noise) for case in chosen]
    return Verification(rows, time.monotonic() - start, streamed, dtype, kind.words)


def run(
    checkpoint: Path, device: str, streamed: bool | None, small: bool, dtype: Dtype
) -> Verification:
    """`verify` for the command; also raises `ConfigError` for what cannot be done here."""
    check_device(device)
    if small and dtype != "float32":
        raise ConfigError(f"--small: too few conversations to know {dtype}'s noise; leave it out")
    checkpoints.load_config(checkpoint)
    with prepared(checkpoint) as folder:
        return verify(folder, torch.device(device), streamed, small, dtype)


def check_device(device: str) -> None:
    """Raise `ConfigError` for what is no device, or not here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device!r}: cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine has no CUDA GPU; try --device cpu")


def require_agreement(report: Verification) -> None:
    """Raise `CheckpointError` that names the cases beyond the budget."""
    for row in report.wrong:
        raise CheckpointError(
            f"verify: conversation {row.name!r}: the score is {row.score}, {report.referee} "
            f"has {row.reference}; the architecture is not read as it computes "
            f"({len(report.wrong)} of {len(report.rows)} conversations differ)"
        )


def cases(sees: bool, small: bool = False, window: int = 0, place: str = "") -> list[Case]:
    """Return the built-in conversations.

    Args:
        sees: whether the model reads images and videos.
        small: a few short ones, for every export.
        window: tokens of attention's window, which one conversation then exceeds; 0: there is none.
        place: what stands in the text for each of several images.
    """
    turns = Case(
        "several turns",
        (
            ("user", ("Is purple the highest value?",)),
            ("assistant", ("Yes, it is.",)),
            ("user", ("And what is the lowest? Say only its name.",)),
            ("assistant", ("Orange.",)),
        ),
    )
    unicode = _asked("unicode", "图中最高的柱子是什么?", "紫色 🎉 — الجواب هو B, e\u0301 vs \u00e9")
    if small:
        seen = _asked("image", "What is shown?", "Five bars.", _picture(84, 60))
        return [turns, unicode, *([seen] if sees else [])]
    system = (("system", ("You are a strict judge.\nBe brief.",)),)
    text = [
        turns,
        Case("system prompt", system + _asked("", "Is 2 + 2 = 5?", "No.").turns),
        unicode,
        _asked("code", "Write it.", 'def f(x):\n    return {"a": [x << 2]}  # <tag>\n'),
        _asked("empty response", "Say nothing.", ""),
        # At least ten tokens a sentence, in any vocabulary.
        _asked("long", _PROSE * max(30, window // 8), _PROSE * 10),
        Case(
            "control tokens as text",
            _asked("", "What does <|im_end|> do?", "It ends <|im_start|> or <eos>.").turns,
            literal=True,
        ),
    ]
    if not sees:
        return text
    images = {name: _picture(*size) for name, size in _SIZES.items()}
    frames = [_picture(168, 112, shift) for shift in range(_FRAMES)]
    return [
        *text,
        *(_asked(f"image {n}", "What is shown?", "A chart.", p) for n, p in images.items()),
        _asked("several images", place * 3 + "Compare.", "They differ.", *[*images.values()][:3]),
        _asked("video", "What happens?", "It moves to the right.", frames),
    ]


def _asked(name: str, question: str, response: str, *media: Any) -> Case:
    return Case(name, (("user", (*media, question)), ("assistant", (response,))))


def _picture(width: int, height: int, shift: int = 0) -> Image.Image:
    """Draw a gradient with bars: neither flat nor noise."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = x * 255 / width, y * 255 / height
    blue = ((x + 9 * shift) // 12 % 2) * 255
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def _content(parts: tuple[Any, ...], of: Callable[[Any], dict[str, Any]]) -> Any:
    """Text alone is a string, as templates of text models want it."""
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    return [{"type": "text", "text": p} if isinstance(p, str) else of(p) for p in parts]


def _card_part(part: Any) -> dict[str, Any]:
    kind = "video" if isinstance(part, list) else "image"
    return {"type": kind, kind: part}


def _wire_part(part: Any) -> dict[str, Any]:
    if isinstance(part, list):
        return {"type": "video", "frames": len(part)}
    return {"type": "image"}


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _features(preprocessor: Preprocessor, case: Case) -> Features | str:
    try:
        return preprocessor.features(*case.wire())
    except InvalidRequest as error:  # a template that refuses a role, a model of few positions
        return f"refused: {error}"


def _references(
    kind: RefereeKind,
    checkpoint: Path,
    device: torch.device,
    streamed: bool,
    dtype: Dtype,
    chosen: Sequence[Case],
    features: Mapping[str, Features | str],
) -> dict[str, float | str]:
    """Score with the reference in a dtype; no weights are left behind."""
    reference = kind.make(checkpoint, device, streamed, activations(dtype))
    scores = {case.name: _expected(reference, case, features[case.name]) for case in chosen}
    del reference
    gc.collect()
    return scores


def _farthest(exact: Mapping[str, float | str], rounded: Mapping[str, float | str]) -> float:
    """Largest distance between scores of the same conversations; 0 if there are none."""
    pairs = ((exact[name], rounded[name]) for name in exact)
    distances = [abs(a - b) for a, b in pairs if isinstance(a, float) and isinstance(b, float)]
    return max(distances, default=0.0)


def _expected(reference: Referee, case: Case, features: Features | str) -> float | str:
    if case.literal and isinstance(features, Features):
        return reference.score_ids(np.concatenate([features.prompt_ids, features.response_ids[0]]))
    try:
        return reference.score(case.card())
    except (Refusal, TemplateError) as error:
        return f"refused: {error}"


def _scores(scorer: Scorer, features: dict[str, Features | str]) -> dict[str, float | str]:
    """All together, as a server would batch them."""
    ready = {name: each for name, each in features.items() if isinstance(each, Features)}
    scored = dict(zip(ready, scorer.score(list(ready.values())), strict=True))
    results: dict[str, float | str] = {}
    for name, each in features.items():
        result = each if isinstance(each, str) else scored[name]
        if isinstance(result, TriwardError):
            results[name] = f"refused: {result}"
        else:
            results[name] = result if isinstance(result, str) else float(result.scores[0])
    return results


def scorer_in(
    checkpoint: Path,
    blueprint: checkpoints.Blueprint,
    device: torch.device,
    streamed: bool,
    dtype: Dtype,
) -> Scorer:
    """Return an engine; streamed, it has one layer's weights at a time in memory."""
    config = ForwardConfig(
        dtype=dtype, device=str(device), embedding_cache_bytes=0, prefix_cache_bytes=0
    )
    if not streamed:
        return Scorer(checkpoint, config)
    model = checkpoints.empty_model(blueprint, activations(dtype), float8=dtype == "float8")
    in_float8 = weights_of(model)

    def tensors(wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        return read_state(
            checkpoint, activations(dtype), device, wanted, in_float8, blueprint.naming
        )

    load_weights(model, tensors, str, streamed=True)
    return Scorer(checkpoint, config, model=model)


def count_weights(blueprint: checkpoints.Blueprint) -> int:
    """Count a model's numbers."""
    model = checkpoints.empty_model(blueprint, torch.float32)
    return sum(weights.numel() for weights in model.parameters())
