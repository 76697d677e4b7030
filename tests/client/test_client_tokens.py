"""Scoring by tensors: what is sent, and what is refused before it is sent."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

import triward.wire
from tests.fakeserver import Fault
from triward import (
    AsyncRewardClient,
    DeadlineExceeded,
    InvalidRequest,
    RewardClient,
    ServerError,
    ServerUnavailable,
    protocol,
)

IMAGE = np.arange(28 * 56 * 3, dtype=np.uint8).reshape(28, 56, 3)
TYPES = {"INT32": np.int32, "UINT8": np.uint8, "FP32": np.float32}


def sent(arguments):
    """Name -> array, decoded from what would go over the wire."""
    return {
        tensor.name(): np.frombuffer(tensor._get_content(), TYPES[tensor.datatype()]).reshape(
            tensor.shape()
        )
        for tensor in arguments["inputs"]
    }


class Tensor:
    """What numpy can take, as a CPU tensor of torch's."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def __iter__(self):
        return iter(self.values)


@pytest.fixture
def tokens(transport):
    """A transport that scores a response by its number of tokens."""

    def counts(arguments):
        return transport.result(sent(arguments)["segment_lengths"][0, 1:].astype(float))

    transport.reply = counts
    return transport


def test_what_is_sent(client, tokens):
    other = np.full((56, 28, 3), 7, np.uint8)
    assert client.score_tokens([5, 6], [[1, 2, 3], [4]], media=[IMAGE, other]) == [3.0, 1.0]
    asked, call = tokens.calls
    assert asked["model_name"] == "reward", "which version is served"
    assert call["model_version"] == "1"
    assert call["model_name"] == "reward_forward"
    arrays = sent(call)
    assert list(arrays) == [spec.name for spec in protocol.FORWARD_INPUTS]
    assert arrays["input_ids"].tolist() == [[5, 6, 1, 2, 3, 4]]
    assert arrays["segment_lengths"].tolist() == [[2, 3, 1]]
    assert arrays["grids"].tolist() == [[[1, 2, 4], [1, 4, 2]]]
    assert arrays["pixels"].tobytes() == IMAGE.tobytes() + other.tobytes()
    assert call["client_timeout"] <= 30 and call["timeout"] <= 30_000_000


def test_each_call_goes_to_the_version_that_is_served_then(client, tokens):
    """The forward model may have another one loaded, and Triton would take the highest."""
    for tokens.version in ("3", "1"):
        client.score_tokens([5], [[1]])
        assert tokens.calls[-1]["model_version"] == tokens.version


def test_a_server_that_shuts_down_gets_no_tokens(client, tokens):
    tokens.version = protocol.DRAINING_VERSION
    with pytest.raises(ServerUnavailable, match="the server is shutting down"):
        client.score_tokens([5], [[1]])
    assert {call["model_name"] for call in tokens.calls} == {"reward"}


def test_a_version_that_has_gone_meanwhile_is_no_model_that_is_missing(client, tokens):
    def gone(arguments):
        text = "Request for unknown model: 'reward_forward' version 1 is not found"
        raise InferenceServerException(text, "StatusCode.NOT_FOUND")

    tokens.reply = gone
    with pytest.raises(ServerUnavailable, match="version 1 is not found"):
        client.score_tokens([5], [[1]])


def test_text_has_tensors_of_length_zero(client, tokens):
    assert client.score_tokens([], [[1]]) == [1.0]
    arrays = sent(tokens.calls[-1])
    assert arrays["pixels"].shape == (1, 0) and arrays["grids"].shape == (1, 0, 3)
    assert arrays["segment_lengths"].tolist() == [[0, 1]]


def test_another_model_and_patch_size(tokens):
    with RewardClient(model="judge", _transport=tokens) as client:
        client.score_tokens([1], [[2]], media=[np.zeros((32, 64, 3), np.uint8)], patch_size=16)
    assert tokens.calls[-1]["model_name"] == "judge_forward"
    assert sent(tokens.calls[-1])["grids"].tolist() == [[[1, 2, 4]]]


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2],
        (3, 1, 2),
        range(3, 6),
        np.array([3, 1, 2], np.int64),
        np.array([3, 1, 2], np.uint16),
        Tensor([3, 1, 2]),
    ],
)
def test_whatever_numpy_takes(client, tokens, ids):
    assert client.score_tokens(ids, [ids, ids]) == [3.0, 3.0]
    assert sent(tokens.calls[-1])["input_ids"].tolist() == [list(map(int, ids)) * 3]


def test_equal_lengths_may_be_one_array(client, tokens):
    assert client.score_tokens([1], np.ones((3, 2), np.int64)) == [2.0] * 3


def test_arrays_that_are_no_rows_in_memory(client, tokens):
    """A slice or a transposed array is sent as it reads, and left as it is."""
    turned = np.ascontiguousarray(IMAGE.transpose(1, 0, 2)).transpose(1, 0, 2)
    kept = turned.copy()
    client.score_tokens(np.arange(10)[::2], [[1]], media=[turned])
    arrays = sent(tokens.calls[-1])
    assert arrays["pixels"].tobytes() == IMAGE.tobytes()
    assert arrays["input_ids"].tolist() == [[0, 2, 4, 6, 8, 1]]
    assert (turned == kept).all()


BAD = {
    "prompt: text": (("abc", [[1]]), {}, "prompt_ids: must be one list of token ids, got shape []"),
    "prompt: floats": (([1.0], [[1]]), {}, "prompt_ids: token ids must be integers, got float64"),
    "prompt: NaN": (([1, float("nan")], [[1]]), {}, "prompt_ids: token ids must be integers"),
    "prompt: bools": (([True], [[1]]), {}, "prompt_ids: token ids must be integers, got bool"),
    "prompt: a batch": (([[1, 2]], [[1]]), {}, "prompt_ids: must be one list of token ids, got "
                        "shape [1, 2]"),
    "prompt: ragged": (([[1], [2, 3]], [[1]]), {}, "prompt_ids: is no array: "),
    "prompt: None": ((None, [[1]]), {}, "prompt_ids: must be one list of token ids, got shape []"),
    "prompt: negative": (([4, -1], [[1]]), {}, "prompt_ids[1]: -1, token ids are 0 to 2147483647"),
    "prompt: too large": (([2**31], [[1]]), {}, "prompt_ids[0]: 2147483648, token ids are 0 to"),
    "prompt: beyond 64 bits": (([2**70], [[1]]), {}, "prompt_ids: token ids must be integers"),
    "no responses": (([1], []), {}, "response_ids: holds 0 responses, needs at least 1"),
    "responses: text": (([1], "ab"), {}, "response_ids: must be a list of token lists, got str"),
    "responses: None": (([1], None), {}, "response_ids: must be a list of token lists, got None"),
    "responses: flat": (([1], [1, 2]), {}, "response_ids[0]: must be one list of token ids, got"),
    "an empty response": (([1], [[1], []]), {}, "response_ids[1]: holds 0 tokens, needs at least"),
    "response: negative": (([1], [[1], [2, -100]]), {}, "response_ids[1][1]: -100, token ids are"),
    "media: one array": (([1], [[1]]), {"media": IMAGE}, "media: must be a list of arrays, got"),
    "media: floats": (([1], [[1]]), {"media": [IMAGE / 255]}, "media[0]: must be uint8, got float"),
    "media: grey": (([1], [[1]]), {"media": [IMAGE, IMAGE[..., 0]]}, "media[1]: must be an image ["
                    "H, W, 3] or a video [T, H, W, 3], got [28, 56]"),
    "media: planes first": (([1], [[1]]), {"media": [IMAGE.transpose(2, 0, 1)]}, "media[0]: must"),
    "media: nothing": (([1], [[1]]), {"media": [IMAGE[:0]]}, "media[0]: must be an image"),
    "media: not resized": (([1], [[1]]), {"media": [IMAGE[:, :55]]}, "media[0]: height and width "
                           "must be multiples of 28, got 28 x 55"),
    "media: half a merged patch": (([1], [[1]]), {"media": [IMAGE[:14]]}, "media[0]: height and"),
    "video: odd frames": (([1], [[1]]), {"media": [np.stack([IMAGE] * 3)], "seconds_per_grid": [1]},
                          "media[0]: a video needs an even number of frames, got 3"),
    "video: no seconds": (([1], [[1]]), {"media": [IMAGE, np.stack([IMAGE] * 2)]},
                          "seconds_per_grid: needs one number for each of 1 videos, got [0]"),
    "seconds without video": (([1], [[1]]), {"media": [IMAGE], "seconds_per_grid": [1.0]},
                              "seconds_per_grid: needs one number for each of 0 videos, got [1]"),
    "seconds: NaN": (([1], [[1]]), {"media": [np.stack([IMAGE] * 2)],
                     "seconds_per_grid": [float("nan")]}, "seconds_per_grid[0]: nan, must be"),
    "seconds: 0": (([1], [[1]]), {"media": [np.stack([IMAGE] * 2)], "seconds_per_grid": [0]},
                   "seconds_per_grid[0]: 0, must be finite and above 0"),
    "seconds: text": (([1], [[1]]), {"media": [np.stack([IMAGE] * 2)], "seconds_per_grid": ["1"]},
                      "seconds_per_grid: must be numbers, got <U1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_never_reaches_the_server(name, client, tokens):
    arguments, keywords, sentence = BAD[name]
    with pytest.raises(InvalidRequest) as caught:
        client.score_tokens(*arguments, **keywords)
    assert str(caught.value).startswith(sentence)
    assert tokens.calls == []


def test_a_request_beyond_grpc(client, tokens, monkeypatch):
    size = 4 * 3 + 4 * 2 + IMAGE.nbytes + 4 * 3
    monkeypatch.setattr(triward.wire, "_MESSAGE_LIMIT", size - 1)
    with pytest.raises(InvalidRequest, match=f"holds {size} bytes, gRPC allows {size - 1}"):
        client.score_tokens([1, 2], [[3]], media=[IMAGE])


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", InvalidRequest),
        ("UNAVAILABLE", ServerUnavailable),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
        ("INTERNAL", ServerError),
    ],
)
def test_errors_are_translated(client, tokens, code, kind):
    def fail(arguments):
        raise InferenceServerException("input_ids: no", status=f"StatusCode.{code}")

    tokens.reply = fail
    with pytest.raises(kind, match="input_ids: no"):
        client.score_tokens([1], [[2]])


def test_a_model_that_is_not_served_is_named(client, tokens):
    def fail(arguments):
        raise InferenceServerException("is not found", status="StatusCode.NOT_FOUND")

    tokens.reply = fail
    with pytest.raises(ServerError, match="does not serve the model 'reward_forward'"):
        client.score_tokens([1], [[2]])


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]])
def test_no_score_is_made_up(client, tokens, scores):
    tokens.reply = lambda arguments: tokens.result(scores)
    with pytest.raises(ServerError):
        client.score_tokens([1], [[2], [3]])


def test_a_closed_client_and_wrong_timeouts(client):
    with pytest.raises(ValueError, match="timeout"):
        client.score_tokens([1], [[2]], timeout=0)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.score_tokens([1], [[2]])


def test_the_seam_matches_tritonclient(client, tokens):
    client.score_tokens([1], [[2]])
    assert set(tokens.calls[-1]) <= set(inspect.signature(InferenceServerClient.infer).parameters)


def test_both_clients_have_the_same_arguments():
    one, two = (inspect.signature(c.score_tokens) for c in (RewardClient, AsyncRewardClient))
    assert one == two


# Real gRPC


def blocking(url, *arguments, **settings):
    timeout = settings.pop("call_timeout", None)
    with RewardClient(url, **settings) as client:
        return client.score_tokens(*arguments, media=[IMAGE], timeout=timeout)


def in_asyncio(url, *arguments, **settings):
    timeout = settings.pop("call_timeout", None)

    async def run():
        async with AsyncRewardClient(url, **settings) as client:
            return await client.score_tokens(*arguments, media=[IMAGE], timeout=timeout)

    return asyncio.run(run())


@pytest.fixture(params=[blocking, in_asyncio])
def score(request):
    return request.param


def test_over_grpc(score, server):
    calls = []
    server.fault = calls.append
    assert score(server.url, [7, 8], [[12, 3], [9]], headers={"key": "k"}) == [4.0, 1.0]
    (call,) = calls
    assert (call.model, call.messages) == ("reward_forward", b"7 8")
    assert call.media == [IMAGE.tobytes()] and call.headers["key"] == "k"


def test_what_is_unavailable_is_asked_again(score, server):
    server.fault = lambda call: Fault.UNAVAILABLE if call.number < 2 else None
    assert score(server.url, [7], [[12, 3]], timeout=30) == [4.0]
    assert server.calls == 3
    server.fault = lambda call: Fault.UNAVAILABLE
    with pytest.raises(ServerUnavailable):
        score(server.url, [7], [[12, 3]], max_attempts=1)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault.INVALID_ARGUMENT, InvalidRequest),
        (Fault.INTERNAL, ServerError),
        (Fault.NAN, ServerError),
        (Fault.WRONG_COUNT, ServerError),
    ],
)
def test_bad_servers(score, server, fault, kind):
    server.fault = lambda call: fault
    with pytest.raises(kind):
        score(server.url, [7], [[12, 3]], timeout=30)
    assert server.calls == 1


def test_a_slow_server_ends_the_call_in_time(score, server):
    server.delay = 2.0
    with pytest.raises(DeadlineExceeded):
        score(server.url, [7], [[12, 3]], timeout=30, call_timeout=0.2)


def test_bad_input_in_asyncio():
    with pytest.raises(InvalidRequest, match=r"^response_ids\[0\]: holds 0 tokens"):
        in_asyncio("127.0.0.1:1", [1], [[]])


def test_it_needs_no_torch():
    code = (
        "import sys, numpy as np, triward; values = np.zeros((4, 1176), np.float32);\n"
        "try: triward.pixels_of(values, [[1, 2, 2]])\n"
        "except triward.InvalidRequest: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
