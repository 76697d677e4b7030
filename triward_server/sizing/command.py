"""The command `plan`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..config import Dtype
from ..errors import ConfigError, TriwardError

if TYPE_CHECKING:
    from .gpus import DataSheet
    from .models import Subject
    from .planner import CapacityPlan
    from .speed import Speed

CPU_RESULTS = "2026-11-22-cpu-small.json"  # with which a CPU is planned


def _option(help_: str, **more: Any) -> Any:
    return typer.Option(help=help_, show_default=more.pop("show", True), **more)


Rate = Annotated[float, _option("At the peak, of all callers together.")]
PromptTokens = Annotated[int, _option("Of a prompt's text, chat template included.")]
Gpus = Annotated[str | None, _option("H100, or 8xH100 if so many are there; or cpu.")]
Responses = Annotated[int, _option("In one request.")]
ResponseTokens = Annotated[int, _option("Of one response.")]
Images = Annotated[int, _option("In a prompt.")]
ImageSize = Annotated[str, _option("Of each, WIDTHxHEIGHT in pixels.")]
Repeats = Annotated[float, _option("Share of requests whose prompt the prefix cache still has.")]
Model = Annotated[str, _option("7b (Skywork-VL-Reward-7B), llama-8b, small.")]
Checkpoint = Annotated[Path | None, _option("In place of --model: a local folder.")]
Exported = Annotated[Path | None, _option("In place of --model: what `export` wrote.")]
Served = Annotated[Dtype | None, _option("bfloat16; on a CPU float32.", show=False)]
Measured = Annotated[
    Path | None, _option("Results file of benchmarks.gpu, perf_analyzer or compare: the speed.")
]
Efficiency = Annotated[
    float | None, _option("Share of a GPU's peak where nothing is measured; 0.4.", show=False)
]
Timeout = Annotated[float, _option("Seconds after which callers give up.")]
P99 = Annotated[float | None, _option("Seconds for 99 of 100 answers; the timeout.", show=False)]
Utilisation = Annotated[float, _option("Of a replica's devices, at most.")]
Variation = Annotated[float, _option("Of requests' costs: standard deviation over mean.")]
PerReplica = Annotated[int, _option("That share one queue.")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


def plan_replicas(
    requests_per_second: Rate,
    prompt_tokens: PromptTokens,
    gpus: Gpus = None,
    responses: Responses = 1,
    response_tokens: ResponseTokens = 250,
    images: Images = 0,
    image_size: ImageSize = "1024x768",
    repeat_share: Repeats = 0.0,
    model: Model = "7b",
    checkpoint: Checkpoint = None,
    repository: Exported = None,
    dtype: Served = None,
    measured: Measured = None,
    efficiency: Efficiency = None,
    timeout: Timeout = 30.0,
    p99: P99 = None,
    utilisation: Utilisation = 0.7,
    variation: Variation = 0.5,
    gpus_per_replica: PerReplica = 1,
    as_json: AsJson = False,
) -> None:
    """Say how many replicas a load takes, with which budgets and how much memory, and why.

    Exits with 1 where --gpus names fewer GPUs than are needed.
    """
    from .demand import Demand
    from .gpus import parse_gpus
    from .models import subject_of  # torch, which the other commands do not need
    from .planner import make_plan
    from .request import RequestShape

    with _refusals():
        shape = RequestShape(
            prompt_tokens, response_tokens, responses, images, _size(image_size), repeat_share
        )
        demand = Demand(
            requests_per_second, shape, variation, timeout, timeout if p99 is None else p99,
            utilisation, gpus_per_replica,
        )  # fmt: skip
        count, gpu = parse_gpus(gpus) if gpus else (None, None)
        on_cpu = gpus is not None and gpu is None
        if on_cpu and not repository:
            dtype = dtype or "float32"
        subject = subject_of(model, checkpoint, repository, dtype)
        speed = _speed(subject, gpu, on_cpu, measured, efficiency)
        plan = make_plan(subject, speed, demand, count)
    _print(plan, as_json)


def _speed(
    subject: Subject,
    gpu: DataSheet | None,
    on_cpu: bool,
    measured: Path | None,
    efficiency: float | None,
) -> Speed:
    from .gpus import EFFICIENCY
    from .measured import carried_rates, read_rates
    from .speed import assumed, from_rates

    if gpu is None and not on_cpu and measured is None:
        raise ConfigError("--gpus: name a GPU or cpu, or give --measured")
    if efficiency is not None and (measured or gpu is None):
        raise ConfigError(f"--efficiency {efficiency:g}: it is for a GPU without --measured")
    if gpu and measured is None:
        return assumed(gpu, subject.dtype, EFFICIENCY if efficiency is None else efficiency)
    rates = read_rates(measured, subject.cost) if measured else carried_rates(CPU_RESULTS)
    return from_rates(rates, subject.dtype, gpu, on_cpu=on_cpu)


def _print(plan: CapacityPlan, as_json: bool) -> None:
    from .report import for_machines, print_plan

    if as_json:
        typer.echo(json.dumps(for_machines(plan), indent=2))
    else:
        print_plan(plan, Console())
    if plan.missing:
        raise typer.Exit(1)


@contextmanager
def _refusals() -> Iterator[None]:
    """End with 1 and say why on stderr."""
    try:
        yield
    except TriwardError as error:
        typer.echo(f"triward-server plan: {error}", err=True)
        raise typer.Exit(1) from None


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ConfigError(f"--image-size {text!r}: WIDTHxHEIGHT in pixels, as 1024x768")
    return int(width), int(height)
