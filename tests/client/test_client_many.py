"""score_many: order, groups, errors in place, what is read, what is kept."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests.client.helpers import conversation, watched
from tests.fakeserver import Fault
from triward import (
    AsyncRewardClient,
    InvalidRequest,
    MediaError,
    RewardClient,
    ServerError,
    ServerUnavailable,
    TriwardError,
)
from triward.conversation import MediaRef
from triward.grouping import MAX_GROUP
from triward.shelf import Shelf


@pytest.fixture(params=["blocking", "asyncio"])
def score_many(request, server):
    """Either client's method, as a blocking function."""

    def blocking(conversations, **options):
        with RewardClient(server.url, max_attempts=1) as client:
            return client.score_many(conversations, **options)

    def in_event_loop(conversations, **options):
        async def ask():
            async with AsyncRewardClient(server.url, max_attempts=1) as client:
                return await client.score_many(conversations, **options)

        return asyncio.run(ask())

    return blocking if request.param == "blocking" else in_event_loop


def test_neighbours_with_one_prompt_travel_together(server, score_many):
    calls = watched(server)
    prompts = "aaabbab"
    scores = score_many([conversation("x" * i, prompt) for i, prompt in enumerate(prompts)])
    assert scores == [float(i) for i in range(len(prompts))]
    assert sorted(len(call.responses) for call in calls) == [1, 1, 2, 3]


def test_a_group_has_an_upper_bound(server, score_many):
    calls = watched(server)
    assert score_many([conversation("r")] * (2 * MAX_GROUP + 1)) == [1.0] * (2 * MAX_GROUP + 1)
    assert sorted(len(call.responses) for call in calls) == [1, MAX_GROUP, MAX_GROUP]


@pytest.mark.parametrize("same", [True, False])
def test_images_are_part_of_the_prompt(server, score_many, same, tmp_path):
    calls = watched(server)
    red, blue = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    pairs = [(red, red if same else blue), (b"one", b"one" if same else b"two")]
    for index, (first, second) in enumerate(pairs):
        score_many([conversation("r", image=first), conversation("r", image=second)])
        assert len(calls) == (1 if same else 2), f"pair {index}"
        calls.clear()


def test_the_order_is_kept_whatever_finishes_first(server, score_many):
    server.delay = 0.002
    texts = ["x" * (index * 7 % 50) for index in range(300)]
    conversations = [conversation(text, f"q{i // 3}") for i, text in enumerate(texts)]
    assert score_many(conversations, concurrency=7) == [float(len(text)) for text in texts]
    assert server.peak <= 7


def test_errors_stand_in_their_items_places(server, score_many):
    server.fault = lambda call: Fault.INVALID_ARGUMENT if b"bad" in call.responses else None
    scores = score_many(
        [
            conversation("one", "p"),
            conversation("bad", "p"),
            conversation("three", "p"),
            [{"role": "user", "content": "no answer"}],
            conversation("r", image="gone.png"),
            "not a list",
            conversation("seven"),
        ],
        on_error="return",
    )
    assert [score for score in scores if isinstance(score, float)] == [3.0, 5.0, 5.0]
    assert [type(scores[i]) for i in (1, 3, 4, 5)] == [
        InvalidRequest, InvalidRequest, MediaError, InvalidRequest,
    ]  # fmt: skip
    for index in (1, 3, 4, 5):
        assert str(scores[index]).startswith(f"conversations[{index}]: ")


def test_a_group_shares_a_servers_failure(server, score_many):
    """It is not asked again for each: that would be a herd."""
    server.fault = lambda call: Fault.UNAVAILABLE
    scores = score_many([conversation("r")] * 5, on_error="return")
    assert [type(score) for score in scores] == [ServerUnavailable] * 5
    assert server.calls == 1


def test_a_score_that_is_not_finite_is_one_conversations_alone(server, score_many):
    server.fault = lambda call: Fault.NAN if b"nan" in call.responses else None
    scores = score_many([conversation(text) for text in ("ok", "nan", "fine")], on_error="return")
    assert (scores[0], scores[2]) == (2.0, 4.0)
    assert isinstance(scores[1], ServerError)


def test_the_first_failure_in_order_is_raised(server, score_many):
    server.fault = lambda call: Fault.INTERNAL if b"bad" in call.responses else None
    texts = ["ok", "ok", "bad", "ok", "bad", *["late"] * 200]
    conversations = [conversation(text, f"q{i}") for i, text in enumerate(texts)]
    with pytest.raises(ServerError, match=r"^conversations\[2\]: "):
        score_many(conversations, concurrency=2)
    assert server.calls < 20


def test_a_failing_iterable_is_the_callers(server, score_many):
    def conversations():
        yield conversation("r")
        yield conversation("r", "another")
        raise KeyError("the caller's")

    with pytest.raises(KeyError, match="the caller's"):
        score_many(conversations())


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"on_error": "ignore"}, {"timeout": 0}])
def test_wrong_options(server, score_many, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        score_many([], **options)
    assert server.calls == 0


def test_a_file_is_read_once(server, score_many, tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    Image.new("RGB", (9, 9)).save(path)
    reads, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read(self))
    conversations = [conversation("r", f"q{i}", str(path)) for i in range(40)]
    assert score_many(conversations) == [1.0] * 40
    assert reads == [path]


def test_frames_of_a_video_are_read_once(server, score_many, tmp_path, monkeypatch):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path in paths:
        Image.new("RGB", (9, 9)).save(path)
    reads, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read(self))
    shown = {"type": "video", "video": [str(path) for path in paths]}
    prompts = [{"role": "user", "content": [shown, {"type": "text", "text": q}]} for q in "ab"]
    answer = {"role": "assistant", "content": "r"}
    assert score_many([[prompts[i % 2], answer] for i in range(20)]) == [1.0] * 20
    assert sorted(reads) == paths


def test_an_image_is_encoded_once(score_many, monkeypatch):
    image, saves = Image.new("RGB", (9, 9)), []
    save = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda self, *a, **k: saves.append(self) or save(self, *a, **k)
    )
    score_many([conversation("r", f"q{i}", image) for i in range(40)])
    assert len(saves) == 1


def test_images_are_weighed_with_their_pixels(deadline):
    """Or a stream of images that compress well would fill the memory."""
    shelf = Shelf(max_bytes=1_000_000)
    images = [Image.new("RGBA", (300, 300)) for _ in range(20)]
    for image in images:
        shelf.read(MediaRef("here", image), deadline)
    assert 1 <= len(shelf._kept) <= 2
    assert shelf._reading == {}


def test_a_slow_file_holds_up_nobody_else(deadline, web, deliver):
    released = threading.Event()

    def answer(handler):
        assert released.wait(30)
        deliver(b"slow")(handler)

    shelf, slow = Shelf(), MediaRef("here", web("/slow", answer))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(shelf.read, slow, deadline) for _ in range(2)]
        for index in range(200):
            ref = MediaRef("here", Image.new("1", (1, 1 + index)))
            assert shelf.read(ref, deadline)
        released.set()
        assert [each.result(30) for each in waiting] == [b"slow", b"slow"]


def test_a_missing_file_is_looked_for_once(server, score_many, monkeypatch):
    looks, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **k: looks.append(self) or stat(self, **k))
    group = [conversation(str(i), image="gone.png") for i in range(32)]
    scores = score_many(group, on_error="return")
    assert [type(score) for score in scores] == [MediaError] * 32
    assert [str(score).partition(":")[0] for score in scores] == [
        f"conversations[{i}]" for i in range(32)
    ]
    assert len([look for look in looks if look.name == "gone.png"]) == 1


def test_a_group_that_breaks_up_ends_with_the_first_failure(server, score_many):
    server.fault = lambda call: Fault.INTERNAL if len(call.responses) > 1 else Fault.UNAVAILABLE
    group = [conversation(str(i)) for i in range(20)]
    scores = score_many(group, on_error="return")
    assert [type(score) for score in scores] == [ServerUnavailable] * 20
    assert str(scores[19]).startswith("conversations[19]: ")
    assert server.calls == 2
    server.fault = lambda call: Fault.INTERNAL
    with pytest.raises(ServerError, match=r"^conversations\[0\]: "):
        score_many(group)
    assert server.calls == 4


def test_another_call_reads_again(server, tmp_path):
    calls = watched(server)
    path = tmp_path / "image"
    with RewardClient(server.url) as client:
        for content in (b"first", b"second"):
            path.write_bytes(content)
            client.score_many([conversation("r", image=str(path))])
    assert [call.media for call in calls] == [[b"first"], [b"second"]]


def test_results_come_while_conversations_are_taken(server):
    """What is ahead of the results is bounded, so that neither side need fit into memory."""
    taken = [0]

    def conversations():
        for index in range(2000):
            taken[0] += 1
            yield conversation("r", f"q{index}")

    with RewardClient(server.url) as client:
        for done, score in enumerate(client.iter_scores(conversations(), concurrency=4)):
            assert score == 1.0
            assert taken[0] - done <= 2 * 4 + 3


def test_a_reader_that_stops_leaves_no_threads(server):
    with RewardClient(server.url) as client:
        scores = client.iter_scores([conversation("r", f"q{i}") for i in range(1000)])
        assert next(scores) == 1.0
        scores.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("triward")]
    assert server.calls < 200


def test_a_cancelled_task_cancels_its_calls(server):
    server.delay = 0.5

    async def ask():
        async with AsyncRewardClient(server.url) as client:
            many = asyncio.ensure_future(
                client.score_many([conversation("r", f"q{i}") for i in range(500)], concurrency=4)
            )
            while server.calls < 4:
                await asyncio.sleep(0.01)
            many.cancel()
            with pytest.raises(asyncio.CancelledError):
                await many
            return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}

    left = asyncio.run(ask())
    assert not [task for task in left if "score" in repr(task)]
    assert server.calls < 20


def test_the_event_loop_stays_responsive(server):
    """Another task runs many times while conversations are sent."""
    server.delay = 0.001

    async def ask():
        turns = 0

        async def tick():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticking = asyncio.ensure_future(tick())
        async with AsyncRewardClient(server.url) as client:
            await client.score_many([conversation("r", f"q{i}") for i in range(500)])
        ticking.cancel()
        return turns

    assert asyncio.run(ask()) > 500


def test_a_progress_bar_on_request(server, score_many, capsys):
    score_many([conversation("r", f"q{i}") for i in range(5)])
    assert capsys.readouterr().err == ""
    score_many([conversation("r", f"q{i}") for i in range(5)], progress=True)
    assert "5/5" in capsys.readouterr().err


HUNDRED_THOUSAND = """
import resource, sys
from triward import RewardClient

def conversation(index):
    prompt = {"role": "user", "content": f"question {index // 8}"}
    return [prompt, {"role": "assistant", "content": "x" * (index % 50)}]

with RewardClient(sys.argv[1]) as client:
    scores = client.iter_scores(conversation(index) for index in range(100_000))
    for index, score in enumerate(scores):
        assert score == index % 50, (index, score)
        if index in (19_999, 99_999):
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(index)
"""


def test_a_hundred_thousand_conversations_in_bounded_memory(server_process):
    """The peak after all of them is the peak after a fifth; in a process with nothing else."""
    command = [sys.executable, "-c", HUNDRED_THOUSAND, server_process]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    early, late, last = map(int, done.stdout.split() or [0, 0, done.stderr])
    assert last == 99_999
    assert late - early < 8 * 1024  # KiB; 80,000 kept conversations would be 60 MB and more


def test_every_outcome_is_a_finite_float_or_an_error(server, score_many):
    faults = [None, Fault.NAN, Fault.INTERNAL, Fault.WRONG_COUNT, Fault.UNAVAILABLE]
    server.fault = lambda call: faults[call.number % len(faults)]
    outcomes = score_many([conversation("r", f"q{i}") for i in range(100)], on_error="return")
    assert len(outcomes) == 100
    scored = [outcome for outcome in outcomes if not isinstance(outcome, TriwardError)]
    assert scored == [1.0] * len(scored)
    assert 0 < len(scored) < 100
