"""A trainer's own token ids and pixels over gRPC: the model card's score, without preprocessing."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import Command
from tests.conftest import ROOT
from tests.conversations import Messages, image, picture, says, user
from tests.videos import frames, video
from triward import (
    AsyncRewardClient,
    InvalidRequest,
    RewardClient,
    ServerUnavailable,
    TriwardError,
    pixels_of,
)
from triward_server.serving.launch import TritonServer
from triward_server.testing.oracle import Oracle, fp32_budget

Metric = Callable[[str, str], float]


@dataclass(frozen=True)
class Encoded:
    """Conversations with one prompt, as the card's processor has them: ids and pixels."""

    prompt_ids: np.ndarray
    response_ids: list[np.ndarray]
    media: list[np.ndarray]


def encoded(oracle: Oracle, conversations: Sequence[Messages]) -> Encoded:
    """What a trainer has after the processor; the prompt is what all conversations begin with."""
    batches = [oracle.inputs([messages]) for messages in conversations]
    rows = [batch["input_ids"][0].numpy() for batch in batches]
    shared = min(map(len, rows)) - 1
    for row in rows:
        differ = np.flatnonzero(row[:shared] != rows[0][:shared])
        shared = int(differ[0]) if len(differ) else shared
    media = []
    if "pixel_values" in batches[0]:
        media = pixels_of(batches[0]["pixel_values"], batches[0]["image_grid_thw"])
    return Encoded(rows[0][:shared], [row[shared:] for row in rows], media)


def score(client: RewardClient, given: Encoded) -> list[float]:
    return client.score_tokens(given.prompt_ids, given.response_ids, media=given.media)


def groups() -> dict[str, tuple[Messages, list[str]]]:
    """Prompts with several responses."""
    first, second, tall = picture(140, 112, 21), picture(84, 196, 22), picture(60, 300, 23)
    rules = {"role": "system", "content": "You are a strict judge."}
    answers = ["The answer is: B", "No.", "", "The answer is: B, since purple is highest. " * 20]
    return {
        "text": ([user("Is it so?")], answers),
        "an image": ([user(image(first), "What is it?")], answers),
        "two images": ([user(image(first), "or", image(second), "?")], answers[:3]),
        "turns": ([rules, user(image(tall), "?"), says("Bars."), user(image(first), "?")], answers),
        "eight": ([user(image(second), "Count.")], [f"{n} and {n * n}" for n in range(8)]),
        "equal": ([user(image(second), "Again?")], ["Yes.", "Yes.", "Yes."]),
    }  # fmt: skip


def test_single_conversations_score_as_the_cards(
    client: RewardClient, oracle: Oracle, cases: dict[str, Messages]
) -> None:
    """One in three of the parity suite: formats, sizes, turns, pixel limits, odd texts."""
    names = [name for name in cases if not name.startswith("size/2000")][::3]
    assert len(names) >= 20
    pictures = 0
    for name in names:
        given = encoded(oracle, [cases[name]])
        pictures += len(given.media)
        expected = oracle.score(cases[name])
        [got] = score(client, given)
        assert abs(got - expected) <= fp32_budget(expected), name
    assert pictures >= 10


@pytest.mark.parametrize("name", groups())
def test_groups_score_as_the_cards(name: str, client: RewardClient, oracle: Oracle) -> None:
    prompt, responses = groups()[name]
    conversations = [[*prompt, says(text)] for text in responses]
    given = encoded(oracle, conversations)
    expected = [oracle.score(messages) for messages in conversations]
    scores = score(client, given)
    for got, wanted in zip(scores, expected, strict=True):
        assert abs(got - wanted) <= fp32_budget(wanted)
    assert scores == pytest.approx(client.score_responses(prompt, responses), rel=1e-5, abs=1e-5)


def test_a_video_scores_as_the_cards(client: RewardClient, oracle: Oracle) -> None:
    """Frames from the processor's own values; another frame rate is another score."""
    messages = [user(video(frames(6, 112, 84)), "What happens?"), says("It moves.")]
    batch = oracle.inputs([messages])
    ids = batch["input_ids"][0].numpy()
    (clip,) = pixels_of(batch["pixel_values_videos"], batch["video_grid_thw"], video=True)
    assert clip.ndim == 4 and len(clip) == 6
    expected = oracle.score(messages)
    (seconds,) = batch["second_per_grid_ts"]

    def ask(seconds: float) -> float:
        return client.score_tokens(ids[:-5], [ids[-5:]], media=[clip], seconds_per_grid=[seconds])[
            0
        ]

    assert abs(ask(float(seconds)) - expected) <= fp32_budget(expected)
    assert abs(ask(20.0) - expected) > 10 * fp32_budget(expected)
    with pytest.raises(InvalidRequest, match=r"^seconds_per_grid: .* 1 videos"):
        client.score_tokens(ids[:-5], [ids[-5:]], media=[clip])


def test_many_at_once_from_threads(client: RewardClient, oracle: Oracle) -> None:
    given, expected = [], []
    for prompt, responses in groups().values():
        conversations = [[*prompt, says(text)] for text in responses]
        given.append(encoded(oracle, conversations))
        expected.append(score(client, given[-1]))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, alone in zip(
                pool.map(lambda g: score(client, g), given), expected, strict=True
            ):
                assert got == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_where_the_prompt_ends_changes_nothing(client: RewardClient, oracle: Oracle) -> None:
    [row] = encoded(oracle, [[user("Is it so?"), says("Yes.")]]).response_ids
    whole = encoded(oracle, [[user("Is it so?"), says("Yes.")]])
    row = np.concatenate([whole.prompt_ids, row])
    scores = [client.score_tokens(row[:cut], [row[cut:]])[0] for cut in (0, 1, 5, len(row) - 1)]
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("what", ["order of images", "one image", "one token", "last token"])
def test_controls_that_must_fail(what: str, client: RewardClient, oracle: Oracle) -> None:
    """What the server is given decides: with a wrong input the card's score is missed."""
    same = picture(112, 84, 31), picture(112, 84, 32)
    messages = [user(image(same[0]), "or", image(same[1]), "?"), says("The first one.")]
    given, expected = encoded(oracle, [messages]), oracle.score(messages)
    [row] = given.response_ids
    prompt, media = given.prompt_ids.copy(), list(given.media)
    assert abs(score(client, given)[0] - expected) <= fp32_budget(expected)
    if what == "order of images":
        media.reverse()
    elif what == "one image":
        media[1] = 255 - media[1]
    elif what == "one token":
        prompt[-1] += 1
    else:
        prompt, row = prompt[:-1], prompt[-1:]
    [got] = client.score_tokens(prompt, [row], media=media)
    assert abs(got - expected) > fp32_budget(expected)


@pytest.fixture(scope="module")
def shown(oracle: Oracle) -> Encoded:
    return encoded(oracle, [[user(image(picture(140, 112, 41)), "?"), says("Yes.")]])


def test_what_only_the_server_can_know_is_named(client: RewardClient, shown: Encoded) -> None:
    ids, answers, media = shown.prompt_ids, shown.response_ids, shown.media
    pad = ids[np.bincount(ids).argmax() == ids][0]
    first = int(np.flatnonzero(ids == pad)[0])
    for prompt, responses, given, field in (
        (np.delete(ids, first), answers, media, "input_ids|grids"),
        (ids, answers, [], "input_ids|grids"),
        (ids, answers, media * 2, "input_ids|grids"),
        (ids, [np.append(answers[0], pad)], media, "input_ids|grids|segment_lengths"),
        (ids, [[2**31 - 1]], media, "input_ids"),
        (ids, [[1]] * 257, media, "segment_lengths: 257 responses, the limit is 256"),
    ):
        with pytest.raises(InvalidRequest, match=f"^({field})"):
            client.score_tokens(prompt, responses, media=given)
    assert len(client.score_tokens(ids, answers, media=media)) == 1


def test_it_is_counted_and_preprocessing_is_not_asked(
    client: RewardClient, shown: Encoded, metric: Metric
) -> None:
    def read() -> list[float]:
        return [
            metric("triward_conversations_total", "reward_forward"),
            metric("nv_inference_request_success", "reward_forward"),
            metric("nv_inference_request_success", "reward_preprocess"),
        ]

    before = read()
    client.score_tokens(shown.prompt_ids, shown.response_ids * 3, media=shown.media)
    assert [now - then for now, then in zip(read(), before, strict=True)] == [3, 1, 0]


def test_in_asyncio(client: RewardClient, server: TritonServer, shown: Encoded) -> None:
    async def ask() -> list[list[float]]:
        async with AsyncRewardClient(server.endpoints.grpc, timeout=60) as asking:
            calls = [
                asking.score_tokens(shown.prompt_ids, shown.response_ids, media=shown.media)
                for _ in range(5)
            ]
            return await asyncio.gather(*calls)

    expected = score(client, shown)
    assert asyncio.run(ask()) == [pytest.approx(expected, rel=1e-5)] * 5


def test_the_documented_example(
    oracle: Oracle, checkpoint: Path, server: TritonServer, tmp_path: Path
) -> None:
    """As it stands in docs/client.md, against the card's code on the same messages."""
    page = (ROOT / "docs" / "client.md").read_text()
    section = page.split("\n## Token ids instead of text\n")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    code = code.replace("Skywork/Skywork-VL-Reward-7B", str(checkpoint))
    code = code.replace("rewards:8001", server.endpoints.grpc)
    file = tmp_path / "image.png"
    picture(140, 112, 51).save(file)
    names: dict[str, Any] = {"image": picture(140, 112, 51)}
    exec(code, names)
    for got, text in zip(names["scores"], names["answers"], strict=True):
        expected = oracle.score([user(image(str(file)), "Which month?"), says(text)])
        assert abs(got - expected) <= fp32_budget(expected)


def test_told_to_stop(
    serve: Callable[..., Command], client: RewardClient, repository: Path
) -> None:
    """Direct calls that are in flight end with their score or as unavailable, never otherwise."""
    prompts = [np.random.default_rng(n).integers(20, 250, 1500) for n in range(6)]
    running = serve("--drain-timeout=100", repository=repository)
    url = running.wait_for(r"ready\s+grpc\s+(127.0.0.1:\d+)")[1]

    def ask(prompt: np.ndarray) -> float | TriwardError:
        try:
            with RewardClient(url, timeout=60, max_attempts=1) as asking:
                return asking.score_tokens(prompt, [[9, 8, 7]])[0]
        except TriwardError as error:
            return error

    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(ask, prompts[0])
        rest = [pool.submit(ask, prompt) for prompt in prompts[1:]]
        first.result(timeout=60)
        os.kill(running.process.pid, signal.SIGTERM)
        answers = [call.result(timeout=60) for call in rest]
    assert running.wait() == 0
    for prompt, answer in zip(prompts[1:], answers, strict=True):
        if isinstance(answer, TriwardError):
            assert isinstance(answer, ServerUnavailable), answer
        else:
            assert answer == pytest.approx(client.score_tokens(prompt, [[9, 8, 7]])[0], rel=1e-5)
