"""Everything that a caller sends is bounded, before it costs anything; every bound is a flag."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import EXPORT, ROOT, encode
from tests.conversations import picture
from tests.videos import SMALL, film_bytes
from triward_server.config import ForwardConfig, PreprocessConfig, token_limit
from triward_server.engine import geometry
from triward_server.engine.geometry import Geometry
from triward_server.engine.scoring import Scorer
from triward_server.errors import ConfigError, InvalidRequest
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features

ASK = json.dumps([{"role": "user", "content": "word " * 50}]).encode()
LOOK = json.dumps([{"role": "user", "content": [{"type": "image"}] * 2}]).encode()
WATCH = json.dumps([{"role": "user", "content": [{"type": "video", **SMALL}]}]).encode()
WATCH_8 = WATCH.replace(b"}", b', "nframes": 8}', 1)
JPEG = encode(picture(90, 60, 0), "JPEG")
FILM = film_bytes(8)
LIMITS = [f.name for f in fields(PreprocessConfig) if f.name.startswith("max_")]

# For each limit: what is within it, and what is just beyond it with the words of the error.
CASES: dict[str, tuple[dict[str, Any], tuple[Any, ...], tuple[Any, ...], str]] = {
    "responses": (
        {"max_responses": 2}, (ASK, [b"a", b"b"], []), (ASK, [b"a"] * 3, []),
        "responses: 3 responses, the limit is 2",
    ),
    "bytes of messages": (
        {"max_text_bytes": len(ASK)}, (ASK, [b"a"], []), (ASK + b" ", [b"a"], []),
        f"messages: {len(ASK) + 1} bytes, the limit is {len(ASK)}",
    ),
    "bytes of responses": (
        {"max_text_bytes": 300}, (ASK, [b"x" * 100, b"y" * 200], []),
        (ASK, [b"x" * 100, b"y" * 201], []), "responses: 301 bytes in all, the limit is 300",
    ),
    "parts": (
        {"max_parts": 3}, (LOOK, [b"a"], [JPEG] * 2),
        (json.dumps([{"role": "user", "content": [{"type": "text", "text": ""}] * 3}]).encode(),
         [b"a"], []), "messages: 4 messages and parts, the limit is 3",
    ),
    "media": (
        {"max_media": 2}, (LOOK, [b"a"], [JPEG] * 2), (LOOK, [b"a"], [JPEG] * 3),
        "media: 3 entries, the limit is 2",
    ),
    "bytes of one media": (
        {"max_media_bytes": len(JPEG)}, (LOOK, [b"a"], [JPEG] * 2),
        (LOOK, [b"a"], [JPEG, JPEG + b"."]),
        rf"media\[1\]: {len(JPEG) + 1} bytes, the limit is {len(JPEG)}",
    ),
    "bytes of all media": (
        {"max_request_bytes": 2 * len(JPEG)}, (LOOK, [b"a"], [JPEG] * 2),
        (LOOK, [b"a"], [JPEG, JPEG + b"."]),
        rf"media: {2 * len(JPEG) + 1} bytes in all, the limit is {2 * len(JPEG)}",
    ),
    "pixels": (
        {"max_image_pixels": 5400}, (LOOK, [b"a"], [JPEG] * 2),
        (LOOK, [b"a"], [JPEG, encode(picture(90, 61, 0))]),
        r"media\[1\]: 90 x 61 pixels are 5490, the limit is 5400",
    ),
    "frames of a video": (
        {"max_video_frames": 4}, (WATCH, [b"a"], [FILM]), (WATCH_8, [b"a"], [FILM]),
        r"media\[0\]: 8 of its frames are asked for, the limit is 4",
    ),
    "frames of a list": (
        {"max_video_frames": 4}, (WATCH, [b"a"], [FILM]),
        (WATCH.replace(b"}", b', "frames": 5}', 1), [b"a"], [JPEG] * 5),
        r"messages\[0\].content\[0\].frames: 5 frames, the limit is 4",
    ),
    "pixels of all frames": (
        {"max_video_pixels": 4 * 84 * 112}, (WATCH, [b"a"], [FILM]), (WATCH_8, [b"a"], [FILM]),
        rf"media\[0\]: the media take {8 * 84 * 112} pixels of video up to here, "
        rf"the limit is {4 * 84 * 112}",
    ),
    "tokens of a conversation": (
        {"max_tokens": 300}, (ASK, [b"a"], []), (ASK, [b"a", b"word " * 60], []),
        r"responses\[1\]: the conversation has \d+ tokens .* the limit is 300",
    ),
    "tokens of images": (
        {"max_tokens": 40}, (b"[]", [b""], []),
        (LOOK.replace(b"]}]", b', {"type": "image"}' * 6 + b"]}]"), [b"a"], [JPEG] * 8),
        r"media\[6\]: the media take 42 tokens up to here, the limit is 40",
    ),
    "tokens of a request": (
        {"max_request_tokens": 300}, (ASK, [b"a"] * 3, []), (ASK, [b"word " * 20] * 10, []),
        r"responses: with its prompt of \d+ tokens the request has \d+, the limit is 300",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_at_the_limit_and_beyond(name: str, checkpoint: Path) -> None:
    limits, within, beyond, words = CASES[name]
    preprocessor = Preprocessor(checkpoint, PreprocessConfig(**limits))
    assert preprocessor.features(*within).response_ids
    with pytest.raises(InvalidRequest, match=f"^{words}$"):
        preprocessor.features(*beyond)


def test_every_limit_has_a_case() -> None:
    tested = {key for limits, *_ in CASES.values() for key in limits}
    assert set(LIMITS) - tested == {"max_decode_seconds"}, "that one is in test_media.py"


def test_every_limit_has_a_flag_and_a_line_in_the_docs() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    help_ = subprocess.run(
        [sys.executable, EXPORT, "--help"], capture_output=True, text=True, timeout=120,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout  # fmt: skip
    names = {*LIMITS, *(f.name for f in fields(ForwardConfig) if f.name.startswith("max_"))}
    for name in (*names, "max_queue_size", "queue_timeout_ms"):
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"{flag}\b", help_), flag
        assert re.search(rf"^\| `{flag}` \| [\d,.]+[^|]* \|", text, re.MULTILINE), flag


def test_documented_defaults_are_the_real_ones() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    defaults = {**vars(ForwardConfig()), **vars(PreprocessConfig())}
    rows = dict(re.findall(r"^\| `--(max-[\w-]+)` \| ([\d,.]+)", text, re.MULTILINE))
    for name, value in defaults.items():
        if name.startswith("max_"):
            assert float(rows[name.replace("_", "-")].replace(",", "")) == float(value), name


@pytest.mark.parametrize(
    ("limits", "lengths", "words"),
    [
        ({"max_responses": 3}, [2, 1, 1, 1, 1], "segment_lengths: 4 responses, the limit is 3"),
        ({"max_request_tokens": 9}, [4, 3, 3], "input_ids: the request has 10 tokens, the limit"),
        ({"max_tokens": 6}, [4, 2, 3], "input_ids: a conversation of 7 tokens, the limit is 6"),
    ],
)
def test_tensors_are_bounded_too(
    limits: dict[str, int], lengths: list[int], words: str, checkpoint: Path
) -> None:
    """Who calls `reward_forward` directly comes past the limits of preprocessing."""
    parts = [np.ones(n, np.int32) for n in lengths]
    config = ForwardConfig(dtype="float32", device="cpu", **limits)
    [result] = Scorer(checkpoint, config).score([Features(parts[0], tuple(parts[1:]))])
    assert isinstance(result, InvalidRequest) and str(result).startswith(words)


def test_the_number_of_responses_is_checked_before_they_are_joined() -> None:
    class Endless(tuple):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 10**9

        def __iter__(self) -> Any:
            raise AssertionError("they were looked at")

    features = Features(np.ones(2, np.int32), Endless())
    with pytest.raises(InvalidRequest, match="1000000000 responses"):
        geometry.check(features, Geometry(9, 14, 2, 100, 1000), ForwardConfig())


@pytest.mark.parametrize("make", [Preprocessor, Scorer])
def test_more_tokens_than_positions(make: Callable[..., Any], checkpoint: Path) -> None:
    config = (
        PreprocessConfig(max_tokens=10**6)
        if make is Preprocessor
        else ForwardConfig(dtype="float32", device="cpu", max_tokens=10**6)
    )
    with pytest.raises(ConfigError, match="max_tokens 1000000, the model has 16384 positions"):
        make(checkpoint, config)


def test_no_limit_is_the_models() -> None:
    assert (token_limit(0, 500), token_limit(30, 500), token_limit(500, 500)) == (500, 30, 500)


def test_a_deep_message_ends_before_it_is_built(checkpoint: Path) -> None:
    """The contract nests four deep; the parser stops far below any stack's end."""
    preprocessor = Preprocessor(checkpoint, PreprocessConfig())
    for opening in (b"[", b'{"a":', b'[{"role":"user","content":[', b'[{"role":"user","x":['):
        with pytest.raises(InvalidRequest, match=r"^messages"):
            preprocessor.features(opening * 100_000, [b"a"], [])
