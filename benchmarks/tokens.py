"""`score_tokens` beside `score_responses`: the same conversations, in turns, over gRPC.

    python -m benchmarks.tokens --size small --repeats 7 --output results.json

The ids and pixels are made before the clock starts, as a trainer has them from its own rollouts.
What the difference is made of: the server's decoding, resizing and tokenizing, and one step of the
ensemble less.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import typer

from benchmarks.commands import run_main
from benchmarks.measure import (
    CONCURRENCY,
    features,
    in_turns,
    machine,
    row,
    served,
    serving,
    writable,
)
from benchmarks.workloads import Workload, odd_sizes, workloads
from triward import RewardClient
from triward_server.config import PreprocessConfig
from triward_server.export.random_checkpoint import Size, make_checkpoint
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features

RESPONSES, TOKENS = "score_responses", "score_tokens"
_TOLERANCE = 1e-4  # relative above 1, as everywhere in float32


def chosen() -> dict[str, Workload]:
    """Conversations of their own, one group of eight, and photographs that must be resized."""
    available = workloads()
    return {name: available[name] for name in ("singles", "group-8")} | {"photos": odd_sizes()}


def by_tokens(client: RewardClient, requests: list[Features]) -> list[float]:
    """Send as many requests at a time as `served` does."""

    def ask(item: Features) -> list[float]:
        return client.score_tokens(item.prompt_ids, item.response_ids, media=item.media)

    if len(requests) == 1:
        return ask(requests[0])
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return [score for scores in pool.map(ask, requests) for score in scores]


def measure(
    client: RewardClient, preprocessor: Preprocessor, workload: Workload, repeats: int
) -> dict[str, Any]:
    """Median seconds of both calls, taken in turns.

    Raises:
        RuntimeError: they do not score the same.
    """
    requests = [features(preprocessor, group) for group in workload.groups]
    runs: dict[str, Callable[[], list[float]]] = {
        RESPONSES: partial(served, client, workload),
        TOKENS: partial(by_tokens, client, requests),
    }
    # The first pass warms up and is compared, not timed.
    reference, scores = (np.array(run()) for run in runs.values())
    distance = float(np.max(np.abs(scores - reference) / np.maximum(1, np.abs(reference))))
    if distance > _TOLERANCE:
        raise RuntimeError(f"{TOKENS} is {distance:.1e} from {RESPONSES}")
    seconds = in_turns(dict(runs), repeats)
    rows = {name: row(taken, len(reference)) for name, taken in seconds.items()}
    for name in rows:
        ratio = rows[RESPONSES]["median_s"] / rows[name]["median_s"]
        rows[name]["speedup"] = round(ratio, 3)
    # Each turn has met the same moment of the machine.
    turns = [a / b for a, b in zip(seconds[RESPONSES], seconds[TOKENS], strict=True)]
    return {
        "conversations": len(reference),
        "max_relative_distance": distance,
        "speedup_of_each_turn": [round(turn, 3) for turn in turns],
        "calls": rows,
    }


def main(
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "small",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure both calls on this machine's CPU, in float32, without an embedding cache."""
    writable(output)
    results: dict[str, Any] = {"machine": machine(), "size": size, "dtype": "float32"}
    results |= {"repeats": repeats, "workloads": {}}
    flags = (
        "--dtype=float32",
        "--device=cpu",
        "--embedding-cache-bytes=0",
        "--prefix-cache-bytes=0",
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        make_checkpoint(size, 0, checkpoint)
        preprocessor = Preprocessor(checkpoint, PreprocessConfig())
        with serving(checkpoint, *flags) as client:
            results["load_average_before"] = os.getloadavg()[0]
            for name, workload in chosen().items():
                result = measure(client, preprocessor, workload, repeats)
                results["workloads"][name] = result
                typer.echo(f"{name}: {result['calls'][TOKENS]['speedup']} x, {result}")
            results["load_average_after"] = os.getloadavg()[0]
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
