"""What was measured: results files of `benchmarks`, and the few that the package carries.

A speed is a rate of the FLOPs that the engine's planner predicts, so that one workload's can be
taken for another's. `carried.json` has what the results files themselves do not say: how much the
benchmarks' workloads compute. `python -m benchmarks.costs` writes it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..engine.planning import Cost
from ..errors import ConfigError
from .request import Counts

SERVED = "served, over gRPC"


@dataclass(frozen=True)
class Rates:
    """Rates of one device, from one file.

    Attributes:
        source: the file's name.
        gpu: the GPU's name; None: a CPU, or the file does not say.
        device: what it was, for people; None: the file does not say.
        memory: bytes of the GPU; None: the file does not say.
        dtype: in which it computed.
        rows: FLOP/s of each workload.
        notes: what to know about them.
    """

    source: str
    gpu: str | None
    device: str | None
    memory: int | None
    dtype: str
    rows: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def typical(self) -> float:
        """FLOP/s: the median of the workloads."""
        return statistics.median(self.rows.values())

    @property
    def bounds(self) -> tuple[float, float]:
        """FLOP/s of the slowest and of the fastest workload."""
        return min(self.rows.values()), max(self.rows.values())


def carried() -> dict[str, Any]:
    """Return what the package brings."""
    data: dict[str, Any] = json.loads(files(__package__).joinpath("carried.json").read_text())
    return data


def carried_rates(source: str) -> Rates:
    """Return the rates of a results file that the package carries, by its name."""
    data = carried()
    return _rates(source, data["results"][source], data, None)


def read_rates(path: Path, cost: Cost) -> Rates:
    """Read a results file of `benchmarks.compare`, `benchmarks.perf_analyzer` or `benchmarks.gpu`.

    Args:
        path: the file.
        cost: of the model that is planned for; a server at a URL is taken to have served it.

    Raises:
        ConfigError: it is no such file, or nothing was measured.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--measured {path}: {type(error).__name__}: {error}") from None
    if not isinstance(results, dict):
        raise ConfigError(f"--measured {path}: no results file")
    if results.get("empty"):
        raise ConfigError(f"--measured {path}: {results['empty']}")
    return _rates(path.name, results, carried(), cost)


def _rates(
    source: str, results: Mapping[str, Any], data: Mapping[str, Any], cost: Cost | None
) -> Rates:
    try:
        if "mixes" in results:
            return _of_perf(source, results, data, cost)
        if "workloads" in results:
            return _of_compare(source, results, data)
        return _of_gpu(source, results)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--measured {source}: no file of benchmarks.compare, perf_analyzer or gpu ({reason})"
        ) from None


def counts_of(data: Mapping[str, Any], *path: str) -> dict[str, Counts]:
    """Return what workloads compute: `compare`, `image` or `text`; or `perf`, `short` or `full`."""
    found: Any = data["work"]
    for key in path:
        found = found[key]
    return {name: Counts(**counts) for name, counts in found.items()}


def _model_cost(data: Mapping[str, Any], source: str, name: str) -> Cost:
    if name not in data["models"]:
        known = ", ".join(data["models"])
        raise ConfigError(f"--measured {source}: the cost of {name} is not known, only of {known}")
    return Cost(**data["models"][name])


def _of_compare(source: str, results: Mapping[str, Any], data: Mapping[str, Any]) -> Rates:
    architecture = results.get("architecture", "qwen2_5_vl")
    cost = _model_cost(data, source, f"{architecture}-{results['size']}")
    kind = "image" if architecture == "qwen2_5_vl" else "text"
    counts = counts_of(data, "compare", kind)
    rows = {
        name: counts[name].flops(cost) / workload["paths"][SERVED]["median_s"]
        for name, workload in results["workloads"].items()
        if name in counts and SERVED in workload["paths"]
    }
    return _made(source, results["machine"], results["dtype"], rows)


def _of_perf(
    source: str, results: Mapping[str, Any], data: Mapping[str, Any], cost: Cost | None
) -> Rates:
    served = results.get("served")
    if served:
        cost = _model_cost(data, source, f"qwen2_5_vl-{served['size']}")
    if cost is None:
        raise ConfigError(f"--measured {source}: which model was served is not said")
    counts = counts_of(data, "perf", results["plan"]["scale"])
    rows = {
        name: counts[name].flops(cost) * mix["capacity_per_s"]
        for name, mix in results["mixes"].items()
        if mix["capacity_per_s"]
    }
    notes = ["the highest rate of callers that wait for their answers"]
    if served and served["threads"] < results["machine"]["cores"]:
        notes.append(f"its forward process had {served['threads']} of these cores")
    if not served:
        notes.append("the server at the URL is taken to have served the model planned for")
    # A server at a URL is on another machine than the one that the file names.
    machine = results["machine"] if served else None
    return _made(source, machine, served["dtype"] if served else "", rows, (*notes,))


def _of_gpu(source: str, results: Mapping[str, Any]) -> Rates:
    step = next((results[name] for name in ("compiled", "eager") if _timed(results, name)), None)
    if step is None:
        raise ConfigError(f"--measured {source}: neither step compiled nor eager was measured")
    rows = {
        name: row["scorer_tflops"] * 1e12
        for name, row in step.items()
        if isinstance(row, dict) and "scorer_tflops" in row
    }
    verdict = results.get("timings_of_a_model_that", "was not compared with float32 in this file")
    notes = ("without Triton and gRPC around the engine", f"of a model that {verdict}")
    memory = results["versions"]["memory"]
    machine = results["versions"]["machine"]
    return _made(source, machine, results["dtype"], rows, notes, memory and int(memory[1]))


def _timed(results: Mapping[str, Any], step: str) -> bool:
    rows = results.get(step)
    return isinstance(rows, dict) and any(
        isinstance(row, dict) and "scorer_tflops" in row for row in rows.values()
    )


def _made(
    source: str,
    machine: Mapping[str, Any] | None,
    dtype: str,
    rows: Mapping[str, float],
    notes: tuple[str, ...] = (),
    memory: int | None = None,
) -> Rates:
    if not rows:
        raise ConfigError(f"--measured {source}: nothing was measured")
    if machine is None:
        return Rates(source, None, None, memory, dtype, rows, notes)
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return Rates(source, machine["gpu"], device, memory, dtype, rows, notes)
