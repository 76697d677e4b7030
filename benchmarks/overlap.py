"""How long a GPU would wait for the host: a simulated one, and the engine's own host work.

    python -m benchmarks.overlap --output results.json

The device sleeps as long as a pass of Qwen2.5-VL-7B takes at a given speed, and computes nothing.
Reading tensors, checks, digests, sorting, planning, packing and the prefix cache are the server's
own. Copies to the device and queueing kernels are not in it; `benchmarks.gpu` measures those where
there is a GPU. Three measurements:

    inside a batch     one after the other, in turns: the next pass launched while one is computed,
                       and each pass waited for
    between batches    the forward model's `execute`, batch after batch
    behind Triton      likewise in a real one, which callers keep busy; and with
                       `--overlap-batches`, which reads a batch while one is computed
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.commands import run_main
from benchmarks.executing import Executing
from benchmarks.measure import in_turns, machine, triton, writable
from benchmarks.sleeping import PassInFlight, SleepingGpu, Span, batch_of, idle
from triward import RewardClient
from triward_server.config import ForwardConfig
from triward_server.engine import passes
from triward_server.engine.geometry import Geometry
from triward_server.engine.scoring import Scorer
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.schema import Features

INSIDE = {"1 group of 64": (1, 64), "8 groups of 8": (8, 8), "64 single": (64, 1)}
# Requests of a batch and responses of each; and how many batches, some seconds of them.
BETWEEN = {
    "1 single": (1, 1, 40), "8 single": (8, 1, 9), "64 single": (64, 1, 3),
    "1 group of 64": (1, 64, 7), "8 groups of 8": (8, 8, 5),
}  # fmt: skip
WAITING = 3  # batches of callers: one is computed, one is read, one waits
_IMPORT = "from triward_server.backend.triton_io import ForwardBackend\n"
_INSTEAD = """import sys
from functools import partial

sys.path[:0] = {path!r}
from benchmarks.sleeping import SleepingBackend

ForwardBackend = partial(SleepingBackend, flops={flops!r}, log={log!r})
"""


def inside_batches(scorer: Scorer, flops: float, repeats: int) -> dict[str, Any]:
    """Take every workload in turns with and without a pass ahead."""
    rows: dict[str, Any] = {}
    for name, sizes in INSIDE.items():
        count = 2 * repeats + 2
        ready = [batch_of(*sizes, scorer.geometry, seed) for seed in range(count)]
        gpus = {side: SleepingGpu(scorer, flops, side == "ahead") for side in ("ahead", "waiting")}
        runs: dict[str, Callable[[], object]] = {
            side: partial(_score_next, scorer, gpu, ready) for side, gpu in gpus.items()
        }
        in_turns(runs, 1)
        for gpu in gpus.values():
            gpu.spans.clear()
        times = in_turns(runs, repeats)
        rows[name] = {
            side: {
                "busy_s": round(gpus[side].busy, 4),
                "all_s": [round(s, 4) for s in taken],
                "idle_share": round(1 - gpus[side].busy / sum(taken), 4),
            }
            for side, taken in times.items()
        }
    return rows


def _score_next(scorer: Scorer, gpu: SleepingGpu, ready: list[list[Features]]) -> None:
    with patch.object(scorer._passes, "_model", gpu):
        scorer.score(ready.pop())


def between_batches(scorer: Scorer, flops: float) -> dict[str, Any]:
    """Execute batch after batch of every workload, without Triton."""
    rows: dict[str, Any] = {}
    backend = Executing(scorer)
    for name, (requests, responses, count) in BETWEEN.items():
        batches = [
            backend.batch(batch_of(requests, responses, scorer.geometry, seed))
            for seed in range(count)
        ]
        gpu = SleepingGpu(scorer, flops)
        with patch.object(scorer._passes, "_model", gpu):
            for batch in batches:
                gpu.batch += 1
                backend.execute(batch)
        rows[name] = idle(gpu.spans, first=2)
    return rows


def behind_triton(
    checkpoint: Path, geometry: Geometry, flops: float, *flags: str
) -> dict[str, Any]:
    """Score every workload behind a real Triton, whose batches have the workload's size."""
    rows: dict[str, Any] = {}
    for name, (requests, responses, count) in BETWEEN.items():
        asked = batch_of(requests * (count + 1), responses, geometry, 0)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "spans.json")
            server = triton(
                checkpoint, "--dtype=float32", "--device=cpu", "--no-verify",
                f"--forward-batch-size={requests}", *flags,
                change=partial(_sleep, flops=flops, log=log),
            )  # fmt: skip
            with server as running, RewardClient(running.endpoints.grpc, timeout=600) as client:
                _ask(client, asked, WAITING * requests)
            spans = [Span(**each) for each in json.loads(log.read_text())]
        rows[name] = idle(spans, first=2)
    return rows


def _ask(client: RewardClient, asked: Sequence[Features], callers: int) -> None:
    def ask(item: Features) -> list[float]:
        return client.score_tokens(item.prompt_ids, item.response_ids, media=item.media)

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(ask, asked))


def _sleep(repository: Path, *, flops: float, log: Path) -> None:
    """Put a sleeping GPU into the place of a repository's model."""
    adapter = repository / "reward_forward" / "1" / "model.py"
    text = adapter.read_text()
    assert text.count(_IMPORT) == 1, f"{adapter} imports its backend otherwise"
    instead = _INSTEAD.format(path=sys.path, flops=flops, log=str(log))
    adapter.unlink()  # it may be a link
    adapter.write_text(text.replace(_IMPORT, instead))


def main(
    tflops: Annotated[float, typer.Option(help="Speed of the simulated GPU.")] = 400,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of one pass.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file that gets the rows.")] = None,
) -> None:
    """Measure the host's work on this machine beside a GPU that only sleeps."""
    writable(output)
    flops = tflops * 1e12
    with tempfile.TemporaryDirectory() as folder, patch.object(passes, "Clock", PassInFlight):
        checkpoint = Path(folder, "checkpoint")
        make_checkpoint("tiny", 0, checkpoint)
        config = ForwardConfig(
            dtype="float32", device="cpu", max_batch_tokens=max_batch_tokens, max_tokens=4096
        )
        scorer = Scorer(checkpoint, config)
        load = [os.getloadavg()[0]]
        rows = inside_batches(scorer, flops, repeats)
        alone = between_batches(scorer, flops)
        tokens = f"--max-batch-tokens={max_batch_tokens}"
        behind, overlapping = (
            behind_triton(checkpoint, scorer.geometry, flops, tokens, *flags)
            for flags in ([], ["--overlap-batches"])
        )
        load.append(os.getloadavg()[0])
    _show(rows, {"execute": alone, "behind Triton": behind, "--overlap-batches": overlapping})
    if output:
        settings = {"tflops": tflops, "max_batch_tokens": max_batch_tokens, "repeats": repeats}
        results = {"machine": machine(), **settings, "load_average_before_and_after": load}
        results |= {"rows": rows, "between_batches": alone, "behind_triton": behind}
        results |= {"behind_triton_overlapping": overlapping}
        output.write_text(json.dumps(results, indent=2) + "\n")


def _show(rows: dict[str, Any], consecutive: dict[str, dict[str, Any]]) -> None:
    inside = Table(title="share of the time in which the GPU waits for the host")
    for column in ("batch", "next pass launched ahead", "each pass waited for"):
        inside.add_column(column, justify="left" if column == "batch" else "right")
    for name, sides in rows.items():
        inside.add_row(name, *(f"{sides[side]['idle_share']:.1%}" for side in ("ahead", "waiting")))
    between = Table(title="share that lies between two batches, and its median in ms")
    between.add_column("batch")
    for column in consecutive:
        between.add_column(column, justify="right")
    for name in BETWEEN:
        found = [each[name] for each in consecutive.values()]
        cells = (
            f"{each['between_batches_share']:.1%}  {median(each['between_batches_ms']):.1f}"
            for each in found
        )
        between.add_row(name, *cells)
    for table in (inside, between):
        Console().print(table)


if __name__ == "__main__":
    run_main(main)
