"""Throughput of two forward processes of one thread each beside one: `export --devices cpu,cpu`.

    python -m benchmarks.instances --output benchmarks/results/DATE-instances.json

Two servers score the same conversations, in turns. Callers send token ids, so that the forward
model alone has work: preprocessing would take a core of its own. A process takes two requests at
once, so that none has much left to do when the other has done all.

On a machine that others use, two processes may get no more of it than one. So the processes' own
processor time is taken too: what one needs alone, over what the busier of two needs, is the
speed-up if each has a core.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
import typer

from benchmarks.commands import run_main
from benchmarks.measure import features, in_turns, machine, row, triton, writable
from benchmarks.tokens import by_tokens
from benchmarks.workloads import PromptGroup, Writer
from triward import RewardClient
from triward_server.config import PreprocessConfig
from triward_server.export.options import Size
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.intake.preprocess import Preprocessor

DEVICES = ("cpu", "cpu,cpu")
REQUESTS = 48
_TOLERANCE = 1e-4


def spent(pid: int) -> list[float]:
    """Seconds of processor time of each forward process below tritonserver."""
    below = psutil.Process(pid).children(recursive=True)
    forward = [p for p in below if any("/reward_forward/" in each for each in p.cmdline()[1:2])]
    return [sum(process.cpu_times()[:2]) for process in sorted(forward, key=lambda p: p.pid)]


def main(
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "small",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure both on this machine's CPU, in float32."""
    writable(output)
    results: dict[str, Any] = {"machine": machine(), "size": size, "dtype": "float32"}
    # Every turn asks the same; nothing of the turn before may answer it.
    flags = (
        "--dtype=float32", "--threads=1", "--forward-batch-size=2", "--no-verify",
        "--prefix-cache-bytes=0",
    )  # fmt: skip
    write = Writer(np.random.default_rng(0))
    groups = [
        PromptGroup(write.prompt(write.between(60, 140)), (write.text(20, 60),))
        for _ in range(REQUESTS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        make_text_checkpoint("qwen3", size, 0, checkpoint)
        preprocessor = Preprocessor(checkpoint, PreprocessConfig())
        requests = [features(preprocessor, group) for group in groups]
        with (
            triton(checkpoint, f"--devices={DEVICES[0]}", *flags) as one,
            triton(checkpoint, f"--devices={DEVICES[1]}", *flags) as two,
            RewardClient(one.endpoints.grpc, timeout=600) as ask_one,
            RewardClient(two.endpoints.grpc, timeout=600) as ask_two,
        ):
            runs: dict[str, Callable[[], list[float]]] = {
                name: partial(by_tokens, client, requests)
                for name, client in zip(DEVICES, (ask_one, ask_two), strict=True)
            }
            first, second = (np.array(run()) for run in runs.values())
            distance = float(np.max(np.abs(first - second) / np.maximum(1, np.abs(first))))
            if distance > _TOLERANCE:
                raise RuntimeError(f"two instances score {distance:.1e} from one")
            results["load_average_before"] = os.getloadavg()[0]
            before = [spent(server.pid) for server in (one, two)]
            seconds = in_turns(dict(runs), repeats)
            after = [spent(server.pid) for server in (one, two)]
            results["load_average_after"] = os.getloadavg()[0]
    turns = [a / b for a, b in zip(seconds["cpu"], seconds["cpu,cpu"], strict=True)]
    cpu = [np.subtract(late, early) for late, early in zip(after, before, strict=True)]
    results |= {
        "cpu_s": {name: each.round(2).tolist() for name, each in zip(DEVICES, cpu, strict=True)},
        "speedup_with_a_core_each": round(float(cpu[0].max() / cpu[1].max()), 3),
        "conversations": len(first),
        "max_relative_distance": distance,
        "speedup_of_each_turn": [round(turn, 3) for turn in turns],
        "devices": {name: row(taken, len(first)) for name, taken in seconds.items()},
    }
    typer.echo(json.dumps(results, indent=2))
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
