"""Effects of short deadlines on a server: crashes, models that never drain, late work.

    python -m benchmarks.deadlines --output benchmarks/results/DATE-deadlines.json

Triton gets two deadlines with each call: gRPC's own, which ends the call, and the request
parameter `timeout`, which takes the request out of a queue. A policy says how large the second
is beside the first. Each policy has a server of its own, in turns.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from benchmarks.commands import run_main
from benchmarks.measure import machine, triton, writable
from triward.conversation import build_request
from triward.deadline import Deadline
from triward.wire import infer_arguments
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.serving.triton_http import read_metrics

CALLERS = 16
SHORTEST, LONGEST = 0.001, 0.050  # seconds
_FLAGS = ("--device=cpu", "--dtype=float32", "--threads=1", "--no-compile")
_COMPUTED = "triward_conversations_total"

# Seconds of a call -> seconds of gRPC's deadline and of Triton's timeout, where 0 means none.
Policy = Callable[[float], tuple[float, float]]
POLICIES: dict[str, Policy] = {
    "equal": lambda seconds: (seconds, seconds),
    "timeout at four fifths": lambda seconds: (seconds, 0.8 * seconds),
    "no timeout": lambda seconds: (seconds, 0.0),
    "deadline 2 s later": lambda seconds: (seconds + 2.0, seconds),
}


def call(client: InferenceServerClient, rng: Random, policy: Policy) -> str:
    """Send one request with a random deadline; the status that came back."""
    seconds = rng.uniform(SHORTEST, LONGEST)
    text = " ".join(str(rng.randrange(10**6)) for _ in range(rng.randrange(1, 60)))
    prompt = [{"role": "user", "content": text}]
    request = build_request(prompt, ["yes"], Deadline(60))
    deadline, timeout = policy(seconds)
    arguments: dict[str, Any] = infer_arguments(request, model="reward", remaining=deadline)
    arguments["timeout"] = int(timeout * 1e6)
    try:
        client.infer(**arguments)
    except InferenceServerException as error:
        return str(error.status())
    return "scored"


def run_policy(checkpoint: Path, policy: str, calls: int) -> dict[str, Any]:
    """Send all calls to a server of its own and stop it; what became of calls and server."""
    statuses: Counter[str] = Counter()
    lock = threading.Lock()
    log = Path(tempfile.mkstemp(suffix=".log")[1])
    begun = time.monotonic()
    with triton(checkpoint, *_FLAGS, log=log) as server:

        def caller(number: int) -> None:
            rng = Random(f"{policy}:{number}")
            with InferenceServerClient(server.endpoints.grpc) as client:
                for _ in range(calls // CALLERS):
                    status = call(client, rng, POLICIES[policy])
                    with lock:
                        statuses[status] += 1

        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(caller, range(CALLERS)))
        loaded = time.monotonic() - begun
        alive = server.http.is_ready()
        computed = 0.0
        if alive:
            page = read_metrics("127.0.0.1", server.endpoints.metrics_port, 10)
            computed = sum(series.value for series in page if series.name == _COMPUTED)
        stopping = time.monotonic()
    lines = log.read_text(errors="replace").splitlines()
    log.unlink()
    return {
        "policy": policy,
        "calls": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "computed": computed,
        "alive": alive,
        "load_s": round(loaded, 1),
        "stop_s": round(time.monotonic() - stopping, 1),
        "never_drained": any("Exit timeout expired" in line for line in lines[-5:]),
        "unloaded": [line.split("'")[1] for line in lines if "successfully unloaded" in line],
    }


def main(
    output: Annotated[Path, typer.Option(help="JSON file.")],
    calls: Annotated[int, typer.Option(min=CALLERS, help="Of each run.")] = 20_000,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each policy.")] = 1,
    policy: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
) -> None:
    """Run every policy in turns and write what came of it."""
    writable(output)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        make_checkpoint("tiny", 0, checkpoint)
        for _ in range(rounds):
            for name in policy or POLICIES:
                runs.append(run_policy(checkpoint, name, calls))
                print(json.dumps(runs[-1], indent=1), flush=True)
                output.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
