"""Names, dtypes and shapes of every tensor on the wire, and `Features`, their typed form.

The one place on the server's side: `model_repository/*/config.pbtxt` and the client's
`triward/protocol.py` repeat these, and a test compares all three. A dimension of -1 is variable;
the leading dimension of a request, always 1, is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]
Array = NDArray[Any]


@dataclass(frozen=True)
class ModelNames:
    """Names of one served model in Triton.

    Attributes:
        ensemble: the public name, chosen at export; the steps' names follow from it.
    """

    ensemble: str

    @classmethod
    def of(cls, forward: str) -> ModelNames:
        """Return the names of the model whose second step is called so."""
        return cls(forward.removesuffix("_forward"))

    @property
    def preprocess(self) -> str:
        """The first step."""
        return f"{self.ensemble}_preprocess"

    @property
    def forward(self) -> str:
        """The second step."""
        return f"{self.ensemble}_forward"

    @property
    def vision(self) -> str:
        """The vision tower, where it is an ONNX graph (docs/onnx.md)."""
        return f"{self.ensemble}_vision"

    @property
    def candidate(self) -> str:
        """A version that `switch` tries before callers get it."""
        return f"{self.ensemble}_candidate"

    @property
    def steps(self) -> tuple[str, ...]:
        """Steps behind the public name, in the order in which data flows."""
        return self.preprocess, self.forward


REWARD = ModelNames("reward")  # unless the export names it
ENSEMBLE, PREPROCESS, FORWARD = REWARD.ensemble, REWARD.preprocess, REWARD.forward
VISION = REWARD.vision
DRAINING = "reward_draining"  # stands in for every ensemble while the server shuts down
# How no public name may end, so that the names of several models never meet.
SUFFIXES = ("_preprocess", "_forward", "_draining", "_vision", "_candidate")

# Of the tensors below and what they mean. It is raised with every change that an older client or
# server would misunderstand; `contract.py` compares it.
CONTRACT_VERSION = 1

MAX_BATCH_SIZE = 64
FRAMES_PER_GRID = 2  # of a video, which the vision tower takes together

CANARY_ID = "triward-canary"  # the request id of health checks, whose scores are no callers'


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model: Triton's name for it, its Triton datatype and its dimensions."""

    name: str
    datatype: str
    dims: tuple[int, ...]


MESSAGES = TensorSpec("messages", "BYTES", (1,))
RESPONSES = TensorSpec("responses", "BYTES", (-1,))
MEDIA = TensorSpec("media", "BYTES", (-1,))

INPUT_IDS = TensorSpec("input_ids", "INT32", (-1,))
SEGMENT_LENGTHS = TensorSpec("segment_lengths", "INT32", (-1,))
PIXELS = TensorSpec("pixels", "UINT8", (-1,))
GRIDS = TensorSpec("grids", "INT32", (-1, 3))
SECONDS_PER_GRID = TensorSpec("seconds_per_grid", "FP32", (-1,))

SCORES = TensorSpec("scores", "FP32", (-1,))
TOKEN_COUNTS = TensorSpec("token_counts", "INT32", (-1,))

REWARD_INPUTS = (MESSAGES, RESPONSES, MEDIA)
REWARD_OUTPUTS = (SCORES, TOKEN_COUNTS)
FORWARD_INPUTS = (INPUT_IDS, SEGMENT_LENGTHS, PIXELS, GRIDS, SECONDS_PER_GRID)

# The vision tower's graph. A call is one row of P patches of all its images, so it has no leading
# dimension. Rectangles of rows are padded with -1.
PATCHES = TensorSpec("patches", "FP32", (-1, -1))
POSITIONS = TensorSpec("positions", "INT64", (-1, 2))
WINDOWS = TensorSpec("windows", "INT64", (-1, -1))
WINDOW_PLACES = TensorSpec("window_places", "INT64", (-1,))
FRAMES = TensorSpec("frames", "INT64", (-1, -1))
FRAME_PLACES = TensorSpec("frame_places", "INT64", (-1,))
EMBEDDINGS = TensorSpec("embeddings", "FP32", (-1, -1))

VISION_INPUTS = (PATCHES, POSITIONS, WINDOWS, WINDOW_PLACES, FRAMES, FRAME_PLACES)


class Grid(NamedTuple):
    """A media item's size in vision patches: frames in pairs, rows, columns (`grid_thw`)."""

    t: int
    h: int
    w: int

    @classmethod
    def of(cls, shape: tuple[int, ...], patch_size: int) -> Grid:
        """Return the grid of an image [H, W, 3] or a video [T, H, W, 3]."""
        *frames, height, width, _ = shape
        t = frames[0] // FRAMES_PER_GRID if frames else 1
        return cls(t, height // patch_size, width // patch_size)

    @property
    def patches(self) -> int:
        """Rows that the item takes in the vision tower."""
        return self.t * self.h * self.w

    def tokens(self, merge_size: int) -> int:
        """Placeholders that the item takes, each `merge_size` patches along each side."""
        return self.patches // merge_size**2


@dataclass(frozen=True)
class Features:
    """One request as the model reads it: N conversations that share a prompt and its media.

    Attributes:
        prompt_ids: int32 [P], the tokens that all conversations begin with, media placeholders
            expanded; P may be 0.
        response_ids: N arrays int32 [L_i], L_i >= 1: what follows the prompt in conversation i.
            Conversation i is `prompt_ids + response_ids[i]`, scored at its last token.
        media: images uint8 [H, W, 3] and videos uint8 [T, H, W, 3], T even, resized so that H and
            W are multiples of the vision tower's merged patch; in the order of their
            placeholders in `prompt_ids`.
        seconds_per_grid: for each video, in order, the seconds from one pair of frames to the next.
        probe: a health check, which computes all of its tokens, whatever the prefix cache has.
    """

    prompt_ids: Int32Array
    response_ids: tuple[Int32Array, ...]
    media: tuple[UInt8Array, ...] = ()
    seconds_per_grid: tuple[float, ...] = ()
    probe: bool = False

    @property
    def token_counts(self) -> list[int]:
        """Tokens of each conversation, prompt included."""
        return [len(self.prompt_ids) + len(ids) for ids in self.response_ids]


@dataclass(frozen=True)
class Scores:
    """The answer to one request: `scores` float32 [N] and `token_counts` int32 [N]."""

    scores: Float32Array
    token_counts: Int32Array
