"""The wire contract: names, datatypes and dims of the ensemble's tensors.

One request is one row: an array on the wire has a leading dimension of 1 in front of `dims`. All
inputs are always present; a conversation without media sends `media` with shape [1, 0].
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "reward"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model.

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

INPUTS = (MESSAGES, RESPONSES, MEDIA)
OUTPUTS = (SCORES, TOKEN_COUNTS)
