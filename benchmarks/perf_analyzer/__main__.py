"""Throughput against latency of a served repository, by the real perf_analyzer.

    python -m benchmarks.perf_analyzer --output results.json --url HOST:PORT --mix text

Without `--url` a random checkpoint is exported and served on this machine's CPU. Each mix is driven
in a closed loop; from the throughput that it reaches follow the rates of the open loop. Results go
to a JSON file, a report beside it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import typer
from rich.console import Console

from benchmarks.commands import run_main
from benchmarks.measure import machine, triton, writable
from benchmarks.perf_analyzer import inputs
from benchmarks.perf_analyzer.inputs import MIXES, REQUESTS, Scale
from benchmarks.perf_analyzer.report import write_perf_report
from benchmarks.perf_analyzer.runner import Load, Target, Tool, find_perf_analyzer, measure_point
from benchmarks.perf_analyzer.sizing import Objective, capacity, sizing
from triward_server.export.random_checkpoint import Size, make_checkpoint
from triward_server.serving.triton_http import GRPC_ADMIN_HEADER

CONCURRENCIES = (1, 2, 4, 8)
FRACTIONS = (0.3, 0.5, 0.7, 0.85, 0.95, 1.2)


@dataclass(frozen=True)
class Plan:
    """Points that are measured.

    Attributes:
        closed: mixes of the closed loop.
        open: mixes of the open loop too.
        concurrencies: callers at a time.
        fractions: arrival rates, as shares of the closed loop's highest throughput.
        closed_seconds, open_seconds: length of each point.
        scale, seed, count: of the input files.
    """

    closed: Sequence[str]
    open: Sequence[str]
    concurrencies: Sequence[int] = CONCURRENCIES
    fractions: Sequence[float] = FRACTIONS
    closed_seconds: float = 10.0
    open_seconds: float = 60.0
    scale: Scale = Scale.SHORT
    seed: int = 0
    count: int = REQUESTS

    def mixes(self) -> list[str]:
        """All mixes, in the order of `MIXES`; an open loop's rates follow from a closed one."""
        return [mix for mix in MIXES if mix in {*self.closed, *self.open}]


def measure_mix(
    tool: Tool, target: Target, mix: str, plan: Plan, console: Console
) -> dict[str, Any]:
    """All points of one mix."""
    batch = inputs.requests(mix, plan.seed, plan.count, plan.scale)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "inputs.json")
        file.write_text(inputs.encode(batch))

        def points(loads: Sequence[Load]) -> list[dict[str, Any]]:
            measured = []
            for load in loads:
                measured.append(measure_point(tool, target, file, load))
                console.print(f"{mix}, {line(measured[-1])}")
            return measured

        # Pages, caches and connections are warm before anything counts.
        measure_point(
            tool, target, file, Load("closed", plan.concurrencies[0], plan.closed_seconds / 3)
        )
        closed = points([Load("closed", n, plan.closed_seconds) for n in plan.concurrencies])
        most = capacity(closed)
        rates = [most * share for share in plan.fractions] if most and mix in plan.open else []
        opened = points([Load("open", round(r, 3), plan.open_seconds) for r in rates])
    sizes = [sum(map(len, (r.messages, *r.responses, *r.media))) for r in batch]
    return {
        "responses_per_request": round(sum(len(r.responses) for r in batch) / len(batch), 3),
        "bytes_per_request": round(sum(sizes) / len(batch)),
        "capacity_per_s": most,
        "closed": closed,
        "open": opened,
    }


def line(point: Mapping[str, Any]) -> str:
    """Format one point for the terminal."""
    unit = "at a time" if point["loop"] == "closed" else "/s offered"
    start = f"{point['value']:g} {unit}: "
    if point["error"]:
        return f"{start}{point['failed']} failed, {point['error']}"
    latency = point["latency_ms"] or dict.fromkeys(("p50", "p95", "p99"), float("nan"))
    times = ", ".join(f"{name} {latency[name]:.0f} ms" for name in ("p50", "p95", "p99"))
    overloaded = ", overloaded" if point["overloaded"] else ""
    return f"{start}{point['requests_per_s']:.2f} requests/s, {times}{overloaded}"


@contextmanager
def target_of(
    url: str | None, headers: Mapping[str, str], checkpoint_size: Size, threads: int
) -> Iterator[Target]:
    """Yield the server at `url`, or one of our own for a random checkpoint."""
    if url:
        yield Target(url, headers)
        return
    # No cache of embeddings: the input file repeats, callers' images seldom do.
    flags = ["--dtype=float32", "--device=cpu", "--embedding-cache-bytes=0", f"--threads={threads}"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        make_checkpoint(checkpoint_size, 0, checkpoint)
        with triton(checkpoint, *flags) as server:
            # perf_analyzer reads the model's configuration.
            yield Target(server.endpoints.grpc, {**headers, GRPC_ADMIN_HEADER: server.admin_key})


def measure_all(
    target: Target, plan: Plan, objective: Objective, console: Console
) -> dict[str, Any]:
    """Return the results of all mixes, with what they were measured with."""
    results: dict[str, Any] = {
        "machine": machine() | {"load_average": [round(v, 2) for v in os.getloadavg()]},
        "plan": asdict(plan),
        "mixes": {},
    }
    with find_perf_analyzer() as tool:
        for mix in plan.mixes():
            results["mixes"][mix] = measure_mix(tool, target, mix, plan, console)
    return results | sizing(results["mixes"], objective)


def _known(mixes: Sequence[str]) -> Sequence[str]:
    for mix in mixes:
        if mix not in MIXES:
            raise typer.BadParameter(f"no mix {mix!r}; there are {', '.join(MIXES)}")
    return mixes


def _headers(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if ":" not in pair:
            raise typer.BadParameter(f"a header is NAME:VALUE, got {pair!r}")
    return {name.strip(): value.strip() for name, value in (p.split(":", 1) for p in pairs)}


def main(
    output: Annotated[Path, typer.Option(help="JSON file; the report goes beside it.")],
    url: Annotated[
        str | None, typer.Option(help="gRPC host:port of a running server; serves nobody else.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="NAME:VALUE, sent with every call.")
    ] = None,
    size: Annotated[Size, typer.Option(help="Random checkpoint, without --url.")] = "small",
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads of its forward model; 0: half the cores.")
    ] = 0,
    mix: Annotated[list[str] | None, typer.Option(help="Closed loop; all by default.")] = None,
    open_mix: Annotated[list[str] | None, typer.Option(help="Open loop; mixed by default.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Callers at a time.")] = None,
    fraction: Annotated[
        list[float] | None, typer.Option(help="Arrival rates over the closed loop's throughput.")
    ] = None,
    closed_seconds: Annotated[float, typer.Option(min=1, help="Length of a point.")] = 10.0,
    open_seconds: Annotated[float, typer.Option(min=1, help="Length of a point.")] = 60.0,
    scale: Annotated[Scale, typer.Option(help="full: shapes for 7B on a GPU.")] = Scale.SHORT,
    seed: Annotated[int, typer.Option(min=0, help="Of the input files.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Requests in a file; best a prime.")] = REQUESTS,
    p99_ms: Annotated[float, typer.Option(help="Objective for the sizing.")] = 2000.0,
    peak: Annotated[float, typer.Option(help="Requests per second to size for.")] = 20.0,
    headroom: Annotated[float, typer.Option(min=1, help="Factor on the peak.")] = 1.3,
) -> None:
    """Measure, and write results and report."""
    writable(output, ".html")
    plan = Plan(
        _known(mix or list(MIXES)), _known(open_mix or ["mixed"]),
        concurrency or CONCURRENCIES, fraction or FRACTIONS,
        closed_seconds, open_seconds, scale, seed, count,
    )  # fmt: skip
    console = Console()
    # The other half decodes images, tokenizes and generates the load.
    threads = threads or max(1, (os.cpu_count() or 2) // 2)
    with target_of(url, _headers(header or []), size, threads) as target:
        results = measure_all(target, plan, Objective(p99_ms, peak, headroom), console)
    served = {"url": url} if url else {"size": size, "dtype": "float32", "threads": threads}
    results = {"served": served, **results}
    output.write_text(json.dumps(results, indent=2) + "\n")
    report = output.with_suffix(".html")
    write_perf_report(results, report)
    console.print(f"written to {output} and {report}")


if __name__ == "__main__":
    run_main(main)
