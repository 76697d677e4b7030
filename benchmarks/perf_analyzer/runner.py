"""Run the real perf_analyzer and read what it measured: raw timestamps, not its summaries.

Latencies come from `--profile-export-file`. What the server did meanwhile comes from Triton's own
statistics before and after. perf_analyzer gives up at the first failed request and exports nothing
then, so a point with failures has no throughput and no latency.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tritonclient.grpc import InferenceServerClient

from triward.protocol import MODEL
from triward_server.schema import FORWARD, PREPROCESS

# perf_analyzer's program needs these; nvidia-pytriton carries them under names of its own.
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}

WINDOWS = 3  # perf_analyzer exports nothing before it has seen three
_STRETCH = 1.2  # it waits this much longer than --measurement-interval says
WARM_UP = 0.1  # share of a run that is left out at its start: the queue is still filling
BACKLOG = 0.1  # share of the arrivals by which the queue may grow before a point is overloaded

_EMPTY_WINDOW = "No valid requests recorded"  # perf_analyzer's words
_LONGER = 4

_DELAYED = re.compile(r"([\d.]+)% of the requests were delayed")
_ERROR = re.compile(r"(?:had error|error): (.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Load:
    """Way in which requests are sent.

    Attributes:
        loop: `closed`: each of `value` callers waits for its answer before it sends again;
            `open`: requests arrive by a Poisson process whether answers are back or not.
        value: callers at a time, or requests per second.
        seconds: how long.
    """

    loop: Literal["closed", "open"]
    value: float
    seconds: float

    def flags(self) -> list[str]:
        """perf_analyzer's flags."""
        interval = f"--measurement-interval={self.seconds * 1000 / WINDOWS / _STRETCH:.0f}"
        if self.loop == "open":
            rate = f"--request-rate-range={self.value:g}"
            return [interval, rate, "--request-distribution=poisson"]
        # One thread a caller: two callers in a thread would send the same entries side by side,
        # which the server would compute once.
        callers = f"{self.value:.0f}"
        return [interval, f"--concurrency-range={callers}", f"--max-threads={callers}"]


@dataclass(frozen=True)
class Target:
    """A server that serves the ensemble.

    Attributes:
        url: host:port of its gRPC endpoint.
        headers: sent with every call, for a server that restricts its admin protocols.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Return counts and nanoseconds of each model since the server started."""
        with InferenceServerClient(self.url) as client:
            found = client.get_inference_statistics(headers=dict(self.headers), as_json=True)
        return {model["name"]: _flat(model) for model in found["model_stats"]}


def _flat(model: Mapping[str, Any]) -> dict[str, int]:
    """`execution_count`, and `queue.ns` and the like; protobuf's JSON leaves zeros out."""
    values = {"execution_count": int(model.get("execution_count", 0))}
    for name, duration in model["inference_stats"].items():
        for unit in ("count", "ns"):
            values[f"{name}.{unit}"] = int(duration.get(unit, 0))
    return values


@dataclass(frozen=True)
class Tool:
    """A perf_analyzer that runs here."""

    executable: str
    environment: Mapping[str, str]


@contextmanager
def find_perf_analyzer() -> Iterator[Tool]:
    """tritonclient's perf_analyzer with the libraries it needs, or the one on PATH.

    Raises:
        FileNotFoundError: there is none; says what to install.
    """
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    executable = shutil.which("perf_analyzer", path=folders)
    if executable is None:
        raise FileNotFoundError("no perf_analyzer: pip install 'tritonclient[grpc]==2.51.0'")
    with tempfile.TemporaryDirectory() as folder:
        for name, library in _bundled().items():
            Path(folder, name).symlink_to(library)
        paths = [folder, os.environ.get("LD_LIBRARY_PATH", "")]
        libraries = os.pathsep.join(path for path in paths if path)
        yield Tool(executable, {**os.environ, "LD_LIBRARY_PATH": libraries})


def _bundled() -> dict[str, Path]:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
    found = {name: next(folder.glob(pattern), None) for name, pattern in _LIBRARIES.items()}
    return {name: library for name, library in found.items() if library}


def measure_point(tool: Tool, target: Target, inputs: Path, load: Load) -> dict[str, Any]:
    """Measure one point.

    Args:
        tool: what `find_perf_analyzer` yields.
        target: the server; it should serve nobody else meanwhile, or the split is everybody's.
        inputs: file of `inputs.encode`.
        load: how requests are sent.

    Returns:
        Counts, rates per second, latencies in milliseconds. `error` says why there are none.
    """
    point = _measure(tool, target, inputs, load)
    if point["error"] and point["error"].startswith(_EMPTY_WINDOW):
        # One more time, long enough for a server that is slower than was thought.
        point = _measure(tool, target, inputs, replace(load, seconds=_LONGER * load.seconds))
    return point


def _measure(tool: Tool, target: Target, inputs: Path, load: Load) -> dict[str, Any]:
    before = target.statistics()
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder, "export.json")
        code, text = _run(tool, target, inputs, load, export)
        # Images in the export are no text; only its numbers are read.
        raw = json.loads(export.read_text(errors="replace")) if code == 0 else None
    server = _difference(before, target.statistics())
    ensemble = server[MODEL]
    point: dict[str, Any] = {
        "loop": load.loop,
        "value": load.value,
        "failed": ensemble["fail.count"],
        "delayed_percent": _delayed(text),
        "error": None if raw else _reason(text, code),
    }
    if raw:
        sent = ensemble["success.count"] + ensemble["fail.count"]
        point |= summarize(raw["experiments"][0], sent)
    return point | {"server": {name: _split(server[name]) for name in (MODEL, PREPROCESS, FORWARD)}}


def _run(tool: Tool, target: Target, inputs: Path, load: Load, export: Path) -> tuple[int, str]:
    """Exit code and output."""
    command = [
        tool.executable, "-m", MODEL, "-i", "grpc", "-u", target.url, "--async",
        f"--input-data={inputs}", f"--profile-export-file={export}",
        # Any variation counts as stable: all windows are kept, and the report shows the spread.
        f"--max-trials={WINDOWS}", "--stability-percentage=1000000", *load.flags(),
        *(f"-H{name}:{value}" for name, value in target.headers.items()),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, env=dict(tool.environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False, timeout=10 * load.seconds + 120,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"error: perf_analyzer did not end within {10 * load.seconds + 120:.0f} s"
    return done.returncode, done.stdout


def _difference(
    before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    return {
        model: {key: value - before[model].get(key, 0) for key, value in values.items()}
        for model, values in after.items()
    }


def _delayed(text: str) -> float:
    """Percent of the requests that left later than the schedule said."""
    found = _DELAYED.search(text)
    return float(found[1]) if found else 0.0


def _reason(text: str, code: int) -> str:
    found = _ERROR.search(text)
    if found:
        return found[1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"perf_analyzer ended with exit code {code}"


def summarize(experiment: Mapping[str, Any], sent: int) -> dict[str, Any]:
    """Read perf_analyzer's raw export of one load.

    Requests count where they end, after the warm-up: under a steady load that is an unbiased
    sample, slow requests included.

    Args:
        experiment: an entry of `experiments`: its mode, and `requests` with their timestamps in
            nanoseconds, of all that ended within `window_boundaries`.
        sent: how many requests the server saw, those that ended later included.
    """
    times = [(r["timestamp"], r["response_timestamps"][-1]) for r in experiment["requests"]]
    started, ended = np.array(times, np.int64).reshape(-1, 2).T
    first, last = experiment["window_boundaries"][0], experiment["window_boundaries"][-1]
    start = first + int(WARM_UP * (last - first))
    seconds = (last - start) / 1e9
    counted = ended >= start
    done = int(counted.sum())
    unfinished = max(0, sent - len(ended))
    # Arrivals of the measured time: what ended in it, and by how much the queue grew. They differ
    # from the rate asked for: perf_analyzer draws every Poisson schedule from one fixed seed.
    arrivals = done + unfinished - int((counted & (started < start)).sum())
    open_loop = experiment["experiment"]["mode"] == "request_rate"
    return {
        "seconds": round(seconds, 3),
        "requests": done,
        "requests_per_s": round(done / seconds, 4),
        "arrivals_per_s": round(arrivals / seconds, 4),
        "unfinished": unfinished,
        "overloaded": open_loop and arrivals - done > BACKLOG * arrivals,
        "latency_ms": _latencies((ended - started)[counted] / 1e6),
    }


def _latencies(values: Any) -> dict[str, float] | None:
    if not len(values):
        return None
    quantiles = np.percentile(values, (50, 95, 99))
    named = {"mean": values.mean(), **dict(zip(("p50", "p95", "p99"), quantiles, strict=True))}
    return {name: round(float(value), 3) for name, value in named.items()}


# Where a request's time goes inside a model, as Triton names it.
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


def _split(statistics: Mapping[str, int]) -> dict[str, Any]:
    """Return a model's requests and executions, and milliseconds a request on average."""
    count = statistics["success.count"]

    def mean(name: str) -> float:
        return round(statistics[f"{name}.ns"] / max(1, statistics[f"{name}.count"]) / 1e6, 3)

    return {
        "requests": count,
        "executions": statistics["execution_count"],
        "total_ms": mean("success"),
        **{f"{part}_ms": mean(part) for part in PARTS},
    }
