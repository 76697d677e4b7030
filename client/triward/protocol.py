"""The wire contract: names, datatypes and dims of the tensors of the ensemble and its second step.

One request is one row: an array on the wire has a leading dimension of 1 in front of `dims`. All
inputs are always present; a conversation without media sends `media` with shape [1, 0].
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "reward"
GRPC_PORT = 8001  # where a server listens that is not told otherwise

# Of everything in this module and what it means. Each call says it; a server that speaks another
# one refuses the call, so that no score comes from a misunderstanding.
CONTRACT_VERSION = 1

DRAINING_VERSION = "2147483647"  # of the public model of a server that is shutting down


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and dimensions of a model's tensor.

    Attributes:
        name: Triton's name of the tensor.
        datatype: Triton's name of the datatype, as "BYTES" or "FP32".
        dims: the shape without the batch dimension; -1 is any length.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]


MESSAGES = TensorSpec("messages", "BYTES", (1,))
RESPONSES = TensorSpec("responses", "BYTES", (-1,))
MEDIA = TensorSpec("media", "BYTES", (-1,))
SCORES = TensorSpec("scores", "FP32", (-1,))
TOKEN_COUNTS = TensorSpec("token_counts", "INT32", (-1,))

INPUT_IDS = TensorSpec("input_ids", "INT32", (-1,))
SEGMENT_LENGTHS = TensorSpec("segment_lengths", "INT32", (-1,))
PIXELS = TensorSpec("pixels", "UINT8", (-1,))
GRIDS = TensorSpec("grids", "INT32", (-1, 3))
SECONDS_PER_GRID = TensorSpec("seconds_per_grid", "FP32", (-1,))

INPUTS = (MESSAGES, RESPONSES, MEDIA)
FORWARD_INPUTS = (INPUT_IDS, SEGMENT_LENGTHS, PIXELS, GRIDS, SECONDS_PER_GRID)
OUTPUTS = (SCORES, TOKEN_COUNTS)


def forward_model(model: str) -> str:
    """Return the name of the ensemble's step that takes tokens."""
    return f"{model}_forward"
