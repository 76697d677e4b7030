"""A run as text to copy: as JSON, as a `curl` for Triton's HTTP, as Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pprint import pformat
from typing import Any

from triward import protocol
from triward.channel import Tls
from triward.conversation import encode_messages, encode_responses

from triward_tools.playground.asking import Reply
from triward_tools.playground.bars import preferred
from triward_tools.playground.form import Draft


@dataclass(frozen=True)
class Exchange:
    """A run: what was asked of whom, and the answer.

    Attributes:
        draft: what was sent.
        reply: what came back.
        url: gRPC address of the server.
        model: name of its ensemble.
    """

    draft: Draft
    reply: Reply
    url: str
    model: str


def as_json(asked: Exchange) -> str:
    """Return everything; `messages` and `responses` are a line for `triward score --input`."""
    draft, reply = asked.draft, asked.reply
    best = reply.ranking
    value: dict[str, Any] = {
        "server": asked.url,
        "model": asked.model,
        "messages": draft.messages(by_name=True),
        "responses": list(draft.responses),
        "scores": list(reply.scores),
        "ranking": best,
        "margins": [
            {"better": i, "worse": j, "margin": margin, "preferred": preferred(margin)}
            for i, j in pairwise(best)
            for margin in [reply.scores[i] - reply.scores[j]]
        ],
        "tokens": list(reply.tokens),
        "prompt_tokens": reply.prompt_tokens,
        "milliseconds": round(reply.milliseconds, 3),
    }
    return json.dumps(value, indent=2, ensure_ascii=False)


def as_curl(
    asked: Exchange, http: str, tls: Tls | None = None, header_names: Sequence[str] = ()
) -> str:
    """Return a command for a shell with the request's own tensors.

    A file travels as it is, in the binary form that Triton's HTTP has for tensors; its name stands
    in the command, and the file must lie in the folder where the command runs.

    Args:
        asked: the run.
        http: address of Triton's HTTP, as http://localhost:8000.
        tls: whose files `curl` uses.
        header_names: whose values may be secret, and are left out.
    """
    draft = asked.draft
    body = _body(draft)
    where = _options(tls, header_names) + shlex.quote(f"{http}/v2/models/{asked.model}/infer")
    if draft.media is None:
        lines = [f"printf '%s' {shlex.quote(body)} |", f"  curl -sS --data-binary @- {where}"]
        return "\n".join(lines) + "\n"
    size = draft.size
    length = "".join(f"\\{byte:03o}" for byte in size.to_bytes(4, "little"))
    return (
        f"# Run it where {draft.media.name} lies; the file has {size} bytes.\n"
        f"{{ printf '%s' {shlex.quote(body)}\n"
        f"  printf '{length}'\n"
        f"  cat {shlex.quote(f'./{draft.media.name}')}\n"
        f"}} | curl -sS --data-binary @- -H 'Content-Type: application/octet-stream' \\\n"
        f"  -H 'Inference-Header-Content-Length: {len(body.encode())}' {where}\n"
    )


def as_python(asked: Exchange, tls: Tls | None = None, header_names: Sequence[str] = ()) -> str:
    """Return a program that gets the same scores; the values of headers may be secret."""
    settings = "" if asked.model == protocol.MODEL else f", model={asked.model!r}"
    if tls:
        settings += f", tls={tls!r}"
    if header_names:
        headers = dict.fromkeys(header_names, "...")
        settings += f", headers={headers!r}"
    names = "RewardClient, Tls" if tls else "RewardClient"
    messages = pformat(asked.draft.messages(by_name=True), width=88, sort_dicts=False)
    responses = pformat(list(asked.draft.responses), width=88)
    return (
        f"from triward import {names}\n\n"
        f"messages = {messages}\n"
        f"responses = {responses}\n\n"
        f"with RewardClient({asked.url!r}{settings}) as client:\n"
        f"    scores = client.score_responses(messages, responses)\n"
        f"for score, response in sorted(zip(scores, responses), key=lambda pair: -pair[0]):\n"
        f"    print(score, response)\n"
    )


def _options(tls: Tls | None, header_names: Sequence[str]) -> str:
    """Return options of `curl`, each with a space behind it."""
    options = [("-H", f"{name}: ...") for name in header_names]
    if tls:
        named = (("--cacert", tls.ca), ("--cert", tls.certificate), ("--key", tls.key))
        options += [(option, str(path)) for option, path in named if path]
    return "".join(f"{option} {shlex.quote(value)} " for option, value in options)


def _body(draft: Draft) -> str:
    """Return the request of KServe's HTTP, without the file behind it."""
    messages, _ = encode_messages(draft.messages(by_name=True))
    texts = [each.decode() for each in encode_responses(draft.responses)]
    inputs = [
        _tensor(protocol.MESSAGES, [messages.decode()]),
        _tensor(protocol.RESPONSES, texts),
        _tensor(protocol.MEDIA, []),
    ]
    if draft.media:
        size = 4 + draft.size  # BYTES: each element has its length in front
        del inputs[2]["data"]
        inputs[2] |= {"shape": [1, 1], "parameters": {"binary_data_size": size}}
    return json.dumps(
        {
            "inputs": inputs,
            "outputs": [{"name": output.name} for output in protocol.OUTPUTS],
            "parameters": {"contract_version": protocol.CONTRACT_VERSION},
        },
        ensure_ascii=False,
    )


def _tensor(spec: protocol.TensorSpec, data: list[str]) -> dict[str, Any]:
    shape = [1, len(data)]
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": data}
