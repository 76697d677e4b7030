"""What the HTTP gateway costs: the same requests through its doors and over gRPC, in one run.

    python -m benchmarks.doors --output benchmarks/results/DATE-doors.json

A real Triton serves an echo in place of a model, so that what carries a request is timed and
nothing else; beside a model the ratio is nearer to 1. Callers ask at once, all requests of a round
by one way, then by the other. The gateway is a process of its own, as the command starts it.
Callers, gateway and Triton share the machine.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.commands import run_main
from benchmarks.measure import CONCURRENCY, in_turns, machine, triton, writable
from benchmarks.workloads import PromptGroup, Writer, photo
from triward import RewardClient
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.testing.echo import make_echo

GRPC, HTTP = "gRPC", "gateway"

# The echo's own limits are not measured.
FLAGS = ("--dtype=float32", "--device=cpu", "--embedding-cache-bytes=0")


@dataclass(frozen=True)
class Asked:
    """A prompt with its responses, and the HTTP request that asks for the same.

    Attributes:
        group: the prompt and responses.
        path: of the door.
        body: for it.
        rewards: finds them in the answer.
    """

    group: PromptGroup
    path: str
    body: bytes
    rewards: Callable[[Any], list[float]]


def text_groups(write: Writer, count: int) -> list[Asked]:
    """Eight responses to a prompt of text each, as OpenRLHF sends them."""
    asked = []
    for _ in range(count):
        prompt, responses = write.prompt(400), tuple(write.text(40, 120) for _ in range(8))
        text = f"<|im_start|>user\n{prompt[0]['content'][0]['text']}<|im_end|>\n"
        text += "<|im_start|>assistant\n"
        body = {"query": [f"{text}{each}<|im_end|>" for each in responses], "prompts": [text] * 8}
        wanted = {"role": "user", "content": prompt[0]["content"][0]["text"]}
        group = PromptGroup([wanted], responses)
        data = json.dumps(body).encode()
        asked.append(Asked(group, "/get_reward", data, lambda answer: list(answer["rewards"])))
    return asked


def images(write: Writer, count: int) -> list[Asked]:
    """One response to a prompt with an image each, as vLLM's clients send it."""
    asked = []
    for _ in range(count):
        packed = BytesIO()
        photo(write.rng, 336, 252).save(packed, "PNG")
        prompt, response = write.prompt(60, packed.getvalue()), write.text(40, 120)
        url = f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"
        shown = [{"type": "image_url", "image_url": {"url": url}}, prompt[0]["content"][1]]
        said = {"role": "assistant", "content": response}
        body = {"messages": [{"role": "user", "content": shown}, said]}
        asked.append(
            Asked(
                PromptGroup(prompt, (response,)), "/classify", json.dumps(body).encode(),
                lambda answer: list(answer["data"][0]["probs"]),
            )
        )  # fmt: skip
    return asked


WORKLOADS: dict[str, Callable[[Writer, int], list[Asked]]] = {
    "8 responses to a prompt of text, /get_reward": text_groups,
    "an image and a response, /classify": images,
}


def over_grpc(client: RewardClient, asked: Asked) -> list[float]:
    """Ask with the client."""
    return client.score_responses(asked.group.prompt, asked.group.responses)


def through_a_door(port: int, asked: Asked) -> list[float]:
    """Ask as trainers do: with a connection for each request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        kind = {"Content-Type": "application/json"}
        connection.request("POST", asked.path, asked.body, kind)
        answer = connection.getresponse()
        told = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {told}")
        return asked.rewards(told)
    finally:
        connection.close()


@contextmanager
def gateway(url: str) -> Iterator[int]:
    """Run the command; its port."""
    line = [sys.executable, "-m", "triward", "gateway", "--url", url, "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield int(process.stdout.readline().rpartition(":")[2])
        finally:
            process.terminate()


def all_of(
    asked: Sequence[Asked], ask: Callable[[Asked], list[float]], callers: int
) -> list[list[float]]:
    """All requests, from so many callers at once."""
    with ThreadPoolExecutor(callers) as threads:
        return list(threads.map(ask, asked))


def measure(
    ways: Mapping[str, Callable[[Asked], list[float]]],
    asked: Sequence[Asked],
    callers: int,
    repeats: int,
) -> dict[str, Any]:
    """Return requests a second by each way, whose rewards must be the same, bit for bit."""
    if len({json.dumps(all_of(asked, ask, callers)) for ask in ways.values()}) > 1:
        raise RuntimeError("the two ways give different rewards")
    runs: dict[str, Callable[[], object]]
    runs = {name: partial(all_of, asked, ask, callers) for name, ask in ways.items()}
    seconds = in_turns(runs, repeats)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "callers": callers,
        "requests": len(asked),
        "bytes_of_a_body": round(statistics.mean(len(each.body) for each in asked)),
        "all_s": {name: [round(s, 4) for s in each] for name, each in seconds.items()},
        "requests_per_s": {n: round(len(asked) / each, 1) for n, each in medians.items()},
        "gateway_over_grpc": round(medians[GRPC] / medians[HTTP], 3),
    }


def main(
    output: Annotated[Path, typer.Option(help="JSON file.")],
    requests: Annotated[int, typer.Option(min=1, help="Of a round.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each way.")] = 9,
    shared: Annotated[bool, typer.Option(help="Note that others used the machine.")] = False,
) -> None:
    """Measure all workloads, by one caller and by many, and write the results."""
    writable(output)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        make_checkpoint("tiny", 0, checkpoint)
        with (
            triton(checkpoint, *FLAGS, change=make_echo) as server,
            RewardClient(server.endpoints.grpc, timeout=600) as client,
            gateway(server.endpoints.grpc) as port,
        ):
            ways = {GRPC: partial(over_grpc, client), HTTP: partial(through_a_door, port)}
            for name, make in WORKLOADS.items():
                asked = make(Writer(np.random.default_rng(0)), requests)
                rows[name] = [measure(ways, asked, n, repeats) for n in (1, CONCURRENCY)]
                for each in rows[name]:
                    rates = each["requests_per_s"]
                    print(f"{name}, {each['callers']} callers: {rates},", end=" ")
                    print(f"gateway/gRPC {each['gateway_over_grpc']}")
    note = {"shared": shared, "load_average": [round(v, 2) for v in os.getloadavg()]}
    results = {"machine": machine() | note, "workloads": rows}
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
