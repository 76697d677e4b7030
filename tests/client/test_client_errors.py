from __future__ import annotations

import pickle

import pytest
from tritonclient.utils import InferenceServerException

import triward
from tests.client.helpers import raising
from triward import errors

CONVERSATION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]


def from_triton(message, status):
    error = InferenceServerException(message, status=status)
    return errors.from_triton(error, model="reward", url="host:1")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", triward.InvalidRequest),
        ("UNAVAILABLE", triward.ServerUnavailable),
        ("CANCELLED", triward.ServerUnavailable),
        ("DEADLINE_EXCEEDED", triward.DeadlineExceeded),
        *[
            (code, triward.ServerError)
            for code in (
                "ABORTED",
                "ALREADY_EXISTS",
                "DATA_LOSS",
                "FAILED_PRECONDITION",
                "INTERNAL",
                "NOT_FOUND",
                "OUT_OF_RANGE",
                "PERMISSION_DENIED",
                "RESOURCE_EXHAUSTED",
                "UNAUTHENTICATED",
                "UNIMPLEMENTED",
                "UNKNOWN",
            )
        ],
    ],
)
def test_every_grpc_code_has_one_error(code, kind):
    error = from_triton("what went wrong", f"StatusCode.{code}")
    assert type(error) is kind
    assert "what went wrong" in str(error)


def test_every_grpc_code_is_covered():
    import grpc

    known = {code.name for code in grpc.StatusCode} - {"OK"}
    mark = test_every_grpc_code_has_one_error.pytestmark[0]
    assert {code for code, _ in mark.args[1]} == known


def test_an_error_without_status_or_message_is_a_server_error():
    assert type(from_triton("x", None)) is triward.ServerError
    assert "INTERNAL" in str(from_triton(None, "StatusCode.INTERNAL"))


def test_the_ensemble_prefix_is_dropped():
    text = "in ensemble 'reward', responses: holds 0 responses"
    assert str(from_triton(text, "StatusCode.INVALID_ARGUMENT")) == "responses: holds 0 responses"


def test_a_prefix_inside_the_sentence_stays():
    text = "media[0]: in ensemble 'reward', twice"
    assert str(from_triton(text, "StatusCode.INVALID_ARGUMENT")) == text


def test_waiting_too_long_in_a_queue_is_overload():
    error = from_triton("in ensemble 'reward', Request timeout expired", "StatusCode.UNAVAILABLE")
    assert type(error) is triward.ServerUnavailable


def test_a_call_that_the_server_cancels_is_its_shutdown():
    assert type(from_triton("CANCELLED", "StatusCode.CANCELLED")) is triward.ServerUnavailable


def test_a_model_that_is_not_loaded_may_be_so_later():
    text = "Request for unknown model: 'reward' has no available versions"
    error = from_triton(text, "StatusCode.NOT_FOUND")
    assert type(error) is triward.ServerUnavailable


def test_a_missing_model_is_named_with_the_server():
    error = from_triton("unknown model", "StatusCode.NOT_FOUND")
    assert "'reward'" in str(error)
    assert "host:1" in str(error)


def test_the_original_is_chained(client, transport):
    original = InferenceServerException("no", status="StatusCode.INTERNAL")
    transport.reply = raising(original)
    with pytest.raises(triward.ServerError) as caught:
        client.score(CONVERSATION)
    assert caught.value.__cause__ is original


def test_other_exceptions_pass_through(client, transport):
    transport.reply = raising(KeyError("x"))
    with pytest.raises(KeyError):
        client.score(CONVERSATION)


def test_the_hierarchy():
    assert issubclass(triward.InvalidRequest, ValueError)
    assert issubclass(triward.MediaError, triward.InvalidRequest)
    assert issubclass(triward.DeadlineExceeded, TimeoutError)
    for kind in (triward.ServerUnavailable, triward.DeadlineExceeded, triward.ServerError):
        assert issubclass(kind, triward.TriwardError)
        assert not issubclass(kind, ValueError)


@pytest.mark.parametrize("kind", [triward.MediaError, triward.DeadlineExceeded])
def test_errors_survive_a_process_boundary_and_a_place(kind):
    error = pickle.loads(pickle.dumps(errors.located(kind("bad"), "messages[0]")))
    assert type(error) is kind
    assert str(error) == "messages[0]: bad"
