from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor

import triward.wire
from triward import InvalidRequest, ServerError, protocol
from triward.conversation import RewardRequest
from triward.wire import infer_arguments, read_scores


def arguments_of(request, remaining=1.5):
    return infer_arguments(request, model="reward", remaining=remaining)


@given(st.lists(st.binary(), min_size=1, max_size=4), st.lists(st.binary(), max_size=4))
def test_every_byte_reaches_the_wire(responses, media):
    request = RewardRequest(b"[]", tuple(responses), tuple(media))
    inputs = arguments_of(request)["inputs"]
    assert [tensor.name() for tensor in inputs] == ["messages", "responses", "media"]
    for index, values in enumerate(([b"[]"], responses, media)):
        tensor = inputs[index]
        assert tensor.datatype() == "BYTES"
        assert list(tensor.shape()) == [1, len(values)]
        assert list(deserialize_bytes_tensor(tensor._get_content())) == values


def test_trailing_nuls_stay():
    inputs = arguments_of(RewardRequest(b"[]", (b"a\0\0",), (b"png\0",)))["inputs"]
    assert inputs[1]._get_content() == b"\3\0\0\0a\0\0"
    assert inputs[2]._get_content() == b"\4\0\0\0png\0"


def test_no_media_is_a_tensor_of_length_zero():
    media = arguments_of(RewardRequest(b"[]", (b"r",), ()))["inputs"][2]
    assert media.name() == "media"
    assert list(media.shape()) == [1, 0]
    assert media._get_content() == b""  # not None: Triton counts the raw contents


def test_the_whole_message_survives_protobuf():
    from tritonclient.grpc import service_pb2
    from tritonclient.grpc._utils import _get_inference_request

    arguments = arguments_of(RewardRequest(b"[]", (b"r",), ()))
    del arguments["client_timeout"]
    message = _get_inference_request(
        **arguments,
        model_version="",
        request_id="",
        sequence_id=0,
        sequence_start=False,
        sequence_end=False,
        priority=0,
    )
    message = service_pb2.ModelInferRequest.FromString(message.SerializeToString())
    assert message.model_name == "reward"
    assert list(message.raw_input_contents) == [b"\2\0\0\0[]", b"\1\0\0\0r", b""]
    assert [list(tensor.shape) for tensor in message.inputs] == [[1, 1], [1, 1], [1, 0]]
    assert message.parameters["timeout"].int64_param == 1_500_000
    assert message.parameters["contract_version"].int64_param == 1
    assert [output.name for output in message.outputs] == ["scores"]


def test_both_timeouts_are_the_remaining_time():
    arguments = arguments_of(RewardRequest(b"[]", (b"r",), ()), remaining=0.25)
    assert arguments["client_timeout"] == 0.25
    assert arguments["timeout"] == 250_000
    # Zero would mean no timeout to Triton.
    assert arguments_of(RewardRequest(b"[]", (b"r",), ()), remaining=1e-9)["timeout"] == 1


def test_a_request_beyond_grpc_is_an_invalid_request(monkeypatch):
    request = RewardRequest(b"[]", (b"r",), (b"1234567890",))
    size = 4 + 2 + 4 + 1 + 4 + 10
    monkeypatch.setattr(triward.wire, "_MESSAGE_LIMIT", size)
    arguments_of(request)
    monkeypatch.setattr(triward.wire, "_MESSAGE_LIMIT", size - 1)
    with pytest.raises(InvalidRequest, match=f"holds {size} bytes, gRPC allows {size - 1}"):
        arguments_of(request)


def test_the_contract():
    assert protocol.MODEL == "reward"
    assert [(s.name, s.datatype, s.dims) for s in protocol.INPUTS] == [
        ("messages", "BYTES", (1,)),
        ("responses", "BYTES", (-1,)),
        ("media", "BYTES", (-1,)),
    ]
    assert [(s.name, s.datatype, s.dims) for s in protocol.OUTPUTS] == [
        ("scores", "FP32", (-1,)),
        ("token_counts", "INT32", (-1,)),
    ]


def test_scores_are_python_floats(transport):
    scores = read_scores(transport.result([1.5, -0.1]), 2)
    assert scores == [1.5, float(np.float32(-0.1))]
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (None, "has no 'scores'"),
        (np.zeros((1, 1), np.float32), "must be float32 [1, 2], got float32 [1, 1]"),
        (np.zeros((1, 3), np.float32), "must be float32 [1, 2], got float32 [1, 3]"),
        (np.zeros((2,), np.float32), "must be float32 [1, 2], got float32 [2]"),
        (np.zeros((2, 1), np.float32), "must be float32 [1, 2], got float32 [2, 1]"),
        (np.zeros((1, 2), np.int32), "must be float32 [1, 2], got int32 [1, 2]"),
        (np.array([[0, np.nan]], np.float32), "are not all finite: [0.0, nan]"),
        (np.array([[np.inf, 0]], np.float32), "are not all finite: [inf, 0.0]"),
        (np.array([[-np.inf, 0]], np.float32), "are not all finite: [-inf, 0.0]"),
        (ValueError("cannot reshape"), "cannot be read: cannot reshape"),
    ],
)
def test_malformed_answers(array, sentence, transport):
    with pytest.raises(ServerError) as caught:
        read_scores(transport.result_of(scores=array), 2)
    assert sentence in str(caught.value)
