"""Serve a tiny model under mixed load for a long time and see whether anything grows.

    python -m benchmarks.soak --minutes 20 --output benchmarks/results/NAME.json

Single conversations, groups, images of many sizes, old and new, bad requests, cancelled ones, ones
with too little time, and bursts beyond what may wait, from several processes. Every few seconds
memory, /dev/shm, file descriptors and threads of the server are written down. After a warm-up, each
must be level: Theil and Sen's slope, the median over all pairs of samples, ignores moments. The
warm-up is long, since caches of shapes and the heap around them take half an hour of mixed
load to find their size.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import matplotlib as mpl
import typer
from matplotlib.figure import Figure

from benchmarks import footprint
from benchmarks.commands import run_main
from benchmarks.measure import ROOT, machine, writable
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.serving.launch import Endpoints, TritonServer

LOAD = ("singles", "groups", "nuisances", "bursts")
PATIENT_LOAD = ("singles", "groups", "wrong", "bursts")
WARM_UP = 30.0  # minutes

# What one request at a time may leave behind would show within an hour as far more than this.
_MEMORY_SHARE, _MEMORY_BYTES = 0.05, 32 * 2**20  # per hour, whichever is more
_COUNT = 6.0  # threads, descriptors, regions per hour: one in ten minutes

_FLAGS = (
    "--device=cpu", "--dtype=float32", "--threads=1", "--preprocess-instances=2",
    "--max-queue-size=64", "--queue-timeout-ms=5000", "--embedding-cache-bytes=16000000",
    "--prefix-cache-bytes=16000000",
    "--no-compile", "--preprocess-batch-size=1",
)  # fmt: skip


@dataclass(frozen=True)
class Trend:
    """Growth of one quantity.

    Attributes:
        level: its median after the warm-up.
        growth_per_hour: the slope, in its own unit.
        bound_per_hour: what is still level.
    """

    level: float
    growth_per_hour: float
    bound_per_hour: float

    @property
    def grows(self) -> bool:
        """True if it is beyond the bound."""
        return self.growth_per_hour > self.bound_per_hour


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Theil and Sen's: the median slope of all pairs; 29 % of the samples may lie anywhere."""
    points = zip(times, values, strict=True)
    return statistics.median(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for earlier, later in combinations(points, 2)
    )


def trends(samples: Sequence[dict[str, float]], warm_up: float) -> dict[str, Trend]:
    """Return the growth of every quantity after the warm-up.

    Args:
        samples: each with its time in `seconds`.
        warm_up: minutes.
    """
    level = [sample for sample in samples if sample["seconds"] >= 60 * warm_up]
    times = [sample["seconds"] for sample in level]
    found = {}
    for name in level[0] if level else ():
        # What comes or goes on the way is the verdict's.
        if name != "seconds" and all(name in sample for sample in level):
            values = [sample[name] for sample in level]
            middle = statistics.median(values)
            memory = name.endswith(("rss", "anon", "bytes"))
            bound = max(_MEMORY_SHARE * middle, _MEMORY_BYTES) if memory else _COUNT
            found[name] = Trend(middle, 3600 * slope(times, values), bound)
    return found


@contextmanager
def serving_soaked(folder: Path) -> Iterator[TritonServer]:
    """Export a tiny model, with queues that bursts overflow and caches that fill."""
    make_checkpoint("tiny", 0, folder / "checkpoint")
    subprocess.run(
        [sys.executable, ROOT / "export" / "build_repository.py",
         f"--checkpoint={folder / 'checkpoint'}", f"--output={folder / 'repository'}", *_FLAGS],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    free = Endpoints("127.0.0.1", grpc_port=0, http_port=0, metrics_port=0)
    with (
        (folder / "triton.log").open("w") as log,
        TritonServer(folder / "repository", free, log=log) as server,
    ):
        yield server


class Callers:
    """The calling processes; they stop on exit.

    Args:
        url: whom they call.
        kinds: what each process sends.
    """

    def __init__(self, url: str, kinds: Sequence[str] = LOAD) -> None:
        self._url = url
        self._kinds = kinds
        self._processes: list[subprocess.Popen[str]] = []
        self.outcomes: Counter[str] = Counter()

    def __enter__(self) -> Callers:
        """Start them."""
        for seed, kind in enumerate(self._kinds):
            command = [sys.executable, "-m", "benchmarks.callers", self._url, kind, str(seed)]
            self._processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Stop them and collect what came back.

        Raises:
            RuntimeError: one has failed.
        """
        for process in self._processes:
            assert process.stdin
            process.stdin.close()
        for process in self._processes:
            assert process.stdout
            text = process.stdout.read()
            if process.wait(120) != 0:
                raise RuntimeError(f"a calling process ended with exit code {process.returncode}")
            self.outcomes.update(json.loads(text))

    def check(self) -> None:
        """Raise if one has ended."""
        for process in self._processes:
            if process.poll() is not None:
                raise RuntimeError(f"a calling process ended with exit code {process.returncode}")


def watch(
    server: TritonServer, callers: Callers, minutes: float, every: float
) -> Iterator[dict[str, float]]:
    """Sample until the time is over, or the server."""
    begun = time.monotonic()
    while (seconds := time.monotonic() - begun) < 60 * minutes:
        callers.check()
        sample = footprint.take(server.pid).flat()
        yield {"seconds": round(seconds, 1), **sample}
        if not sample.get("tritonserver.rss"):
            return  # the verdict says so
        time.sleep(every)


def verdict(
    found: dict[str, Trend],
    outcomes: Counter[str],
    samples: Sequence[dict[str, float]],
    kinds: Sequence[str] = LOAD,
) -> list[str]:
    """Return what is wrong, in sentences."""
    wrong = [
        f"{name} grows by {trend.growth_per_hour:,.0f} an hour from {trend.level:,.0f}; "
        f"{trend.bound_per_hour:,.0f} are allowed"
        for name, trend in found.items()
        if trend.grows
    ]
    for sample in samples:
        if changed := sample.keys() ^ samples[0].keys():
            wrong.append(f"after {sample['seconds']:.0f} s: {', '.join(sorted(changed))} changed")
            break
    wrong += [f"{outcome}: {count}" for outcome, count in outcomes.items() if "error" in outcome]
    answered = {outcome.partition("/")[2] for outcome in outcomes}
    given_up = ("cancelled", "late") if "nuisances" in kinds else ()
    for expected in ("scored", "invalid", "unavailable", *given_up):
        if expected not in answered:
            wrong.append(f"no request was {expected}: this was no mixed load")
    return wrong


def draw_run(results: dict[str, Any], output: Path) -> None:
    """Four small plots over time."""
    mpl.rcParams["svg.hashsalt"] = "triward"  # equal results give equal files
    samples = results["samples"]
    minutes = [sample["seconds"] / 60 for sample in samples]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    panels = {
        "heaps and stacks, MB": ("anon", 1e6),
        "/dev/shm, MB": ("shm.bytes", 1e6),
        "file descriptors": ("fds", 1.0),
        "threads": ("threads", 1.0),
    }
    for axes, (title, (kind, unit)) in zip(
        figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True
    ):
        for name in samples[0]:
            if name.endswith(kind) and not name.startswith("total"):
                label = name.removesuffix(f".{kind}") if kind != "shm.bytes" else "all regions"
                axes.plot(minutes, [s.get(name, 0) / unit for s in samples], label=label, lw=1.2)
        axes.axvline(results["warm_up"], color="#9aa0a6", ls=":", lw=1)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.supxlabel("minutes; growth is judged right of the dotted line", fontsize=8)
    requests = sum(results["outcomes"].values())
    figure.suptitle(f"{requests:,} requests in {minutes[-1]:.0f} minutes", fontsize=10)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main(
    output: Annotated[Path, typer.Option(help="JSON file; the plot goes beside it.")],
    minutes: Annotated[float, typer.Option(min=0.5, help="What is judged.")] = 20.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Minutes before it.")] = WARM_UP,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between samples.")] = 10.0,
    patient: Annotated[bool, typer.Option(help="Nobody cancels or hangs up.")] = False,
) -> None:
    """Run, write the results, and fail if something grows."""
    writable(output, ".draft", ".log", ".svg")
    draft = output.with_suffix(".draft")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(serving_soaked(folder))
        kinds = PATIENT_LOAD if patient else LOAD
        callers = Callers(server.endpoints.grpc, kinds)
        samples = []
        with callers:
            for sample in watch(server, callers, warm_up + minutes, every):
                samples.append(sample)
                draft.write_text(json.dumps(samples))  # if it is interrupted
        draft.unlink()
        found = trends(samples, warm_up)
        wrong = verdict(found, callers.outcomes, samples, kinds)
        if wrong:
            shutil.copyfile(folder / "triton.log", output.with_suffix(".log"))
    results = {
        "machine": machine(),
        "minutes": minutes,
        "warm_up": warm_up,
        "flags": _FLAGS,
        "load": kinds,
        "outcomes": dict(sorted(callers.outcomes.items())),
        "verdict": wrong or "level",
        "trends": {
            name: {
                "level": trend.level,
                "growth_per_hour": round(trend.growth_per_hour, 1),
                "bound_per_hour": round(trend.bound_per_hour, 1),
            }
            for name, trend in found.items()
        },
        "samples": samples,
    }
    output.write_text(json.dumps(results, indent=1) + "\n")
    draw_run(results, output.with_suffix(".svg"))
    for name, trend in found.items():
        print(f"{name:28} {trend.level:>16,.0f} {trend.growth_per_hour:>+14,.0f}/h")
    print("\n".join(wrong or ["level"]))
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    run_main(main)
