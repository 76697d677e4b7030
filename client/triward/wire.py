"""A request -> arguments of tritonclient's `infer`; its result -> checked scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from triward import protocol
from triward.conversation import RewardRequest
from triward.errors import InvalidRequest, ServerError
from triward.tokens import TokenRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from triward.sharedmemory import Place

# gRPC counts the bytes of a message in a signed 32-bit integer. The slack is for names and shapes.
_MESSAGE_LIMIT = 2**31 - 1 - 64 * 2**10


def infer_arguments(
    request: RewardRequest, *, model: str, remaining: float, media: Place | None = None
) -> dict[str, Any]:
    """Return keyword arguments of `infer`, for tritonclient's blocking and asyncio clients.

    Args:
        request: the row to send.
        model: name of the ensemble.
        remaining: seconds left. The caller gives up after them, and Triton drops a request that
            waits for longer.
        media: where the media lie in shared memory, if they do.

    Raises:
        InvalidRequest: the request is larger than a gRPC message can be.
    """
    fields = ((request.messages,), request.responses, request.media)
    sent = fields[:2] if media else fields
    _check_size(sum(4 + len(value) for values in sent for value in values))
    inputs = [
        _input(spec, values, media if spec is protocol.MEDIA else None)
        for spec, values in zip(protocol.INPUTS, fields, strict=True)
    ]
    return _arguments(model, inputs, remaining)


def token_arguments(request: TokenRequest, *, model: str, remaining: float) -> dict[str, Any]:
    """Return keyword arguments of `infer` for token ids; `model` is the ensemble, too."""
    _check_size(sum(array.nbytes for array in request.tensors.values()))
    inputs = [_numbers(spec, array) for spec, array in request.tensors.items()]
    return _arguments(protocol.forward_model(model), inputs, remaining)


def _check_size(size: int) -> None:
    if size > _MESSAGE_LIMIT:
        raise InvalidRequest(f"the request holds {size} bytes, gRPC allows {_MESSAGE_LIMIT}")


def _arguments(model: str, inputs: list[Any], remaining: float) -> dict[str, Any]:
    from tritonclient.grpc import InferRequestedOutput

    return {
        "model_name": model,
        "inputs": inputs,
        "outputs": [InferRequestedOutput(protocol.SCORES.name)],
        "parameters": {"contract_version": protocol.CONTRACT_VERSION},
        "client_timeout": remaining,
        "timeout": max(1, int(remaining * 1e6)),
    }


def read_scores(result: Any, count: int) -> list[float]:
    """Return the scores of an `InferResult`, in the order of the request's responses.

    Args:
        result: has `as_numpy(name)`, with `scores` FP32 [1, count].
        count: how many responses were sent.

    Raises:
        ServerError: the answer is not `count` finite numbers.
    """
    import numpy as np

    name = protocol.SCORES.name
    try:
        scores = result.as_numpy(name)
    except ValueError as error:
        raise ServerError(f"the server's {name!r} cannot be read: {error}") from error
    if scores is None:
        raise ServerError(f"the server's answer has no {name!r}")
    if scores.dtype != np.float32 or scores.shape != (1, count):
        got = f"{scores.dtype} {list(scores.shape)}"
        raise ServerError(f"the server's {name!r} must be float32 [1, {count}], got {got}")
    if not np.isfinite(scores).all():
        raise ServerError(f"the server's {name!r} are not all finite: {scores[0].tolist()}")
    return [float(score) for score in scores[0]]


def _input(spec: protocol.TensorSpec, values: Sequence[bytes], place: Place | None) -> Any:
    import numpy as np
    from tritonclient.grpc import InferInput

    if place:
        tensor = InferInput(spec.name, [1, len(values)], spec.datatype)
        tensor.set_shared_memory(place.region, place.size, place.offset)
        return tensor
    # Element by element into an object array: any other dtype strips trailing NULs.
    array = np.empty((1, len(values)), dtype=np.object_)
    for column, value in enumerate(values):
        array[0, column] = value
    tensor = InferInput(spec.name, list(array.shape), spec.datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def _numbers(spec: protocol.TensorSpec, array: NDArray[Any]) -> Any:
    from tritonclient.grpc import InferInput

    tensor = InferInput(spec.name, [1, *array.shape], spec.datatype)
    tensor.set_data_from_numpy(array[None])
    return tensor
