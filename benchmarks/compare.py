"""The model card's loop, the card's code on padded batches, our Scorer, and the served path.

    python -m benchmarks.compare --size small --workload group-8 --repeats 5
    python -m benchmarks.compare --architecture qwen3

The second is a text reward model, whose card's code is AutoModelForSequenceClassification. All four
run in turns in one process on one machine, warm, and the median of the turns counts, so that a slow
moment of the machine meets all of them. Every path scores the same conversations and
the scores are compared before a time is believed.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.commands import run_main
from benchmarks.measure import (
    features,
    in_turns,
    machine,
    row,
    scores,
    served,
    serving,
    timed,
    work,
    writable,
)
from benchmarks.plot import draw_speedups
from benchmarks.workloads import SMALL_IMAGE, TEXT, Workload, epochs, workloads
from triward import RewardClient
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.scoring import Scorer
from triward_server.export.random_checkpoint import Size, make_checkpoint
from triward_server.export.random_text_checkpoint import KINDS, make_text_checkpoint
from triward_server.intake.preprocess import Preprocessor
from triward_server.testing.oracle import Oracle, TextOracle

BASELINE = "card, one by one"
SCORER = "Scorer, in-process"
SERVED = "served, over gRPC"
EPOCH = "epoch"
CACHE_BYTES = 1 << 30


class Paths:
    """The ways to score a workload, each returning its scores in order."""

    def __init__(
        self, checkpoint: Path, client: RewardClient, oracle: Oracle | TextOracle, cache: int
    ) -> None:
        self._oracle = oracle
        self._preprocessor = Preprocessor(checkpoint, PreprocessConfig())
        config = ForwardConfig(
            dtype="float32",
            device="cpu",
            embedding_cache_bytes=cache,
            prefix_cache_bytes=-1 if cache else 0,
        )
        self._scorer = Scorer(checkpoint, config)
        self._client = client

    def all(self) -> dict[str, Callable[[Workload], list[float]]]:
        """Return the contestants by name; the others are compared with the first."""
        return {
            BASELINE: self.card,
            "card, padded batches of 8": self.padded,
            SCORER: self.in_process,
            SERVED: self.served,
        }

    def card(self, workload: Workload) -> list[float]:
        """Run the model card's loop."""
        return [self._oracle.score(messages) for messages in workload.conversations()]

    def padded(self, workload: Workload) -> list[float]:
        """Run the card's code, eight at a time."""
        rows = workload.conversations()
        batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        return [s for b in batches for s in self._oracle.score_inputs(self._oracle.inputs(b))]

    def in_process(self, workload: Workload) -> list[float]:
        """Preprocessing and the Scorer, one batch, no server."""
        return scores(self._scorer, [features(self._preprocessor, g) for g in workload.groups])

    def served(self, workload: Workload) -> list[float]:
        """Make the client's calls."""
        return served(self._client, workload)

    def ideal_speedup(self, workload: Workload) -> float:
        """FLOPs with nothing shared over FLOPs with everything shared."""
        batch = [features(self._preprocessor, group) for group in workload.groups]
        predicted = work(batch, self._scorer.geometry, self._scorer.cost)
        return predicted.flops_alone / predicted.flops


@contextmanager
def all_paths(checkpoint: Path, oracle: Oracle | TextOracle, cache: int) -> Iterator[Paths]:
    """All paths, with a server of their own."""
    flags = ["--dtype=float32", "--device=cpu", f"--embedding-cache-bytes={cache}"]
    if not cache:
        flags.append("--prefix-cache-bytes=0")
    with serving(checkpoint, *flags) as client:
        yield Paths(checkpoint, client, oracle, cache)


def measure(
    paths: Paths, workload: Workload, repeats: int, chosen: Sequence[str] | None
) -> dict[str, Any]:
    """Median seconds of each path, taken in turns, and how far its scores are from the card's."""
    runs = {
        name: run
        for name, run in paths.all().items()
        if name == BASELINE or chosen is None or name in chosen
    }
    reference = np.array(runs[BASELINE](workload))
    # The first pass warms up and is compared, not timed.
    distance = {
        name: 0.0 if name == BASELINE else _distance(run(workload), reference)
        for name, run in runs.items()
    }
    seconds = in_turns({name: partial(run, workload) for name, run in runs.items()}, repeats)
    rows = {name: row(taken, len(reference)) for name, taken in seconds.items()}
    for name in rows:
        speedup = rows[BASELINE]["median_s"] / rows[name]["median_s"]
        rows[name] |= {"speedup": round(speedup, 3), "max_relative_distance": distance[name]}
    return {
        "conversations": len(reference),
        "ideal_speedup": round(paths.ideal_speedup(workload), 3),
        "paths": rows,
    }


def measure_epochs(paths: Paths, repeats: int) -> dict[str, Any]:
    """Time, in each turn, a pass over new images and one over the same images with other text.

    Here a path is compared with its own first pass; the card's has nothing to remember.
    """
    runs = {name: paths.all()[name] for name in (BASELINE, SCORER, SERVED)}
    first: dict[str, list[float]] = {name: [] for name in runs}
    again: dict[str, list[float]] = {name: [] for name in runs}
    distance = dict.fromkeys(runs, 0.0)
    for turn in range(repeats + 1):
        unseen, seen = epochs(seed=turn)
        reference = np.array(runs[BASELINE](seen)) if turn == 0 else None
        for name, run in runs.items():
            first[name].append(timed(partial(run, unseen)))
            again[name].append(timed(partial(run, seen)))
            if reference is not None:
                distance[name] = _distance(run(seen), reference)
    count = len(unseen.conversations())
    rows = {}
    for name in runs:  # turn 0 warmed up
        rows[name] = row(again[name][1:], count)
        before = statistics.median(first[name][1:])
        rows[name] |= {
            "first_pass_median_s": round(before, 5),
            "first_pass_all_s": [round(s, 5) for s in first[name][1:]],
            "speedup": round(before / rows[name]["median_s"], 3),
            "max_relative_distance": distance[name],
        }
    return {"conversations": count, "paths": rows}


def _distance(values: list[float], reference: Any) -> float:
    return float(np.max(np.abs(np.array(values) - reference) / np.maximum(1, np.abs(reference))))


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    """Print one workload's rows."""
    against = "its own first pass" if name == EPOCH else "the card's loop"
    ideal = f", ideal {result['ideal_speedup']:.2f} x" if "ideal_speedup" in result else ""
    table = Table(title=f"{name}: {result['conversations']} conversations{ideal}")
    for column in ("path", "conversations/s", f"against {against}", "score distance"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for path, values in result["paths"].items():
        table.add_row(
            path, f"{values['conversations_per_s']:.2f}", f"{values['speedup']:.2f} x",
            f"{values['max_relative_distance']:.1e}",
        )  # fmt: skip
    console.print(table)


def main(
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "small",
    workload: Annotated[list[str] | None, typer.Option(help="Names; all by default.")] = None,
    path: Annotated[list[str] | None, typer.Option(help="Names; all by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    architecture: Annotated[
        str, typer.Option(help=f"qwen2_5_vl, or a text model: {', '.join(KINDS)}.")
    ] = "qwen2_5_vl",
    output: Annotated[
        Path | None, typer.Option(help="JSON file that gets these rows; a plot goes beside it.")
    ] = None,
) -> None:
    """Measure all paths side by side on this machine's CPU, in float32."""
    text = architecture in KINDS
    if not text and architecture != "qwen2_5_vl":
        raise typer.BadParameter(f"no architecture {architecture!r}")
    available = workloads(TEXT if text else SMALL_IMAGE)
    known = [*available] if text else [*available, EPOCH]
    chosen = workload or known
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        names = ", ".join(known)
        raise typer.BadParameter(f"no workload {unknown[0]!r}; there are {names}")
    writable(output, ".svg")
    console = Console()
    here = machine()
    results: dict[str, Any] = {"machine": here, "size": size, "dtype": "float32"}
    results |= {"architecture": architecture}
    results |= {"repeats": repeats, "workloads": {}}
    if output and output.exists():
        results["workloads"] = json.loads(output.read_text())["workloads"]

    def keep(name: str, result: dict[str, Any]) -> None:
        taken = {"date": here["date"], "commit": here["commit"], "repeats": repeats}
        rows = results["workloads"] | {name: taken | result}
        results["workloads"] = {name: rows[name] for name in [*available, EPOCH] if name in rows}
        show(console, name, result)
        if output:  # after each workload: a run that is stopped has measured what it has
            output.write_text(json.dumps(results, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        oracle = oracle_of(architecture, size, checkpoint)
        if set(chosen) - {EPOCH}:
            # No cache: a pass that repeats must not be faster for it.
            with all_paths(checkpoint, oracle, cache=0) as paths:
                for name in (n for n in chosen if n != EPOCH):
                    keep(name, measure(paths, available[name], repeats, path))
        if EPOCH in chosen:
            with all_paths(checkpoint, oracle, CACHE_BYTES) as paths:
                keep(EPOCH, measure_epochs(paths, repeats))
    if output:
        draw_speedups(results, output.with_suffix(".svg"))
        console.print(f"written to {output} and {output.with_suffix('.svg')}")


def oracle_of(architecture: str, size: Size, checkpoint: Path) -> Oracle | TextOracle:
    """Make a checkpoint and load it with the model card's code."""
    if architecture not in KINDS:
        make_checkpoint(size, 0, checkpoint)
        return Oracle(checkpoint)
    make_text_checkpoint(architecture, size, 0, checkpoint)
    # As fast as transformers is; Gemma 2's capped products are right in eager alone.
    return TextOracle(checkpoint, attention="eager" if architecture == "gemma2" else "sdpa")


if __name__ == "__main__":
    run_main(main)
