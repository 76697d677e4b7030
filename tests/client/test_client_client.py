from __future__ import annotations

import inspect
import json
import socket
import threading

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

import triward.deadline
from tests.client.helpers import conversation, failure, raising
from triward import (
    DeadlineExceeded,
    InvalidRequest,
    MediaError,
    RewardClient,
    ServerError,
    ServerUnavailable,
)

PROMPT = [{"role": "user", "content": "q"}]


def alone(response):
    """A conversation whose prompt no other has: nothing travels with it."""
    alone.count += 1
    prompt = {"role": "user", "content": f"question {alone.count}"}
    return [prompt, {"role": "assistant", "content": response}]


alone.count = 0


def test_score(client, transport):
    assert client.score(conversation("four")) == 4.0
    (call,) = transport.calls
    sent = transport.sent(call)
    assert call["model_name"] == "reward"
    assert json.loads(sent["messages"][1][0]) == PROMPT
    assert sent["messages"][0] == [1, 1]
    assert sent["responses"] == ([1, 1], [b"four"])
    assert sent["media"] == ([1, 0], [])


def test_score_responses_is_one_request(client, transport):
    assert client.score_responses(PROMPT, ["a", "", "ccc"]) == [1.0, 0.0, 3.0]
    assert len(transport.calls) == 1


def test_media_are_sent(client, transport):
    part = {"type": "image", "image": b"PNG\0", "max_pixels": 9}
    client.score_responses([{"role": "user", "content": [part]}], ["a"])
    sent = transport.sent(transport.calls[0])
    assert sent["media"] == ([1, 1], [b"PNG\0"])
    assert json.loads(sent["messages"][1][0])[0]["content"] == [{"type": "image", "max_pixels": 9}]


def test_rank_is_best_first_and_stable(client, transport):
    assert client.rank(PROMPT, ["aa", "b", "cccc", "dd", "e"]) == [2, 0, 3, 1, 4]


def test_compare_is_strict(client, transport):
    assert client.compare(PROMPT, "long", "no") is True
    assert client.compare(PROMPT, "no", "long") is False
    assert client.compare(PROMPT, "same", "same") is False
    assert len(transport.calls) == 3


def test_another_model(transport):
    RewardClient(model="other", _transport=transport).score(conversation("r"))
    assert transport.calls[0]["model_name"] == "other"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (failure("INVALID_ARGUMENT"), InvalidRequest),
        (failure("UNAVAILABLE"), ServerUnavailable),
        (failure("DEADLINE_EXCEEDED"), DeadlineExceeded),
        (failure("INTERNAL"), ServerError),
        (failure("CANCELLED"), ServerUnavailable),
        (failure("NOT_FOUND"), ServerError),
    ],
)
@pytest.mark.parametrize("method", ["score", "score_many", "score_responses", "rank", "compare"])
def test_every_method_translates_errors(client, transport, error, kind, method):
    transport.reply = raising(error)
    arguments = {
        "score": [conversation("r")],
        "score_many": [[conversation("r")]],
        "compare": [PROMPT, "a", "b"],
    }.get(method, [PROMPT, ["a"]])
    with pytest.raises(kind) as caught:
        getattr(client, method)(*arguments)
    assert type(caught.value) is kind


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]])
def test_no_score_is_made_up(client, transport, scores):
    transport.reply = lambda arguments: transport.result(scores)
    for call in (client.score_responses, client.rank):
        with pytest.raises(ServerError):
            call(PROMPT, ["a", "b"])


def test_an_empty_answer_is_an_error(client, transport):
    transport.reply = lambda arguments: transport.result_of()
    with pytest.raises(ServerError, match="no 'scores'"):
        client.score(conversation("r"))


def test_bad_input_never_reaches_the_server(client, transport):
    with pytest.raises(InvalidRequest):
        client.score(PROMPT)
    with pytest.raises(InvalidRequest):
        client.score_responses(PROMPT, "text")
    with pytest.raises(MediaError):
        client.score_responses([{"role": "user", "content": [{"image": "gone.png"}]}], ["r"])
    assert transport.calls == []


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(triward.deadline, "monotonic", clock)
    return clock


@pytest.fixture
def slow_media(monkeypatch, clock):
    """Makes each read of media take the seconds that its value says."""

    def read(value, deadline):
        clock.now += value
        return b"media"

    monkeypatch.setattr("triward.conversation.read_media", read)


def with_media(*seconds):
    return [{"role": "user", "content": [{"type": "image", "image": s} for s in seconds]}]


def test_slow_media_leave_less_time_for_the_call(client, transport, slow_media):
    client.score_responses(with_media(3.0, 4.0), ["r"], timeout=10)
    assert transport.calls[0]["client_timeout"] == pytest.approx(3.0)
    assert transport.calls[0]["timeout"] == pytest.approx(3_000_000)


@pytest.mark.parametrize("seconds", [10.0, 11.0])
def test_media_that_use_up_the_time_end_the_call(client, transport, slow_media, seconds):
    with pytest.raises(DeadlineExceeded, match="timeout of 10 s"):
        client.score_responses(with_media(seconds), ["r"], timeout=10)
    assert transport.calls == []


def test_the_clients_timeout_is_the_default(client, transport, clock):
    client.score(conversation("r"))
    client.score(conversation("r"), timeout=5)
    client.rank(PROMPT, ["r"], timeout=6)
    client.compare(PROMPT, "r", "s", timeout=7)
    client.score_many([conversation("r")], timeout=8)
    assert [call["client_timeout"] for call in transport.calls] == [30, 5, 6, 7, 8]


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_wrong_timeouts(client, transport, timeout):
    with pytest.raises(ValueError, match="timeout"):
        RewardClient(timeout=timeout, _transport=transport)
    with pytest.raises(ValueError, match="timeout"):
        client.score(conversation("r"), timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        client.score_many([], timeout=timeout)
    assert transport.calls == []


def test_score_many_keeps_the_order(client, transport):
    """The first of each pair is answered only after the second."""
    second = threading.Event()

    def reply(arguments):
        if transport.sent(arguments)["responses"][1] == [b"first"]:
            assert second.wait(30)
        else:
            second.set()
        return transport.lengths(arguments)

    transport.reply = reply
    assert client.score_many([alone("first"), alone("2nd")]) == [5.0, 3.0]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_score_many_bounds_what_is_in_flight(client, transport, concurrency):
    """Calls meet at a barrier of `concurrency`: fewer at once would break it, more are counted."""
    barrier = threading.Barrier(concurrency)
    lock = threading.Lock()
    flying, most = [0], [0]

    def reply(arguments):
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
        barrier.wait(30)
        with lock:
            flying[0] -= 1
        return transport.lengths(arguments)

    transport.reply = reply
    taken = []

    def conversations():
        for length in range(8 * concurrency):
            taken.append(len(transport.calls))
            yield alone("x" * length)

    scores = client.score_many(conversations(), concurrency=concurrency)
    assert scores == [float(length) for length in range(8 * concurrency)]
    assert most[0] <= concurrency
    # Conversations are pulled as earlier ones finish, so a long iterable need not fit in memory.
    assert taken[-1] >= 4 * concurrency


def test_score_many_stops_at_the_first_failure(client, transport):
    def reply(arguments):
        if transport.sent(arguments)["responses"][1] == [b"bad"]:
            raise failure("INTERNAL", "broken")
        return transport.lengths(arguments)

    transport.reply = reply
    conversations = [alone("ok"), alone("bad"), *map(alone, ["late"] * 100)]
    with pytest.raises(ServerError, match=r"^conversations\[1\]: INTERNAL: broken$"):
        client.score_many(conversations, concurrency=1)
    assert len(transport.calls) <= 3


def test_score_many_names_the_place_of_bad_input(client):
    with pytest.raises(InvalidRequest, match=r"^conversations\[0\]: messages: must be a list"):
        client.score_many(conversation("one conversation, not a list of them"))
    bad = [{"role": "assistant", "content": "\ud800"}]
    with pytest.raises(InvalidRequest, match=r"^conversations\[1\]: messages\[0\]\.content: "):
        client.score_many([conversation("r"), bad])


def test_score_many_waits_for_what_is_in_flight(client, transport):
    started, done = threading.Event(), []

    def reply(arguments):
        if transport.sent(arguments)["responses"][1] == [b"bad"]:
            assert started.wait(30)
            raise failure("INTERNAL")
        started.set()
        scores = transport.lengths(arguments)
        done.append(True)
        return scores

    transport.reply = reply
    with pytest.raises(ServerError):
        client.score_many([alone("bad"), alone("ok")], concurrency=2)
    assert done == [True]


def test_score_many_of_nothing(client, transport):
    assert client.score_many([]) == []
    assert transport.calls == []


def test_score_many_with_wrong_concurrency(client):
    with pytest.raises(ValueError, match="concurrency"):
        client.score_many([], concurrency=0)


def test_one_client_serves_many_threads(client):
    results = {}

    def work(index):
        results[index] = [client.score(conversation("x" * index)) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: [float(index)] * 20 for index in range(8)}


def test_is_ready(client, transport):
    assert client.is_ready() is True
    assert transport.calls[0]["model_name"] == "reward"
    transport.ready = False
    assert client.is_ready() is False
    for code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        transport.ready = failure(code)
        assert client.is_ready(timeout=1) is False
    for code in ("NOT_FOUND", "INTERNAL"):
        transport.ready = failure(code)
        with pytest.raises(ServerError):
            client.is_ready()


def test_closing(transport):
    with RewardClient(_transport=transport) as client:
        client.score(conversation("r"))
    client.close()
    assert transport.closed == 1
    for call in (lambda: client.score(conversation("r")), client.is_ready):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_the_seam_matches_tritonclient(transport, client):
    """Every argument that is passed exists in the real client."""
    client.score(conversation("r"))
    real = inspect.signature(InferenceServerClient.infer).parameters
    assert set(transport.calls[0]) <= set(real)
    ready = inspect.signature(InferenceServerClient.is_model_ready).parameters
    assert {"model_name", "headers", "client_timeout"} <= set(ready)


def test_a_real_channel_without_a_server():
    with socket.socket() as held:  # bound but not listening: a connection is refused
        held.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{held.getsockname()[1]}"
        with RewardClient(url, timeout=10, max_attempts=1) as client:
            with pytest.raises(ServerUnavailable, match=url):
                client.score(conversation("r"))
            assert client.is_ready() is False


def test_a_real_channel_whose_server_is_silent():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with (
            RewardClient(f"127.0.0.1:{silent.getsockname()[1]}", timeout=0.3) as client,
            pytest.raises(DeadlineExceeded),
        ):
            client.score(conversation("r"))


def test_numpy_scores_do_not_leak(client):
    assert not isinstance(client.score(conversation("r")), np.generic)
