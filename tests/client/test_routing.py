"""Routing by prompt: where requests go, and where they go while a server is full or away."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from tests.fakeserver import FakeServer, Fault
from triward import AsyncRewardClient, InvalidRequest, RewardClient, ServerUnavailable, routing
from triward.conversation import RewardRequest
from triward.deadline import Deadline
from triward.routing import Pause, Router, prompt_key, routed, tokens_key
from triward.tokens import token_request

SERVERS = [f"10.0.0.{number}:8001" for number in range(8)]
KEYS = [f"prompt {number}".encode() for number in range(400)]


def own(router, key):
    return router.order(key)[0]


# The order of servers


def test_the_order_is_the_same_for_everybody():
    """Whatever the list's order, and in every release of this package."""
    router = Router(SERVERS)
    assert [Router(SERVERS[::-1]).order(key) for key in KEYS] == list(map(router.order, KEYS))
    assert Router(["a:1", "b:1", "c:1"]).order(b"prompt") == ["b:1", "a:1", "c:1"]


def test_prompts_are_spread_evenly():
    counts = Counter(own(Router(SERVERS), key) for key in KEYS)
    assert set(counts) == set(SERVERS)
    assert max(counts.values()) < 1.6 * len(KEYS) / len(SERVERS)


def test_a_server_that_goes_moves_its_own_prompts_alone():
    everyone, fewer = Router(SERVERS), Router(SERVERS[1:])
    moved = [key for key in KEYS if own(everyone, key) != own(fewer, key)]
    assert moved == [key for key in KEYS if own(everyone, key) == SERVERS[0]]
    assert len({own(fewer, key) for key in moved}) == len(SERVERS) - 1, "to all others"


def test_a_server_named_twice_is_one():
    assert Router(["a:1", "b:1", "a:1"]).servers == ("a:1", "b:1")


# Bounded load


def test_a_hot_prompt_is_spread_no_wider_than_its_load_asks_for():
    """64 calls at once to 8 servers: at most 1.25 times an equal share each, 10 of them."""
    router, key = Router(SERVERS), KEYS[0]
    with ExitStack() as flying:
        taken = [flying.enter_context(router.call(key, ())) for _ in range(64)]
    assert taken[:8] == [own(router, key)] * 8, "few calls stay together, to be computed together"
    counts = Counter(taken)
    assert max(counts.values()) <= 10
    assert list(counts) == router.order(key)[: len(counts)], "the next in order takes what is left"
    with router.call(key, ()) as server:
        assert server == own(router, key), "it is back when there is room"


def test_a_bound_counts_everybodys_calls():
    """A server that is full of other prompts passes this one on."""
    router = Router(SERVERS)
    mine = own(router, KEYS[0])
    others = [key for key in KEYS if own(router, key) == mine][1:9]
    with ExitStack() as flying:
        for key in others:
            flying.enter_context(router.call(key, ()))
        with router.call(KEYS[0], ()) as server:
            assert server == router.order(KEYS[0])[1]


def test_a_call_that_is_full_everywhere_is_sent_all_the_same():
    router, key = Router(SERVERS[:2]), KEYS[0]
    first, second = router.order(key)
    with ExitStack() as flying:
        for _ in range(30):
            flying.enter_context(router.call(key, (second,)))
        with router.call(key, (second,)) as server:
            assert server == first, "the other one is away"


# One call's steps


def steps(router, answers, attempts):
    """Who is asked, and the pauses; answers are taken in turn."""
    said = iter(answers)
    log = []

    def send(server):
        log.append(server)
        answer = next(said)
        if isinstance(answer, Exception):
            raise answer
        return answer
        yield

    call = routed(router, KEYS[0], Deadline(60), attempts, send, lambda: False)
    try:
        while True:
            step = next(call)
            assert isinstance(step, Pause)
            log.append(round(step.seconds, 1))
    except StopIteration as end:
        return log, end.value
    except ServerUnavailable as error:
        return log, error


def test_servers_are_asked_in_order_and_again_after_a_pause():
    away = ServerUnavailable("away")
    router = Router(SERVERS[:3])
    first, second, third = router.order(KEYS[0])
    log, value = steps(router, [away, away, away, away, 7.0], attempts=2)
    assert value == 7.0
    [pause] = [each for each in log if isinstance(each, float)]
    assert 0.1 < pause < 0.3
    assert [each for each in log if each != pause] == [first, second, third, first, second]
    log, value = steps(router, [away] * 6, attempts=2)
    assert value is away and len(log) == 7
    assert not router._flying.total()


def test_nothing_else_moves_a_call():
    with pytest.raises(InvalidRequest):
        steps(Router(SERVERS), [InvalidRequest("wrong")], attempts=5)


# Keys


def request(messages, media=(), responses=("r",)):
    return RewardRequest(json.dumps(messages).encode(), tuple(map(str.encode, responses)), media)


USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}
LATER = {"role": "user", "content": [{"type": "video", "frames": 2}]}


def test_a_dialogue_keeps_its_key():
    begun = prompt_key(request([USER], (b"1",)))
    longer = [USER, {"role": "assistant", "content": "a"}, LATER]
    assert prompt_key(request(longer, (b"1", b"2", b"3"), ("other", "responses"))) == begun


@pytest.mark.parametrize(
    ("messages", "media"),
    [
        ([USER], (b"2",)),
        ([{**USER, "content": [*USER["content"], {"type": "text", "text": ""}]}], (b"1",)),
        ([{"role": "system", "content": "s"}, USER], (b"1",)),
        (
            [{**USER, "content": [{"type": "image", "max_pixels": 9}, *USER["content"][1:]]}],
            (b"1",),
        ),
        ([LATER, USER], (b"1", b"2", b"3")),
    ],
)
def test_what_makes_another_prompt(messages, media):
    assert prompt_key(request(messages, media)) != prompt_key(request([USER], (b"1",)))


def test_frames_are_told_apart():
    """Both frames count, and where one ends."""
    media = [(b"1", b"2", b"3"), (b"1", b"3", b"3"), (b"12", b"", b"3"), (b"1", b"2", b"4")]
    keys = [prompt_key(request([LATER, USER], each)) for each in media]
    assert len(set(keys[:3])) == 3 and keys[3] == keys[0]


def test_messages_without_a_user():
    assert prompt_key(request([{"role": "system", "content": "a"}])) != prompt_key(request([]))


def test_the_key_of_token_ids_is_the_prompts():
    picture = np.zeros((28, 28, 3), np.uint8)

    def key(prompt, response, image=picture):
        return tokens_key(token_request(prompt, [response], [image], (), 14))

    assert key([1, 2], [3]) == key([1, 2], [4, 5])
    assert len({key([1, 2], [3]), key([1], [2, 3]), key([1, 2], [3], picture + 1)}) == 3


# Clients


@pytest.fixture
def trio():
    with FakeServer() as first, FakeServer() as second, FakeServer() as third:
        yield {server.url: server for server in (first, second, third)}


def conversation(prompt, response="four"):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def home(trio, prompt):
    """Servers in the prompt's order."""
    key = prompt_key(request([{"role": "user", "content": prompt}]))
    return [trio[url] for url in Router(trio).order(key)]


def prompt_of(trio, server):
    return next(p for p in map(str, range(999)) if home(trio, p)[0] is server)


def test_a_prompt_meets_its_server_however_it_comes(trio):
    server = home(trio, "question")[0]
    messages = conversation("question")
    with RewardClient(list(trio), routing="prompt") as client:
        assert client.score(messages) == 4.0
        assert client.score_responses(messages[:1], ["a", "bb"]) == [1.0, 2.0]
        apart = [conversation("question", "x" * n) for n in range(4)]
        between = [conversation(f"other {n}") for n in range(4)]
        mixed = [each for pair in zip(apart, between, strict=True) for each in pair]
        assert client.score_many(mixed) == [0.0, 4.0, 1.0, 4.0, 2.0, 4.0, 3.0, 4.0]
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.score(messages) == 4.0

    async def ask():
        async with AsyncRewardClient(list(trio), routing="prompt") as client:
            return await client.score(messages), await client.score_many(apart)

    assert asyncio.run(ask()) == (4.0, [0.0, 1.0, 2.0, 3.0])
    assert sum(server.scored[text] for text in ("a", "bb", "", "x", "xx", "xxx")) == 10
    asked = {
        id(home(trio, prompt)[0]) for prompt in ["question", *map("other {}".format, range(4))]
    }
    assert {id(each) for each in trio.values() if each.calls} == asked


def test_token_ids_meet_their_server(trio):
    with RewardClient(list(trio), routing="prompt") as client:
        for response in range(6):
            assert client.score_tokens([1, 2, 3], [[response]]) == [1.0]
    assert sorted(each.calls for each in trio.values()) == [0, 0, 6]


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_server_goes_and_comes_back(trio, kind):
    first, second, third = home(trio, "question")
    elsewhere = prompt_of(trio, third)
    with ExitStack() as end:
        loop = asyncio.new_event_loop()
        end.callback(loop.close)
        Client = RewardClient if kind == "blocking" else AsyncRewardClient
        client = Client(list(trio), routing="prompt", timeout=60)

        def score(prompt):
            answer = client.score(conversation(prompt))
            return answer if kind == "blocking" else loop.run_until_complete(answer)

        assert score("question") == 4.0 and first.calls == 1
        first._server.stop(grace=None).wait()
        assert score("question") == 4.0 and second.calls == 1
        assert score(elsewhere) == 4.0 and third.calls == 1
        with FakeServer(first.port) as again:
            while not again.calls:  # gRPC connects again by itself, within ten seconds
                assert score("question") == 4.0
                assert second.calls < 10_000
            score("question")
            assert again.calls == 2 and third.calls == 1
        closing = client.close()
        if kind == "asyncio":
            loop.run_until_complete(closing)


def test_a_full_server_passes_its_calls_on(trio):
    first, second, _ = home(trio, "question")
    first.fault = lambda call: Fault.UNAVAILABLE
    with RewardClient(list(trio), routing="prompt") as client:
        assert client.score(conversation("question")) == 4.0
    assert (first.calls, second.calls) == (1, 1), "without a pause"


def test_nobody_takes_it(trio):
    for each in trio.values():
        each.fault = lambda call: Fault.UNAVAILABLE
    client = RewardClient(list(trio), routing="prompt", max_attempts=2)
    with client, pytest.raises(ServerUnavailable, match=home(trio, "question")[2].url):
        client.score(conversation("question"))
    assert [each.calls for each in trio.values()] == [2, 2, 2], "each as often as gRPC would ask"


def test_a_hot_prompt_is_spread_by_the_client(trio):
    """Callers beyond what a server holds go to the next; those that it holds stay."""
    held, released = threading.Semaphore(0), threading.Event()

    def hold(call):
        held.release()
        assert released.wait(30)

    for each in trio.values():
        each.fault = hold
    with RewardClient(list(trio), routing="prompt") as client, ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(client.score, conversation("question")) for _ in range(12)]
        for _ in calls:
            assert held.acquire(timeout=30)
        counts = [each.calls for each in home(trio, "question")]
        released.set()
        assert [call.result(30) for call in calls] == [4.0] * 12
    assert counts == [routing._ALWAYS, 4, 0]


def test_a_closed_client_asks_nobody_else(trio):
    first, *others = home(trio, "question")
    asked, released = threading.Event(), threading.Event()

    def hold(call):
        asked.set()
        assert released.wait(30)

    first.fault = hold
    client = RewardClient(list(trio), routing="prompt")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.score, conversation("question"))
        assert asked.wait(30)
        client.close()
        assert isinstance(call.exception(30), ServerUnavailable)
        released.set()

    async def ask():
        asking = AsyncRewardClient(list(trio), routing="prompt")
        call = asyncio.ensure_future(asking.score(conversation("question")))
        while first.calls < 2:
            await asyncio.sleep(0.01)
        await asking.close()
        with pytest.raises(ServerUnavailable, match="closed"):
            await call

    released.clear()
    asyncio.run(ask())
    released.set()
    assert [each.calls for each in others] == [0, 0]


@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
def test_what_is_no_routing(kind):
    with pytest.raises(ValueError, match="'round_robin' or 'prompt', got 'promt'"):
        kind(["a:1", "b:1"], routing="promt")
    with pytest.raises(ValueError, match="needs a list of host:port, got 'dns:///rewards:8001'"):
        kind("dns:///rewards:8001", routing="prompt")
