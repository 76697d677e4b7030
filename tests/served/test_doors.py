"""The gateway's doors through a real Triton: the rewards are gRPC's, bit for bit."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.conftest import Served
from tests.conversations import picture

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.tools.gateways import (
    MESSAGES,
    PROMPT,
    Doorway,
    data_url,
    running,
    says,
    shows,
)


@pytest.fixture(scope="module")
def exact(served: Callable[..., Served]) -> Served:
    """A model whose scores do not depend on what was asked before, in their last bit either."""
    return served("exact", "--deterministic")


@pytest.fixture(scope="module")
def door(exact: Served) -> Iterator[Doorway]:
    name = exact.names.ensemble
    with running(exact.server.endpoints.grpc, timeout=120.0, models=(name,)) as doorway:
        yield doorway


@pytest.fixture(scope="module")
def shown() -> bytes:
    buffer = io.BytesIO()
    picture(60, 48, 1).save(buffer, "PNG")
    return buffer.getvalue()


def test_texts_have_grpcs_rewards(door: Doorway, exact: Served) -> None:
    client = exact.client
    (expected,) = client.score_responses(MESSAGES, ["Two."])
    asked = {
        "/get_reward": {"query": [PROMPT + "Two.<|im_end|>"], "prompts": [PROMPT]},
        "/v1/score/evaluation": {"model": "model", "messages": [PROMPT + "Two.<|im_end|>"]},
        "/remote_rm": {"prompt": PROMPT, "response": "Two.", "label": "2"},
        "/classify": {"model": exact.names.ensemble, "input": PROMPT + "Two.<|im_end|>\n"},
        "/pooling": {"messages": [*MESSAGES, says("Two.")]},
    }
    answers = {path: door.ask(path, body)[1] for path, body in asked.items()}
    found = [
        answers["/get_reward"]["rewards"][0],
        answers["/v1/score/evaluation"]["scores"][0],
        answers["/remote_rm"],
        answers["/classify"]["data"][0]["probs"][0],
        answers["/pooling"]["data"][0]["data"][0],
        door.ask("/classify", {"text": PROMPT + "Two.<|im_end|>"})[1]["embedding"][0],
    ]
    assert found == [expected] * len(found)
    pair = [{"role": "user", "content": "Why?"}, says("So.")]
    score = door.ask("/score", {"text_1": "Why?", "text_2": "So."})[1]["data"][0]["score"]
    assert score == client.score(pair)


def test_images_have_grpcs_rewards(door: Doorway, exact: Served, shown: bytes) -> None:
    url = data_url(shown)
    question = [{"type": "image", "image": shown}, {"type": "text", "text": "What is it?"}]
    expected = exact.client.score([{"role": "user", "content": question}, says("A field.")])
    body = {"messages": [shows(url), says("A field.")]}
    assert door.ask("/classify", body)[1]["data"][0]["probs"] == [expected]
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    text = f"<|im_start|>user\n{place}What is it?<|im_end|>\n<|im_start|>assistant\nA field."
    asked = {"text": system + text, "image_data": url}
    assert door.ask("/classify", asked)[1]["embedding"] == [expected]
    slime = {"prompt": [shows(url)], "response": "A field."}
    assert door.ask("/remote_rm", slime)[1] == expected


def test_16_callers_at_once_have_grpcs_rewards(door: Doorway, exact: Served, shown: bytes) -> None:
    """Through every kind of door, with and without images; nobody gets another's."""
    question = [{"type": "image", "image": shown}, {"type": "text", "text": "What is it?"}]
    texts = ["Two." + " Two." * n for n in range(16)]
    expected = exact.client.score_responses(MESSAGES, texts)
    pictured = [{"role": "user", "content": question}]
    expected_shown = exact.client.score_responses(pictured, texts)
    together = threading.Barrier(16, timeout=60)

    def call(n: int) -> list[float]:
        together.wait()
        others = [texts[n], texts[15 - n]]
        body = {"query": [PROMPT + text for text in others], "prompts": [PROMPT] * 2}
        found = list(door.ask("/get_reward", body)[1]["rewards"])
        messages = {"messages": [shows(data_url(shown)), says(texts[n])]}
        found += door.ask("/classify", messages)[1]["data"][0]["probs"]
        found.append(door.ask("/remote_rm", {"prompt": PROMPT, "response": texts[n]})[1])
        return found

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(call, range(16)))
    assert found == [
        [expected[n], expected[15 - n], expected_shown[n], expected[n]] for n in range(16)
    ]
    assert len(set(expected)) > 8, "the rewards tell nothing apart"


def test_an_image_that_would_fill_the_memory_is_refused(door: Doorway, shown: bytes) -> None:
    """A few bytes that say they are 3.6 billion pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(chunk[4:]))
    bomb += b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    status, answer = door.ask("/classify", {"messages": [shows(data_url(bomb)), says("a")]})
    assert (status, answer["error"]["type"]) == (400, "InvalidRequest")
    good = {"messages": [shows(data_url(shown)), says("a")]}
    assert Image.open(io.BytesIO(shown)).size == (60, 48)
    assert door.ask("/classify", good)[0] == 200
