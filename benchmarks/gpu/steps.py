"""The steps, in the order of their worth. Each returns what goes into the results file."""

from __future__ import annotations

import importlib.metadata
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch._dynamo.utils import counters

from benchmarks.gpu import speed
from benchmarks.gpu.bench import GATE, Bench, judge
from benchmarks.gpu.kernels import check_kernels, time_pages
from benchmarks.measure import (
    connected,
    in_turns,
    machine,
    row,
    scores,
    served,
    timed,
    triton,
    work,
)
from triward_server.config import PreprocessConfig
from triward_server.export.random_checkpoint import Size
from triward_server.intake.preprocess import Preprocessor

TIMED = ("group-8", "singles", "group-64")


class Steps:
    """Every step is a method.

    Args:
        bench: the model that is measured.
        smaller: makes a bench of another size, for what is checked before 7B is made.
        repeats: of every timing.
        table: where the profiler's table goes; None: it is not kept.
    """

    def __init__(
        self, bench: Bench, smaller: Callable[[Size], Bench], repeats: int, table: Path | None
    ) -> None:
        self.bench, self._smaller = bench, smaller
        self._repeats, self._table = repeats, table

    def versions(self) -> dict[str, Any]:
        """Say what is here, and what is not."""
        cuda = self.bench.device.type == "cuda"
        names = ("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "typer")
        there = (name for name in names if find_spec(name))
        return {
            "machine": machine(),
            "packages": {name: importlib.metadata.version(name) for name in there},
            "capability": torch.cuda.get_device_capability() if cuda else None,
            "memory": torch.cuda.mem_get_info() if cuda else None,
            "cudnn": torch.backends.cudnn.version(),
            "disk_free": shutil.disk_usage("/tmp").free,
            "c_compiler": shutil.which("gcc") or shutil.which("clang"),
            "flash_attn": find_spec("flash_attn") is not None,
            "tritonserver": _tritonserver(),
        }

    def kernels(self) -> dict[str, Any]:
        """Attention against float64; keys in pages beside gathered ones."""
        device, dtype = self.bench.device, self.bench.dtype
        found = check_kernels(device, dtype)
        return found | {"pages": time_pages(device, dtype, 4 * self._repeats)}

    def tiny(self) -> dict[str, Any]:
        """Check a model of a million weights against float32, in every mode."""
        return self._modes("tiny")

    def small(self) -> dict[str, Any]:
        """Check a model of forty million weights likewise."""
        if self.bench.size == "tiny":
            return {"skipped": "the model that is measured is smaller"}
        return self._modes("small")

    def _modes(self, size: Size) -> dict[str, Any]:
        bench = self._smaller(size)
        modes: tuple[Literal["eager", "compiled", "exact"], ...] = ("eager", "compiled", "exact")
        found: dict[str, Any] = {mode: bench.gate(mode) for mode in modes}
        # Graphs of this size would count against the number that torch compiles of one function.
        torch.compiler.reset()
        return found | {"passed": all(each["passed"] for each in found.values())}

    def build(self) -> dict[str, Any]:
        """Make the checkpoint, or find it."""
        there = sum(file.stat().st_size for file in self.bench.checkpoint.iterdir())
        return {"checkpoint": str(self.bench.checkpoint), "bytes": there}

    def ceilings(self) -> dict[str, Any]:
        """Measure what this device can do at most."""
        return speed.ceilings(self.bench)

    def gate(self) -> dict[str, Any]:
        """Our scores of 16 conversations against float32, beside the card's."""
        return self.bench.gate("eager")

    def eager(self) -> dict[str, Any]:
        """Time what users have, and our model without a compiler."""
        return {
            name: speed.beside_the_card(self.bench, self.bench.workloads[name], self._repeats)
            for name in TIMED
        }

    def compiled(self) -> dict[str, Any]:
        """Time our model as a GPU serves it, and see what the device does."""
        bench = self.bench
        bench.forget("card")
        graphs = counters["stats"]["unique_graphs"]
        scorer = bench.compiled
        batch = bench.features(bench.workloads["group-8"])
        found: dict[str, Any] = {
            "warm_up_s": bench.warm_up_s["compiled"],
            "graphs": counters["stats"]["unique_graphs"] - graphs,
            "first_s": timed(partial(scorer.score, batch)),
        }
        for name in TIMED:
            found[name] = speed.ours(
                bench, scorer, "Scorer, compiled", bench.workloads[name], self._repeats
            )
        found["graphs_after"] = counters["stats"]["unique_graphs"] - graphs
        for name in TIMED:
            median = found[name]["paths"]["Scorer, compiled"]["median_s"]
            found[name]["device"], table = speed.profiled(
                scorer, bench, bench.workloads[name], median
            )
            if self._table:
                with self._table.open("a") as file:
                    file.write(f"{name}\n{table}\n")
        return found

    def memory(self) -> dict[str, Any]:
        """Peak of the largest workload beside what is always there, against its prediction."""
        if self.bench.device.type != "cuda":
            return {"skipped": "a GPU's"}
        scorer, batch = self.bench.compiled, self.bench.features(self.bench.workloads["group-64"])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        scores(scorer, batch)
        peak = torch.cuda.max_memory_allocated() - before
        predicted = work(batch, scorer.geometry, scorer.cost).size
        return {"peak_bytes": peak, "predicted_bytes": predicted, "kept": peak <= predicted}

    def determinism(self) -> dict[str, Any]:
        """Scores in company against scores alone, bit by bit; and what the mode costs."""
        bench = self.bench
        group = bench.features(bench.workloads["group-8"])
        batch = [*bench.odd_sizes(), *group]
        together, alone, default_together, default_alone = (
            np.array([s for items in batches for s in scores(scorer, items)])
            for scorer in (bench.exact, bench.compiled)
            for batches in ([batch], [[item] for item in batch])
        )
        runs: dict[str, Callable[[], object]] = {
            "default": partial(scores, bench.compiled, group),
            "deterministic": partial(scores, bench.exact, group),
        }
        times = in_turns(runs, self._repeats)
        bench.forget("exact")
        return {
            "conversations": len(together),
            "bitwise_equal": bool((together == alone).all()),
            "default_max_distance": float(np.abs(default_together - default_alone).max()),
            "paths": {name: row(taken, 8) for name, taken in times.items()},
        }

    def float8(self) -> dict[str, Any]:
        """Time and check float8 beside bfloat16: matrix products, eager layers, compiled ones."""
        bench = self.bench
        if bench.dtype != torch.bfloat16:
            return {"skipped": "float8 is compared with bfloat16"}
        if bench.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            return {"skipped": "this GPU does not multiply float8"}
        gate = bench.features(bench.workloads[GATE])
        truth = bench.truth
        # A step before has compiled the layers of the model that `eager` would share.
        bench.forget("eager", "compiled", "exact", "card", "_model")
        torch.compiler.reset()
        found: dict[str, Any] = {"products": speed.products(bench, self._repeats)}
        found["scores"] = {
            name: judge(truth, np.array(scores(bench.eager, gate)), np.array(scores(scorer, gate)))
            for name, scorer in (("eager", bench.float8_eager), ("compiled", bench.float8))
        }
        for mode, names in {
            "eager": ("eager", "float8_eager"), "compiled": ("compiled", "float8")
        }.items():  # fmt: skip
            found[mode] = {
                workload: {
                    name: speed.ours(
                        bench, getattr(bench, name), name, bench.workloads[workload], self._repeats
                    )
                    for name in names
                }
                for workload in TIMED
            }
        bench.forget("float8", "float8_eager")
        return found

    def synchronisations(self) -> dict[str, Any]:
        """Find where a forward pass waits for the device; the scores' way back is one place."""
        if self.bench.device.type != "cuda":
            return {"skipped": "a GPU's"}
        scorer, batch = self.bench.compiled, self.bench.features(self.bench.workloads["group-8"])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                scores(scorer, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synch" in str(w.message)
        ]
        return {"count": len(places), "places": sorted(set(places))}

    def resizing(self) -> dict[str, Any]:
        """Measure what resizing with torch on the device changes: levels of uint8, and scores."""
        bench = self.bench
        by_pillow, exact = bench.preprocessor, bench.odd_sizes()
        bench.preprocessor = Preprocessor(
            bench.checkpoint, PreprocessConfig(device=str(bench.device), resize="torch")
        )
        try:
            fast = bench.odd_sizes()
        finally:
            bench.preprocessor = by_pillow
        pairs = [
            pair for a, b in zip(exact, fast, strict=True)
            for pair in zip(a.media, b.media, strict=True)
        ]  # fmt: skip
        levels = np.concatenate([np.abs(a.astype(int) - b).reshape(-1) for a, b in pairs])
        drift = np.array(scores(bench.compiled, fast)) - np.array(scores(bench.compiled, exact))
        return {
            "values_that_differ": float((levels > 0).mean()),
            "max_levels": int(levels.max()),
            "score_drift_max": float(np.abs(drift).max()),
            "score_drift_rms": float(np.sqrt(np.mean(drift**2))),
        }

    def served(self) -> dict[str, Any]:
        """Time the same workloads through a real Triton, where there is one.

        And the share of the time in which no pass is on the device while callers keep the server
        busy: what lies between two passes, and between two of Triton's batches. Without bounds of
        the forward model's queue, which may add half a second there (`bounded`).
        """
        unbounded = "--no-bound-forward-queue"
        found = self._served(unbounded)
        if "skipped" not in found:
            found["overlapping"] = self._served(unbounded, "--overlap-batches")
        return found

    def bounded(self) -> dict[str, Any]:
        """Time them with the queue's bounds, as an export has them by default."""
        return self._served()

    def _served(self, *more: str) -> dict[str, Any]:
        if not (_tritonserver() and find_spec("tritonclient")):
            return {"skipped": "no tritonserver and tritonclient here"}
        self.bench.forget("eager", "compiled", "exact", "card", "_model")
        bench = self.bench
        compile_ = "compile" if bench.config.device.startswith("cuda") else "no-compile"
        flags = (
            f"--device={bench.config.device}", f"--dtype={bench.config.dtype}", f"--{compile_}",
            "--embedding-cache-bytes=0", "--prefix-cache-bytes=0", *more,
        )  # fmt: skip
        found: dict[str, Any] = {}
        with triton(bench.checkpoint, *flags) as server, connected(server) as client:
            for name in TIMED:
                workload = bench.workloads[name]
                run = partial(served, client, workload)
                run()
                times = in_turns({"served": run}, self._repeats)["served"]
                found[name] = row(times, len(workload.conversations()))
                found[name]["no_pass_share"] = speed.no_pass_share(
                    server, client, bench.features(workload)
                )
        return found


STEPS = (
    "versions", "kernels", "tiny", "small", "build", "ceilings", "gate", "eager", "compiled",
    "memory", "determinism", "float8", "synchronisations", "resizing", "served", "bounded",
)  # fmt: skip


def _tritonserver() -> str | None:
    return shutil.which("tritonserver") or (find_spec("pytriton") and "the wheel's") or None
