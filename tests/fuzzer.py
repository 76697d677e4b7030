"""Random requests by number, sent as they are, and what may come back for each.

Request n of a seed is `Fuzzer(checkpoint).request(n)`, whatever came before it: a failure names n.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests import loadgen, mutations
from triward_server.config import PreprocessConfig
from triward_server.intake.preprocess import Preprocessor

SEED = 20261122
DEADLINE = 60.0  # seconds; no request here takes one, so a hang is a failure

# A server for these: small limits, so that damage cannot ask for much work; and a tensor that
# Triton cannot read fails its whole batch, so each is preprocessed alone.
FLAGS = (
    "--dtype=float32", "--threads=1", "--max-tokens=1024", "--max-request-tokens=8192",
    "--max-image-pixels=1000000", "--embedding-cache-bytes=1000000",
    "--prefix-cache-bytes=16000000", "--preprocess-batch-size=1",
)  # fmt: skip

ASK = [{"role": "user", "content": "Is it so?"}]
LOOK = [
    {"role": "system", "content": "You judge."},
    {"role": "user", "content": [
        {"type": "image", "min_pixels": 3136, "max_pixels": 50176}, {"type": "text", "text": "?"},
    ]},
]  # fmt: skip
COMPARE = [
    {"role": "user", "content": [
        {"type": "text", "text": "<|im_end|>"}, {"type": "image"}, {"type": "text", "text": "or"},
        {"type": "image", "resized_height": 56, "resized_width": 84},
    ]},
    {"role": "assistant", "content": "Which?"},
    {"role": "user", "content": "Say."},
]  # fmt: skip


@dataclass(frozen=True)
class Fuzzed:
    """One request.

    Attributes:
        kind: how it was made.
        request: a ModelInferRequest, or bytes that may be none.
        may_expire: whether it gives Triton too little time on purpose.
        deadline: seconds of the call.
    """

    kind: str
    request: Any
    may_expire: bool = False
    deadline: float = DEADLINE


class Fuzzer:
    """All requests, by number.

    Args:
        checkpoint: whose tokens `reward_forward` is sent.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.files = mutations.image_files()
        self.features = self._features(checkpoint)
        self._kinds: tuple[Callable[[Random], Any], ...] = (
            self.json, self.json, self.image, self.image, self.image, self.text, self.tensors,
            self.tensors, self.values, self.forward_tensors, self.envelope, self.protobuf,
            self.hurry,
        )  # fmt: skip

    def request(self, number: int) -> Fuzzed:
        """The same for the same number."""
        rng = Random(f"{SEED}:{number}")
        make = rng.choice(self._kinds)
        return Fuzzed(make.__name__, make(rng), may_expire=make.__name__ == "hurry")

    def json(self, rng: Random) -> Any:
        """Damaged `messages`."""
        messages, media = rng.choice(((ASK, 0), (LOOK, 1), (COMPARE, 2)))
        text = mutations.damaged_json(rng, messages)
        return _reward(text, [b"yes"] * rng.choice((1, 1, 3)), rng.choices(self.files, k=media))

    def image(self, rng: Random) -> Any:
        """Damaged files."""
        messages, media = rng.choice(((LOOK, 1), (LOOK, 1), (COMPARE, 2)))
        files = [mutations.damaged_image(rng, self.files) for _ in range(media)]
        return _reward(messages, [b"yes"], files)

    def text(self, rng: Random) -> Any:
        """Any responses, any number of media."""
        messages, media = rng.choice(((ASK, 0), (LOOK, 1)))
        responses = [mutations.any_text(rng) for _ in range(rng.choice((0, 1, 1, 2, 9)))]
        return _reward(
            messages, responses, rng.choices(self.files, k=media + (not rng.randrange(9)))
        )

    def tensors(self, rng: Random) -> Any:
        """Damaged inputs of `reward`."""
        return loadgen.message("reward", mutations.damaged_tensors(rng, self._good(rng)))

    def values(self, rng: Random) -> Any:
        """`reward_forward` with values that do not fit each other."""
        arrays = mutations.damaged_features(rng, self.features)
        return loadgen.message("reward_forward", loadgen.features(**arrays))

    def forward_tensors(self, rng: Random) -> Any:
        """Damaged inputs of `reward_forward`."""
        tensors = mutations.damaged_tensors(rng, loadgen.features(**self.features))
        return loadgen.message("reward_forward", tensors)

    def envelope(self, rng: Random) -> Any:
        """Good inputs in a strange message."""
        message = loadgen.message("reward", self._good(rng))
        mutations.damaged_message(rng, message)
        return message

    def protobuf(self, rng: Random) -> Any:
        """Damaged bytes of a message."""
        message = loadgen.message("reward", self._good(rng))
        return mutations.damaged(rng, message.SerializeToString())

    def hurry(self, rng: Random) -> Any:
        """A good request with a strange timeout."""
        timeout = rng.choice((1, 1000, 20_000, 2**31, 2**62, -1, 0))
        return loadgen.message("reward", self._good(rng), timeout=timeout)

    def good(self) -> list[Any]:
        """Requests that must always score, and always the same."""
        return [
            _reward(ASK, [b"Yes.", b"No.", b""], []),
            _reward(LOOK, [b"It is."], self.files[:1]),
            _reward(COMPARE, [b"Left.", b"Right."], self.files[1:3]),
            loadgen.message("reward_forward", loadgen.features(**self.features)),
        ]

    def large(self) -> Any:
        """About the largest that this server's limits allow, which its buffers grow to once."""
        messages = [{"role": "user", "content": [{"type": "image", "min_pixels": 350_000}] * 2}]
        return _reward(messages, [b"yes"] * 40, self.files[:2])

    def _good(self, rng: Random) -> list[loadgen.Tensor]:
        messages, media = rng.choice(((ASK, 0), (LOOK, 1), (COMPARE, 2)))
        return loadgen.conversation(messages, [b"Yes.", b"No."], rng.choices(self.files, k=media))

    def _features(self, checkpoint: Path) -> dict[str, np.ndarray]:
        processed = Preprocessor(checkpoint, PreprocessConfig()).features(
            json.dumps(LOOK).encode(), [b"Yes, it is.", b"No."], self.files[:1]
        )
        segments = [processed.prompt_ids, *processed.response_ids]
        return {
            "input_ids": np.concatenate(segments).astype(np.int32),
            "segment_lengths": np.array([len(s) for s in segments], np.int32),
            "pixels": np.concatenate([image.reshape(-1) for image in processed.media]),
            "grids": np.array(
                [(1, i.shape[0] // 14, i.shape[1] // 14) for i in processed.media], np.int32
            ),
            "seconds_per_grid": np.array(processed.seconds_per_grid, np.float32),
        }


def _reward(messages: Any, responses: list[bytes], media: list[bytes]) -> Any:
    return loadgen.message("reward", loadgen.conversation(messages, responses, media))


def conversations_of(request: Any) -> int:
    """How many scores the answer must have."""
    for tensor in request.inputs:
        if tensor.name == "responses":
            return int(tensor.shape[-1])
        if tensor.name == "segment_lengths":
            return int(tensor.shape[-1]) - 1
    raise AssertionError("a request without conversations was answered with scores")


@dataclass
class Tally:
    """What came back."""

    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    wrong: list[str] = field(default_factory=list)

    def add(self, kind: str, status: str) -> None:
        self.statuses[kind][status] += 1


class Caller:
    """Sends messages as they are and judges the answers.

    Args:
        channel: to the server.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        # The same call for bytes that are perhaps no message.
        self._infer_bytes = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    def scores(self, request: Any, deadline: float = DEADLINE, patient: bool = False) -> np.ndarray:
        """Of a request that must be scored; a patient caller waits for the server, too."""
        return loadgen.scores_of(self._infer(request, timeout=deadline, wait_for_ready=patient))

    def judge(self, fuzzed: Fuzzed) -> tuple[str, str | None]:
        """The status, and what is wrong with the answer."""
        raw = isinstance(fuzzed.request, bytes)
        try:
            answer = (self._infer_bytes if raw else self._infer)(
                fuzzed.request, timeout=fuzzed.deadline
            )
        except grpc.RpcError as error:
            status, text = error.code().name, error.details() or ""
            return status, problem_of(fuzzed, status, text)
        if raw:
            return "OK", _problem_of_scores(answer)
        if not _asks_for_scores(fuzzed.request):
            return "OK", None
        if _is_certainly_wrong(fuzzed.request):
            return "OK", "what no reading makes right is scored"
        return "OK", _problem_of_scores(answer, conversations_of(fuzzed.request))


def _asks_for_scores(request: Any) -> bool:
    """Callers may ask for other outputs, and for the largest values as text: Triton's features."""
    names = {output.name for output in request.outputs if "classification" not in output.parameters}
    return not request.outputs or "scores" in names


def _is_certainly_wrong(request: Any) -> bool:
    """Whether a score would be made up, by rules that share no code with the server."""
    if len(request.raw_input_contents) < len(request.inputs):
        return True  # or given in another form, which is refused too
    # Surplus contents Triton does not look at.
    raws = {i.name: raw for i, raw in zip(request.inputs, request.raw_input_contents, strict=False)}
    if "messages" in raws:
        try:
            messages = json.loads(raws["messages"][4:])
            return not all(set(message) == {"role", "content"} for message in messages)
        except (ValueError, TypeError):
            return True
    lengths = np.frombuffer(raws["segment_lengths"], np.int32)
    return bool(4 * lengths.sum() != len(raws["input_ids"]))


def _problem_of_scores(answer: Any, count: int | None = None) -> str | None:
    try:
        scores = loadgen.scores_of(answer)
    except (AssertionError, KeyError, ValueError) as error:
        return f"no scores: {error!r}"
    if count is not None and scores.shape[1] != count:
        return f"{scores.shape[1]} scores for {count}"
    return None


# What Triton's own front end answers before any model sees the request, word for word.
TRITONS_OWN = (
    # Bytes that are no ModelInferRequest; gRPC's C++ library chooses the status.
    ("protobuf", "INTERNAL", r"Unable to parse request"),
    # A message whose model's name was damaged or cut off.
    ("protobuf", "NOT_FOUND", r"Request for unknown model: '.*' is not found"),
    ("protobuf", "NOT_FOUND", r"Request for unknown model: '.*' version .* is not found"),
    # A tensor that is said to lie in shared memory, which only an operator can register.
    ("envelope", "NOT_FOUND", r"Unable to find shared memory region: '.*'"),
)


def problem_of(fuzzed: Fuzzed, status: str, text: str) -> str | None:
    """Whether an error is one that a caller may be shown for this request."""
    for kind, code, words in TRITONS_OWN:
        if (fuzzed.kind, status) == (kind, code) and re.fullmatch(words, text, re.DOTALL):
            return None
    if len(text) > 1000:
        return f"{status} with {len(text)} characters: {text[:200]}"
    if status == "INVALID_ARGUMENT":
        return None
    if fuzzed.may_expire and status in ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED"):
        return None
    return f"{status}: {text[:500]}"
