"""One GPU: check attention and small models, then make, check and time the 7B model.

    python -m benchmarks.gpu --size 7b --device cuda --steps versions,kernels

Steps run in the order of their worth; each is on disk as it ends, and one that fails does not stop
the next. docs/gpu.md says what a bare machine needs and what the steps measure. `--device cpu
--size tiny` runs all of them without a GPU (`make gpu-rehearsal`).
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import typer

from benchmarks.commands import run_main
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Record
from benchmarks.gpu.steps import STEPS, Steps
from benchmarks.measure import writable
from triward_server.errors import is_device_fault
from triward_server.export.random_checkpoint import Size

CHECKPOINTS = Path(tempfile.gettempdir(), "triward-checkpoints")
# Steps whose figures mean nothing where our scores are not the card's.
TIMINGS = ("eager", "compiled", "determinism", "served", "bounded")


def main(
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "7b",
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu to rehearse.")] = "cuda",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option()] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[str, typer.Option(help=f"Of {','.join(STEPS)}.")] = ",".join(STEPS),
    checkpoint_dir: Annotated[
        Path, typer.Option(help="Where checkpoints are made, once, and found again.")
    ] = CHECKPOINTS,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    minutes: Annotated[
        float, typer.Option(help="No step begins later; one that still runs is ended.")
    ] = 9.0,
    output: Annotated[
        Path | None, typer.Option(help="JSON file of the results; one that is there is continued.")
    ] = None,
) -> None:
    """Check and time one model on one device, step by step."""
    chosen = [name for name in steps.split(",") if name]
    if unknown := sorted(set(chosen) - set(STEPS)):
        raise typer.BadParameter(f"no step {unknown[0]!r}; there are {', '.join(STEPS)}")
    writable(output)
    about = {"size": size, "device": device, "dtype": dtype, "repeats": repeats}
    record = Record(output, about)
    if device.startswith("cuda") and not torch.cuda.is_available():
        record.keep("empty", "no GPU was at hand; nothing was measured")
        typer.echo(record.results["empty"])
        return
    record.results.pop("empty", None)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)

    def bench(size: Size) -> Bench:
        return Bench(size, device, dtype, checkpoint_dir, compile_)

    table = output.with_suffix(".profile.txt") if output else None
    every = Steps(bench(size), bench, repeats, table)
    # A kernel that never ends would take the results of this call with it.
    faulthandler.dump_traceback_later(60 * minutes, exit=True)
    try:
        run_all(every, [name for name in STEPS if name in chosen], record, 60 * minutes)
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_all(steps: Steps, names: list[str], record: Record, seconds: float) -> None:
    """Run the named steps in order.

    Args:
        steps: of this run.
        names: which of them.
        record: gets each one's result.
        seconds: no step begins later.
    """
    begun = time.monotonic()
    for number, name in enumerate(names):
        if time.monotonic() - begun >= seconds:
            record.keep("not_reached", names[number:])
            typer.echo(f"the time is over; not reached: {', '.join(names[number:])}")
            return
        failure = record.step(name, getattr(steps, name))
        if name in TIMINGS:
            record.keep("timings_of_a_model_that", _verdict(record.results.get("gate")))
        rest = names[number + 1 :]
        if failure and is_device_fault(failure) and rest:
            left = (seconds - (time.monotonic() - begun)) / 60
            _restart(rest, max(left, 0.0))


def _verdict(gate: Any) -> str:
    if not gate:
        return "was not compared with float32 in this file"
    return "agrees with float32 as the card does" if gate.get("passed") else "FAILED the gate"


def _restart(steps: list[str], minutes: float) -> None:
    """Begin anew with the steps that are left: on a device that faulted nothing runs any more."""
    typer.echo(f"the device faulted; a new process goes on with {', '.join(steps)}")
    sys.stdout.flush()
    arguments = [*sys.argv[1:], f"--steps={','.join(steps)}", f"--minutes={minutes:.2f}"]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *arguments])


if __name__ == "__main__":
    run_main(main)
