"""Whether float8 keeps the order of responses: what an export with `--dtype float8` must show.

A set of prompts with several responses each is scored by the engine in float32, bfloat16 and
float8. A pair of responses to one prompt is *clear* where its float32 margin is more than twice
what bfloat16 changes in margins (root mean square): where bfloat16 itself could tell. Float8 must
put at least `LIMIT` of the clear pairs into float32's order. docs/engine.md says why.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..config import Dtype, PreprocessConfig
from ..engine.checkpoint import Blueprint, check_tensors
from ..engine.streaming import fits
from ..errors import ConfigError, InvalidRequest, TriwardError
from ..intake.preprocess import Preprocessor
from ..schema import Features
from ..serving.canary import TOLERANCE
from .prepared import prepared
from .verify import check_device, count_weights, scorer_in

LIMIT = 0.99
LEAST_PAIRS = 100  # of which a hundredth is a pair
BUILT_IN = "built-in"
_NOISE = 2  # times bfloat16's root mean square
_TOLERATED = 4  # times float8's

_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float8")
_TOPICS = (
    "tides", "photosynthesis", "compound interest", "vaccines", "the French Revolution", "magnets",
    "recursion", "volcanoes", "inflation", "sourdough bread", "black holes", "democracy",
    "bicycle gears", "sleep", "prime numbers", "coral reefs",
)  # fmt: skip
_QUESTIONS = ("What should I know about {topic}?", "Explain {topic} to a child in one sentence.")
_ANSWERS = (
    "In short: {topic} can be observed, has causes that are well studied, and matters in daily "
    "life. Which of the three would you like to read more about?",
    "Much could be said about {topic}; the main thing is to look at one example closely.",
    "- what it is: {topic}\n- why it matters: it explains what we see\n- a first step: measure it",
    "It is about {topic}.",
    "I would rather talk about {other}, which is far more interesting than {topic}.",
    "Look it up yourself.",
    "{topic} {topic} {topic} {other} {other} {topic}",
    "当然可以。{topic} ist wie {other}, nur größer!!! :-)",
)


@dataclass(frozen=True)
class PromptRow:
    """A prompt with responses, as a request has them.

    Attributes:
        place: where it is from, for errors.
        messages: JSON.
        responses: at least two.
        media: encoded images.
    """

    place: str
    messages: bytes
    responses: tuple[bytes, ...]
    media: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class OrderKept:
    """The result; a manifest has these fields.

    Attributes:
        source: a file's name, or `BUILT_IN`.
        sha256: of the set.
        device: which computed; on a CPU float8 is emulated.
        pairs: of responses to one prompt.
        clear: those of them that bfloat16 can tell apart.
        agreement: share of the clear pairs that float8 puts into float32's order.
        limit: the least agreement.
        bfloat16_agreement: likewise, bfloat16's.
        rms: root mean square of what float8 changes in float32's margins.
        bfloat16_rms: likewise, bfloat16.
    """

    source: str
    sha256: str
    device: str
    pairs: int
    clear: int
    agreement: float
    limit: float
    bfloat16_agreement: float
    rms: float
    bfloat16_rms: float

    @property
    def agrees(self) -> bool:
        """True if the limit is met by enough pairs to tell."""
        return self.clear >= LEAST_PAIRS and self.agreement >= self.limit

    @property
    def tolerance(self) -> float:
        """How far a served score may be from the one at export.

        Another order of sums may round an activation to its other neighbour in e4m3: two ways of
        computing float8 are as far from each other as from float32.
        """
        return max(TOLERANCE["bfloat16"], _TOLERATED * self.rms)

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"float8 orders {self.agreement:.2%} of {self.clear} clear pairs of responses as "
            f"float32 does ({self.source} set, {self.device}); the limit is {self.limit:.0%}. "
            f"It changes margins by {self.rms:.2g}, bfloat16 by {self.bfloat16_rms:.2g}"
        )


def calibrate(
    checkpoint: Path,
    preprocessor: Preprocessor,
    device: torch.device,
    file: Path | None = None,
    streamed: bool | None = None,
) -> OrderKept:
    """Score a set in three dtypes, one model after the other, and compare.

    Args:
        checkpoint: a folder.
        preprocessor: the checkpoint's.
        device: where the engine runs.
        file: JSONL of the set (`read_prompts`); None: the built-in one.
        streamed: layer by layer; None: where float32 weights do not fit into free memory.

    Raises:
        ConfigError: the file is wrong, by line; or the GPU has no float8.
        NonFiniteScore: a score is not finite in one of the dtypes.
    """
    blueprint = check_tensors(checkpoint)
    rows, source, digest = read_set(file, preprocessor.reads_images)
    batch = [_features(preprocessor, row) for row in rows]
    if streamed is None:
        streamed = not fits(count_weights(blueprint), device)
    margins = {
        dtype: _margins(checkpoint, blueprint, device, streamed, dtype, batch, rows)
        for dtype in _DTYPES
    }
    return OrderKept(source, digest, str(device), **compare_margins(margins))


def compare_margins(margins: Mapping[Dtype, NDArray[np.float64]]) -> dict[str, Any]:
    """Return the figures of `OrderKept` for margins [P] of the same pairs in each dtype."""
    exact = margins["float32"]
    rms = {dtype: float(np.sqrt(np.mean((m - exact) ** 2))) for dtype, m in margins.items()}
    clear = np.abs(exact) > _NOISE * rms["bfloat16"]

    def agreement(dtype: Dtype) -> float:
        same = np.sign(margins[dtype]) == np.sign(exact)
        return float(same[clear].mean()) if clear.any() else 0.0

    return {
        "pairs": len(exact),
        "clear": int(clear.sum()),
        "agreement": agreement("float8"),
        "limit": LIMIT,
        "bfloat16_agreement": agreement("bfloat16"),
        "rms": rms["float8"],
        "bfloat16_rms": rms["bfloat16"],
    }


def require_order(found: OrderKept) -> None:
    """Raise `ConfigError` that names the figure and the limit if float8 does not keep the order."""
    if found.agrees:
        return
    if found.clear < LEAST_PAIRS:
        raise ConfigError(
            f"--dtype float8: {found.clear} of the {found.pairs} pairs of the {found.source} set "
            f"are further apart than bfloat16's noise, at least {LEAST_PAIRS} are needed to tell; "
            "--calibration FILE gives another set"
        )
    raise ConfigError(
        f"--dtype float8 is refused: {found}. --calibration FILE asks your own data, "
        "--dtype bfloat16 needs no calibration"
    )


def calibrate_checkpoint(
    checkpoint: Path, device: str, streamed: bool | None, file: Path | None
) -> OrderKept:
    """`calibrate` for the command `verify`."""
    check_device(device)
    check_tensors(checkpoint)
    with prepared(checkpoint) as folder:
        preprocessor = Preprocessor(folder, PreprocessConfig())
        return calibrate(folder, preprocessor, torch.device(device), file, streamed)


def read_set(file: Path | None, sees: bool) -> tuple[list[PromptRow], str, str]:
    """Return a set's rows, its name and its digest; raises `ConfigError` as `read_prompts` does."""
    if file is None:
        rows = built_in(sees)
        texts = [text for row in rows for text in (row.messages, *row.responses)]
        return rows, BUILT_IN, hashlib.sha256(b"\0".join(texts)).hexdigest()
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"--calibration {file}: {error.strerror}") from None
    return read_prompts(text, file), file.name, hashlib.sha256(text).hexdigest()


def read_prompts(text: bytes, file: Path) -> list[PromptRow]:
    """Return the rows of JSONL: each line has `messages`, of text, and two `responses` or more.

    Raises:
        ConfigError: a line is not of this form, or there is none.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"--calibration {file}: line {number}"
        try:
            row = json.loads(line)
            messages, responses = row["messages"], row["responses"]
            encoded = tuple(response.encode() for response in responses)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{place}: no object with messages and a list of responses: "
                f"{type(error).__name__}: {error}"
            ) from None
        if isinstance(responses, str) or len(responses) < 2:
            raise ConfigError(f"{place}: responses: a list of 2 or more is needed to compare")
        rows.append(PromptRow(place, json.dumps(messages).encode(), encoded))
    if not rows:
        raise ConfigError(f"--calibration {file}: no rows")
    return rows


def built_in(sees: bool) -> list[PromptRow]:
    """Return 32 prompts with 8 responses each; every fourth with an image if the model sees."""
    rows = []
    for index in range(len(_TOPICS) * len(_QUESTIONS)):
        question, topic = divmod(index, len(_TOPICS))
        words = {"topic": _TOPICS[topic], "other": _TOPICS[topic - 5]}
        content: Any = _QUESTIONS[question].format(**words)
        media: tuple[bytes, ...] = ()
        if sees and index % 4 == 0:
            content = [{"type": "image"}, {"type": "text", "text": content}]
            media = (_picture(index),)
        messages = json.dumps([{"role": "user", "content": content}]).encode()
        answers = tuple(answer.format(**words).encode() for answer in _ANSWERS)
        rows.append(PromptRow(f"built-in row {index}", messages, answers, media))
    return rows


def _picture(shift: int) -> bytes:
    y, x = np.mgrid[0:56, 0:84]
    levels = np.stack([x * 3, y * 4 + shift, (x + shift) // 12 % 2 * 255], axis=-1)
    buffer = BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _features(preprocessor: Preprocessor, row: PromptRow) -> Features:
    try:
        return preprocessor.features(row.messages, row.responses, row.media)
    except InvalidRequest as error:
        raise ConfigError(f"{row.place}: {error}") from None


def _margins(
    checkpoint: Path,
    blueprint: Blueprint,
    device: torch.device,
    streamed: bool,
    dtype: Dtype,
    batch: Sequence[Features],
    rows: Sequence[PromptRow],
) -> NDArray[np.float64]:
    """Score in a dtype; return the margins of all pairs, and leave no weights behind."""
    margins = []
    scorer = scorer_in(checkpoint, blueprint, device, streamed, dtype)
    for scored, row in zip(scorer.score(batch), rows, strict=True):
        if isinstance(scored, TriwardError):
            raise type(scored)(f"{row.place}, {dtype}: {scored}")
        scores = scored.scores.astype(np.float64)
        first, second = np.triu_indices(len(scores), 1)
        margins.append(scores[first] - scores[second])
    del scorer
    gc.collect()
    return np.concatenate(margins)
