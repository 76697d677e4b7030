"""No caller can have other pixels taken for those of an image, whatever it sends beside them.

Both steps of the ensemble answer whoever asks. So a caller can have `reward_preprocess` prepare one
image, put another one's pixels in its place, and send that to `reward_forward`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

from tests.conftest import encode
from tests.conversations import image, picture, says, user
from triward import RewardClient
from triward_server.schema import PIXELS
from triward_server.serving.launch import TritonServer
from triward_server.testing.oracle import Oracle, fp32_budget

Tensors = dict[str, np.ndarray]
Call = Callable[[str, Tensors], Tensors]

LOOK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
ANSWER = "Bars, and the tallest is purple."


@pytest.fixture(scope="module")
def call(server: TritonServer) -> Iterator[Call]:
    """Asks a model of the server, and returns everything that it answers."""
    connection = triton.InferenceServerClient(server.endpoints.grpc)

    def ask(model: str, tensors: Tensors) -> Tensors:
        inputs = []
        for name, array in tensors.items():
            tensor = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        result = connection.infer(model, inputs)
        names = [output.name for output in result.get_response().outputs]
        return {name: result.as_numpy(name) for name in names}

    yield ask
    connection.close()


def wire(seed: int) -> Tensors:
    """A conversation about a picture, as the ensemble takes it."""
    values = {
        "messages": json.dumps(LOOK).encode(),
        "responses": ANSWER.encode(),
        "media": encode(picture(140, 112, seed)),
    }
    return {name: np.array([[value]], np.object_) for name, value in values.items()}


@pytest.mark.parametrize("order", ["forged first", "genuine first"])
def test_other_pixels_under_everything_else_of_an_image(
    order: str, call: Call, client: RewardClient, oracle: Oracle
) -> None:
    """Both callers get the model card's score of the pixels that they sent."""
    seeds = (71, 72) if order == "forged first" else (73, 74)  # seen by no test before
    conversations = [
        [user(image(picture(140, 112, seed)), "What is it?"), says(ANSWER)] for seed in seeds
    ]
    own, other = map(oracle.score, conversations)
    assert abs(own - other) > 10 * fp32_budget(own)
    sent, copied = (call("reward_preprocess", wire(seed)) for seed in seeds)
    forged = copied | {PIXELS.name: sent[PIXELS.name]}
    if order == "genuine first":
        assert abs(client.score(conversations[1]) - other) <= fp32_budget(other)
    for _ in range(2):
        (got,) = call("reward_forward", forged)["scores"].reshape(-1)
        assert abs(got - own) <= fp32_budget(own)
        assert abs(client.score(conversations[1]) - other) <= fp32_budget(other)
        assert abs(client.score(conversations[0]) - own) <= fp32_budget(own)
