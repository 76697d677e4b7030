"""vLLM's doors for models that score: /classify, /score and /pooling.

Unknown fields are ignored, as vLLM does. Those that would make vLLM return another number are
refused. There is no `usage`: the gateway does not count tokens.
"""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Sequence
from typing import Any

from triward.conversation import Messages
from triward.errors import InvalidRequest

from triward_tools.gateway.settings import Door, Request, Settings
from triward_tools.gateway.texts import conversations_of, text_list

_RAW = "the reward is no probability; ask for it as it is, with `use_activation` false or absent"
_WHOLE = "nothing is truncated"
_TEMPLATE = "conversations are rendered by the reward model's own template"

# Field -> (values that change nothing, why others are refused).
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "use_activation": ((None, False), _RAW),
    "activation": ((None, False), _RAW),
    "softmax": ((None, False), _RAW),
    "truncate_prompt_tokens": ((None,), _WHOLE),
    "dimensions": ((None,), "a reward has one"),
    "chat_template": ((None,), _TEMPLATE),
    "chat_template_kwargs": ((None, {}), _TEMPLATE),
    "add_generation_prompt": ((None, False), _TEMPLATE),
    "continue_final_message": ((None, False), _TEMPLATE),
    "mm_processor_kwargs": ((None, {}), "limits of pixels stand in the image's part"),
    "media_io_kwargs": ((None, {}), "media are decoded as the reward model does"),
}

_PAIRS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


def check_fields(request: Request, settings: Settings) -> None:
    """See that the model is ours, and that no field asks for another number than the reward.

    Raises:
        InvalidRequest: one does.
    """
    settings.check_model(request.get("model"))
    for name, (harmless, why) in _REFUSED.items():
        if request.get(name) not in harmless:
            raise InvalidRequest(f"{name}: {request[name]!r:.50}; {why}")


def read_inputs(request: Request, settings: Settings) -> list[Messages]:
    """Return the conversations of /classify and /pooling: `messages` is one, `input` are texts."""
    check_fields(request, settings)
    if request.get("messages") is not None:
        if not isinstance(request["messages"], list):
            raise InvalidRequest("messages: must be a list")
        return [request["messages"]]
    texts = text_list(request.get("input"), "input")
    return conversations_of(texts, "input", settings)


def read_asked(request: Request, settings: Settings) -> list[Messages]:
    """Return the conversations of /score: the first of each pair is asked, the second answers."""
    check_fields(request, settings)
    names = next((pair for pair in _PAIRS if pair[1] in request), ("text_1", "text_2"))
    prompts, responses = (_contents(request.get(name), name) for name in names)
    if len(prompts) not in (1, len(responses)):
        counts = f"{len(prompts)} and {len(responses)}"
        raise InvalidRequest(f"{names[0]}, {names[1]}: must be 1 and N or N and N, got {counts}")
    shared = prompts * len(responses) if len(prompts) == 1 else prompts
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in zip(shared, responses, strict=True)
    ]


def _contents(value: Any, name: str) -> list[Any]:
    """Return contents of messages: texts, or OpenAI's parts in `{"content": [...]}`."""
    if isinstance(value, dict):
        parts = value.get("content")
        # One dict holds one content, of any number of parts.
        values: list[Any] = [parts]
    else:
        values = value if isinstance(value, list) else [value]
        values = [each.get("content") if isinstance(each, dict) else each for each in values]
    if not values or not all(isinstance(each, (str, list)) for each in values):
        raise InvalidRequest(f"{name}: must be texts or contents, at least 1")
    return values


def classified(request: Request, scores: list[float], settings: Settings) -> dict[str, Any]:
    """Return the answer of /classify, whose `probs` is the reward alone."""
    return _listed("classify", settings, [
        {"index": i, "label": "LABEL_0", "probs": [score], "num_classes": 1}
        for i, score in enumerate(scores)
    ])  # fmt: skip


def scored(request: Request, scores: list[float], settings: Settings) -> dict[str, Any]:
    """Return the answer of /score."""
    return _listed("score", settings, [
        {"index": i, "object": "score", "score": score} for i, score in enumerate(scores)
    ])  # fmt: skip


def read_pooled(request: Request, settings: Settings) -> list[Messages]:
    """Return the conversations of /pooling."""
    _encoding(request)
    if request.get("task") not in (None, "classify", "reward"):
        raise InvalidRequest(f"task: {request['task']!r:.50}; a conversation has one reward")
    return read_inputs(request, settings)


def pooled(request: Request, scores: list[float], settings: Settings) -> dict[str, Any]:
    """Return the answer of /pooling: a list of one float, or base64 of a float32."""
    packed = _encoding(request) == "base64"
    return _listed("pool", settings, [
        {"index": i, "object": "pooling", "data": _packed(score) if packed else [score]}
        for i, score in enumerate(scores)
    ])  # fmt: skip


def _encoding(request: Request) -> str:
    for name, known in {
        "encoding_format": (None, "float", "base64"),
        "embed_dtype": (None, "float32"),
        "endianness": (None, "native", "little"),
    }.items():
        if request.get(name) not in known:
            raise InvalidRequest(f"{name}: must be one of {known[1:]}, got {request[name]!r:.50}")
    return str(request.get("encoding_format") or "float")


def _packed(score: float) -> str:
    return base64.b64encode(struct.pack("<f", score)).decode()


def _listed(kind: str, settings: Settings, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": settings.models[0],
        "data": data,
    }


CLASSIFY = Door("vllm_classify", ("/classify", "/v1/classify"), read_inputs, classified)
SCORE = Door("vllm_score", ("/score", "/v1/score"), read_asked, scored)
POOLING = Door("vllm_pooling", ("/pooling",), read_pooled, pooled)
