"""The model card's loop, the card's code on padded batches, our Scorer, and the served path.

    python -m benchmarks.compare [--size small] [--workload group-8 …] [--repeats 5]

All four run in turns in one process on one machine, warm, and the median of the turns counts, so
that a slow moment of the machine meets all of them. Every path scores the same conversations and
the scores are compared before a time is believed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.workloads import Group, Workload, workloads
from triward import RewardClient
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.launch import Endpoints, TritonServer
from triward_server.preprocess import Preprocessor
from triward_server.random_checkpoint import Size, make_checkpoint
from triward_server.schema import Features, Scores
from triward_server.scoring import Scorer
from triward_server.testing import Oracle

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "trl", "numpy", "tritonclient", "nvidia-pytriton")
BASELINE = "card, one by one"


class Paths:
    """The four ways to score a workload, each returning its scores in order."""

    def __init__(self, checkpoint: Path, client: RewardClient) -> None:
        self._oracle = Oracle(checkpoint)
        self._preprocessor = Preprocessor(checkpoint, PreprocessConfig())
        # No cache: a pass that repeats must not be faster for it.
        config = ForwardConfig(dtype="float32", device="cpu", embedding_cache_bytes=0)
        self._scorer = Scorer(checkpoint, config)
        self._client = client

    def all(self) -> dict[str, Callable[[Workload], list[float]]]:
        """By name; the first is what the others are compared with."""
        return {
            BASELINE: self._card,
            "card, padded batches of 8": self._padded,
            "Scorer, in-process": self._in_process,
            "served, over gRPC": self._served,
        }

    def _card(self, workload: Workload) -> list[float]:
        return [self._oracle.score(messages) for messages in workload.conversations()]

    def _padded(self, workload: Workload) -> list[float]:
        rows = workload.conversations()
        batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        return [s for b in batches for s in self._oracle.score_inputs(self._oracle.inputs(b))]

    def _in_process(self, workload: Workload) -> list[float]:
        results = self._scorer.score([self._features(group) for group in workload.groups])
        return [float(s) for result in results for s in _scores(result)]

    def _features(self, group: Group) -> Features:
        media: list[bytes] = []
        for message in group.prompt:
            for part in message["content"]:
                if part["type"] == "image":
                    buffer = BytesIO()
                    part["image"].save(buffer, "BMP")
                    media.append(buffer.getvalue())
        wire = json.dumps(group.prompt, default=lambda image: None)
        wire = wire.replace(', "image": null', "")
        responses = [response.encode() for response in group.responses]
        return self._preprocessor.features(wire.encode(), responses, media)

    def _served(self, workload: Workload) -> list[float]:
        if workload.separate or len(workload.groups) > 1:
            return self._client.score_many(workload.conversations(), concurrency=16)
        (group,) = workload.groups
        return self._client.score_responses(group.prompt, group.responses)


def _scores(result: object) -> Any:
    if not isinstance(result, Scores):
        raise RuntimeError(f"the Scorer answered {result!r}")
    return result.scores


def measure(paths: Paths, workload: Workload, repeats: int) -> dict[str, Any]:
    """Median seconds of each path, taken in turns, and how far its scores are from the card's."""
    runs = paths.all()
    reference = np.array(runs[BASELINE](workload))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    distance: dict[str, float] = {}
    for name, run in runs.items():  # the first pass warms up and is compared, not timed
        scores = np.array(run(workload))
        distance[name] = float(
            np.max(np.abs(scores - reference) / np.maximum(1, np.abs(reference)))
        )
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(workload)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "conversations": len(reference),
        "paths": {
            name: {
                "median_s": round(medians[name], 4),
                "all_s": [round(s, 4) for s in seconds[name]],
                "conversations_per_s": round(len(reference) / medians[name], 3),
                "speedup": round(medians[BASELINE] / medians[name], 3),
                "max_relative_distance": distance[name],
            }
            for name in runs
        },
    }


def machine() -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "gpu": None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text()
    lines = [line for line in info.splitlines() if line.startswith("model name")]
    return lines[0].split(":")[1].strip() if lines else platform.machine()


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    """Print one workload's rows."""
    table = Table(title=f"{name}: {result['conversations']} conversations")
    for column in ("path", "conversations/s", "against the card's loop", "score distance"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for path, row in result["paths"].items():
        table.add_row(
            path, f"{row['conversations_per_s']:.2f}", f"{row['speedup']:.2f} x",
            f"{row['max_relative_distance']:.1e}",
        )  # fmt: skip
    console.print(table)


def main(
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "small",
    workload: Annotated[list[str] | None, typer.Option(help="Names; all by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Measure all paths side by side on this machine's CPU, in float32."""
    available = workloads()
    unknown = sorted(set(workload or []) - set(available))
    if unknown:
        raise typer.BadParameter(f"no workload {unknown[0]!r}; there are {', '.join(available)}")
    console = Console()
    results: dict[str, Any] = {"machine": machine(), "size": size, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, repository = Path(folder, "checkpoint"), Path(folder, "repository")
        make_checkpoint(size, 0, checkpoint)
        _export(checkpoint, repository)
        free = Endpoints("127.0.0.1", grpc_port=0, http_port=0, metrics_port=0)
        with (
            Path(folder, "triton.log").open("w") as log,
            TritonServer(repository, free, log=log) as server,
            RewardClient(server.endpoints.grpc, timeout=600) as client,
        ):
            paths = Paths(checkpoint, client)
            results["workloads"] = {}
            for name in workload or available:
                result = measure(paths, available[name], repeats)
                results["workloads"][name] = result
                show(console, name, result)
    results["torch_threads"] = torch.get_num_threads()
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"written to {output}")


def _export(checkpoint: Path, repository: Path) -> None:
    script = ROOT / "export" / "build_repository.py"
    subprocess.run(
        [sys.executable, str(script), f"--checkpoint={checkpoint}", f"--output={repository}",
         "--dtype=float32", "--device=cpu", "--preprocess-instances=2",
         "--embedding-cache-bytes=0"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
