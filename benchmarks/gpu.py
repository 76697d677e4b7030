"""One GPU: build a checkpoint, check it against the model card's code, and time everything.

    python -m benchmarks.gpu [--size 7b] [--device cuda] [--output FILE]

Parity comes first: what is not the card's number is not worth timing. Ceilings are measured in the
same run, so that shares of them mean something on this machine. Without a GPU the results file
says so and its rows are empty; `--device cpu --size tiny` runs the same steps for the test suite.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import typer

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
from benchmarks.workloads import LARGE_IMAGE, SMALL_IMAGE, Workload, odd_sizes, workloads
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.scoring import Scorer
from triward_server.errors import LaunchError
from triward_server.export.random_checkpoint import Size, make_checkpoint
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features
from triward_server.testing.oracle import Oracle, fp32_budget

STEPS = (
    "ceilings",
    "warm_up",
    "parity",
    "determinism",
    "timing",
    "memory",
    "synchronisations",
    "resizing",
    "served",
)
PARITY_RESPONSES = 64
# Of one workload, what the card's code is timed with at most: one by one, and as a padded batch.
CARD_LOOP, CARD_BATCH = 4, 8


class Bench:
    """Everything that is measured, one step a method."""

    def __init__(
        self, size: Size, device: str, repeats: int, chosen: list[str] | None, folder: Path
    ) -> None:
        self.repeats = repeats
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.checkpoint = folder / "checkpoint"
        make_checkpoint(size, 0, self.checkpoint, device)
        self.workloads = workloads(LARGE_IMAGE if size == "7b" else SMALL_IMAGE)
        self.timed = {
            name: workload
            for name, workload in self.workloads.items()
            if chosen is None or name in chosen
        }
        self.matmul_tflops: float | None = None
        self.oracle = Oracle(self.checkpoint, self.dtype, device)
        self.preprocessor = Preprocessor(self.checkpoint, PreprocessConfig())
        self.config = ForwardConfig(
            dtype="bfloat16" if self.dtype == torch.bfloat16 else "float32",
            device=device,
            embedding_cache_bytes=0,  # a pass that repeats must not be faster for it
            compile=self.device.type == "cuda",
        )

    @cached_property
    def scorer(self) -> Scorer:
        """The model as it is served, warmed up."""
        return self._warm(self.config)

    @cached_property
    def exact(self) -> Scorer:
        """The same in deterministic mode."""
        return self._warm(replace(self.config, deterministic=True))

    def _warm(self, config: ForwardConfig) -> Scorer:
        scorer = Scorer(self.checkpoint, config)
        self.warm_up_s = timed(scorer.warm_up)
        return scorer

    def features(self, workload: Workload) -> list[Features]:
        """Return a workload's requests."""
        return [features(self.preprocessor, group) for group in workload.groups]

    def ceilings(self) -> dict[str, Any]:
        """Matrix product in the model's dtype and copy, the best of several."""
        n = 8192 if self.device.type == "cuda" else 512
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        source = torch.empty(8 * n * n, device=self.device)
        target = torch.empty_like(source)
        times = in_turns({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 20)
        self.matmul_tflops = 2 * n**3 / min(times["matmul"]) / 1e12
        return {
            "matmul_size": n,
            "matmul_tflops": self.matmul_tflops,
            "copy_gb_per_s": 2 * source.nbytes / min(times["copy"]) / 1e9,
        }

    def parity(self) -> dict[str, Any]:
        """64 responses to one prompt against the card, whose own noise is the measure."""
        group = self.workloads[f"group-{PARITY_RESPONSES}"]
        rows = group.conversations()
        one = np.array([self.oracle.score(messages) for messages in rows])
        eights = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        padded = np.array(
            [s for some in eights for s in self.oracle.score_inputs(self.oracle.inputs(some))]
        )
        ours = np.array(scores(self.scorer, self.features(group)))
        noise = float(np.abs(padded - one).max())
        # Pairs that the card itself tells apart must be told apart the same way.
        gap = one[:, None] - one[None]
        clear = np.abs(gap) > noise
        swapped = clear & (np.sign(gap) != np.sign(ours[:, None] - ours[None]))
        distance = float(np.abs(ours - one).max())
        # In float32 the card's noise can be smaller than any rounding: the tests' budget holds.
        budget = max(fp32_budget(float(score)) for score in one)
        allowed = noise if self.dtype == torch.bfloat16 else max(noise, budget)
        return {
            "responses": len(one),
            "score_range": [float(one.min()), float(one.max())],
            "card_batch_1_to_8_max": noise,
            "max_distance": distance,
            "rms_distance": float(np.sqrt(np.mean((ours - one) ** 2))),
            "card_rms": float(np.sqrt(np.mean((padded - one) ** 2))),
            "within_noise": distance <= allowed,
            "clear_pairs": int(clear.sum()) // 2,
            "swapped_pairs": int(swapped.sum()) // 2,
        }

    def warm_up(self) -> dict[str, Any]:
        """Time warming up, and the first request after it against later ones."""
        batch = self.features(self.workloads["group-8"])
        scorer = self.scorer
        taken = [timed(partial(scorer.score, batch)) for _ in range(6)]
        return {
            "seconds": self.warm_up_s,
            "first_s": taken[0],
            "later_median_s": statistics.median(taken[1:]),
        }

    def determinism(self) -> dict[str, Any]:
        """Scores in company against scores alone, bit by bit, and what the default mode makes."""
        batch = [*self.features(odd_sizes()), *self.features(self.workloads["group-8"])]
        together, alone, default_together, default_alone = (
            np.array([s for items in batches for s in scores(scorer, items)])
            for scorer in (self.exact, self.scorer)
            for batches in ([batch], [[item] for item in batch])
        )
        return {
            "conversations": len(together),
            "bitwise_equal": bool((together == alone).all()),
            "default_max_distance": float(np.abs(default_together - default_alone).max()),
        }

    def timing(self) -> dict[str, Any]:
        """Scores a second of every workload, and what share of the matmul ceiling that is."""
        results: dict[str, Any] = {}
        for name, workload in self.timed.items():
            batch = self.features(workload)
            rows = workload.conversations()
            few, eight = rows[:CARD_LOOP], rows[:CARD_BATCH]
            counts = {"card, one by one": len(few), "card, padded batches of 8": len(eight)}
            runs: dict[str, Callable[[], object]] = {
                "card, one by one": lambda few=few: [self.oracle.score(m) for m in few],  # type: ignore[misc]
                "card, padded batches of 8": lambda eight=eight: self.oracle.score_inputs(  # type: ignore[misc]
                    self.oracle.inputs(eight)
                ),
                "features and Scorer": lambda w=workload: scores(  # type: ignore[misc]
                    self.scorer, self.features(w)
                ),
                "Scorer": partial(scores, self.scorer, batch),
                "Scorer, deterministic": partial(scores, self.exact, batch),
            }
            for run in runs.values():
                run()
            times = in_turns(runs, self.repeats)
            paths = {path: row(taken, counts.get(path, len(rows))) for path, taken in times.items()}
            baseline = paths["card, one by one"]["conversations_per_s"]
            for values in paths.values():
                values["speedup"] = round(values["conversations_per_s"] / baseline, 3)
            predicted = work(batch, self.scorer.geometry, self.scorer.cost)
            achieved = predicted.flops / paths["Scorer"]["median_s"] / 1e12
            ceiling = self.matmul_tflops
            results[name] = {
                "conversations": len(rows),
                "ideal_speedup": predicted.flops_alone / predicted.flops,
                "scorer_tflops": achieved,
                "share_of_matmul_ceiling": achieved / ceiling if ceiling else None,
                "paths": paths,
            }
        return results

    def memory(self) -> dict[str, Any] | None:
        """Peak of the largest workload beside what is always there, against its prediction."""
        if self.device.type != "cuda":
            return None
        batch = self.features(self.workloads["group-64"])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        scores(self.scorer, batch)
        peak = torch.cuda.max_memory_allocated() - before
        predicted = work(batch, self.scorer.geometry, self.scorer.cost).size
        return {"peak_bytes": peak, "predicted_bytes": predicted, "kept": peak <= predicted}

    def synchronisations(self) -> dict[str, Any] | None:
        """Find where a forward pass waits for the device; the scores' way back is one place."""
        if self.device.type != "cuda":
            return None
        batch = self.features(self.workloads["group-8"])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                scores(self.scorer, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synch" in str(w.message)
        ]
        return {"count": len(places), "places": sorted(set(places))}

    def resizing(self) -> dict[str, Any]:
        """Measure what resizing with torch on the device changes: levels of uint8, and scores."""
        by_torch = Preprocessor(
            self.checkpoint, PreprocessConfig(device=str(self.device), resize="torch")
        )
        groups = odd_sizes().groups
        exact = [features(self.preprocessor, group) for group in groups]
        fast = [features(by_torch, group) for group in groups]
        levels = np.concatenate(
            [
                np.abs(a.astype(int) - b).reshape(-1)
                for one, other in zip(exact, fast, strict=True)
                for a, b in zip(one.media, other.media, strict=True)
            ]
        )
        drift = np.array(scores(self.scorer, fast)) - np.array(scores(self.scorer, exact))
        return {
            "values_that_differ": float((levels > 0).mean()),
            "max_levels": int(levels.max()),
            "score_drift_max": float(np.abs(drift).max()),
            "score_drift_rms": float(np.sqrt(np.mean(drift**2))),
        }

    def served(self) -> dict[str, Any]:
        """Time the same workloads through a real Triton, where there is one, beside the Scorer."""
        flags = (
            f"--device={self.config.device}", f"--dtype={self.config.dtype}",
            "--embedding-cache-bytes=0",
        )  # fmt: skip
        results: dict[str, Any] = {}
        try:
            with serving(self.checkpoint, *flags) as client:
                for name, workload in self.timed.items():
                    batch = self.features(workload)
                    runs: dict[str, Callable[[], object]] = {
                        "served": partial(served, client, workload),
                        "features and Scorer": lambda w=workload: scores(  # type: ignore[misc]
                            self.scorer, self.features(w)
                        ),
                        "Scorer": partial(scores, self.scorer, batch),
                    }
                    for run in runs.values():
                        run()
                    count = len(workload.conversations())
                    times = in_turns(runs, self.repeats)
                    results[name] = {path: row(taken, count) for path, taken in times.items()}
        except LaunchError as error:
            results["empty"] = f"no Triton served here: {error}"
        return results


@contextmanager
def taking(results: dict[str, Any], step: str) -> Iterator[None]:
    """Note how long a step takes, and print it."""
    start = time.perf_counter()
    yield
    results["seconds"][step] = round(time.perf_counter() - start, 2)
    typer.echo(f"{step}: {results['seconds'][step]} s")


def main(
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "7b",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script out.")] = "cuda",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    step: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(STEPS)}; all.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help="Names; all by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Build, check and time one model on one device."""
    for name, known, given in (("step", STEPS, step), ("workload", workloads(), workload)):
        if unknown := sorted(set(given or ()) - set(known)):
            raise typer.BadParameter(f"no {name} {unknown[0]!r}; there are {', '.join(known)}")
    writable(output)
    results: dict[str, Any] = {"machine": machine(), "size": size, "device": device}
    results |= {"repeats": repeats, "seconds": {}, **dict.fromkeys(STEPS)}

    def keep() -> None:  # after each step: a run that is stopped has measured what it has
        if output:
            output.write_text(json.dumps(results, indent=2) + "\n")

    if device.startswith("cuda") and not torch.cuda.is_available():
        results["empty"] = "no GPU was at hand; nothing was measured"
        typer.echo(results["empty"])
        keep()
        return
    with tempfile.TemporaryDirectory() as folder:
        with taking(results, "build"):
            bench = Bench(size, device, repeats, workload, Path(folder))
        for name in (name for name in STEPS if name in (step or STEPS)):
            with taking(results, name):
                results[name] = getattr(bench, name)()
            keep()
            if name == "parity" and not (
                results[name]["within_noise"] and results[name]["swapped_pairs"] == 0
            ):
                typer.echo(f"parity failed, nothing is timed: {results[name]}", err=True)
                raise typer.Exit(1)
    typer.echo(json.dumps({step: results[step] for step in STEPS}, indent=2))


if __name__ == "__main__":
    typer.run(main)
