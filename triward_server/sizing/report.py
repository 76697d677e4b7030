"""A plan for people, for machines, and to paste."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .budgets import Setting
from .demand import ENCODED_BYTES
from .footprint import (
    CUDA_PROCESS,
    DECODER,
    FORWARD_PROCESS,
    GIB,
    MIB,
    PIXEL_BYTES,
    PREPROCESS_PROCESS,
    TMP,
    TRITON_IDLE,
)
from .planner import P99, CapacityPlan


class Figure(NamedTuple):
    """One line: a name, its value and where it is from, in words."""

    name: str
    value: str
    how: str


def print_plan(plan: CapacityPlan, console: Console) -> None:
    """Print a plan."""
    subject = plan.subject
    sections = {
        f"A request to {subject.title}, {subject.dtype}, on {plan.speed.device}": _request(plan),
        "Replicas": _replicas(plan),
        "Flags of the export": _budgets(plan),
        "Memory": _memory(plan),
    }
    for title, figures in sections.items():
        console.print(escape(title), style="bold", highlight=False)
        table = Table(show_header=False, box=box.SIMPLE, padding=(0, 1))
        table.add_column()
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        for figure in figures:
            table.add_row(*map(escape, figure))
        console.print(table)
    console.print("Assumptions", style="bold")
    listed = Table.grid(padding=(0, 1))
    for line in assumptions(plan):
        listed.add_row(" -", escape(line))
    console.print(listed)
    console.print("\nTo paste", style="bold")
    for line in to_paste(plan):
        console.print(escape(line), soft_wrap=True, highlight=False)


def _request(plan: CapacityPlan) -> Iterator[Figure]:
    work, shape, side = plan.work, plan.demand.shape, plan.subject.geometry.patch_size
    place = work.footing
    if place.grid:
        size = f"{place.grid.w * side} x {place.grid.h * side} pixels, as the model reads them"
        yield Figure("tokens of images", f"{place.image_tokens:,}", f"{shape.images} of {size}")
    yield Figure(
        "tokens", f"{place.total:,}",
        f"prompt {place.prompt:,} once + {shape.responses} x {shape.response_tokens:,}",
    )  # fmt: skip
    repeats = f"; {shape.repeat_share:.0%} find their prompt cached" if shape.repeat_share else ""
    yield Figure("TFLOP", f"{work.flops / 1e12:.3g}", f"by the engine's planner{repeats}")
    yield Figure("TFLOP/s", f"{plan.speed.flops / 1e12:.3g}", plan.speed.why)
    yield Figure("seconds of a device", f"{work.seconds:.3g}", "TFLOP / TFLOP/s")


def _replicas(plan: CapacityPlan) -> Iterator[Figure]:
    demand, queue = plan.demand, plan.queue
    devices = f"{demand.devices} devices" if demand.devices > 1 else "one device"
    yield Figure(
        "replicas", f"{plan.replicas}",
        f"{plan.working} + one to spare, {devices} each: utilisation at most "
        f"{demand.utilisation:g}, p99 of the answer at most {demand.p99:g} s",
    )  # fmt: skip
    fast, slow = plan.between
    low, high = (f"{rate / 1e12:.3g}" for rate in plan.speed.bounds)
    yield Figure("or between", f"{fast} and {slow}", f"at {high} and at {low} TFLOP/s")
    most = demand.utilisation * demand.devices / plan.work.seconds
    yield Figure("requests/s of one", f"{most:.3g}", "utilisation x devices / seconds")
    yield Figure("utilisation", f"{queue.utilisation:.2f}", "rate x seconds / devices, at the peak")
    yield Figure("mean wait", _seconds(queue.mean_wait), "Allen-Cunneen, Poisson arrivals")
    yield Figure("p99 of the wait", _seconds(queue.wait(P99)), "exponential tail with that mean")
    yield Figure(
        "p99 of the answer", _seconds(queue.answer(P99)),
        "with its own time, and of those that came while it waited",
    )  # fmt: skip
    if plan.given is not None:
        need = plan.replicas * demand.devices
        word = f"{plan.missing} are missing" if plan.missing else "enough"
        yield Figure("devices", f"{need} of {plan.given}", word)


def _budgets(plan: CapacityPlan) -> Iterator[Figure]:
    for field in fields(plan.budgets):
        setting: Setting = getattr(plan.budgets, field.name)
        yield Figure(_flag(field.name), f"{setting.value:.12g}", setting.why)


def _memory(plan: CapacityPlan) -> Iterator[Figure]:
    device, host = plan.device, plan.host
    where = "GPU" if device.total else "process"
    yield Figure(f"{where}: weights", _size(device.weights), "of the model, in its dtype")
    yield Figure(f"{where}: a pass", _size(device.batch), "--max-batch-bytes")
    yield Figure(f"{where}: embeddings", _size(device.embeddings), "--embedding-cache-bytes")
    prompts = device.prefixes // max(1, plan.subject.key_bytes * plan.work.footing.prompt)
    yield Figure(
        f"{where}: prefix cache", _size(device.prefixes),
        f"its default or --prefix-cache-bytes; {prompts:,} such prompts",
    )  # fmt: skip
    if device.total:
        all_of_it = f"{_size(device.used)} of {_size(device.total)}"
        yield Figure("GPU: all", all_of_it, f"{_size(device.reserve)} kept free")
    yield Figure(
        "/dev/shm", _size(host.shm),
        "(preprocessing + forward instances + 1) x a batch of requests, half as much again",
    )  # fmt: skip
    idle = f"{_size(TRITON_IDLE)} idle + two full queues"
    yield Figure("tritonserver", _size(host.tritonserver), idle)
    yield Figure(
        "preprocessing", _size(host.preprocessing),
        f"instances x ({PREPROCESS_PROCESS / GIB:.1f} GiB + {_size(DECODER)} + {PIXEL_BYTES} bytes "
        "a pixel of an image + a request)",
    )  # fmt: skip
    on_cpu = f"{FORWARD_PROCESS / GIB:.1f} GiB + what a process holds"
    forward = f"{CUDA_PROCESS // GIB} GiB a device, assumed" if device.total else on_cpu
    yield Figure("forward, on the host", _size(host.forward), forward)
    yield Figure(
        "a replica", f"{host.limit} GiB",
        f"all of these with {TMP // GIB} GiB of /tmp, or twice serve's --max-memory "
        f"{host.max_memory}",
    )  # fmt: skip


def assumptions(plan: CapacityPlan) -> list[str]:
    """Return what a plan takes for granted, most doubtful first."""
    demand = plan.demand
    found = [*plan.speed.notes]
    if plan.speed.measured:
        found.append("a FLOP of this model takes as long as one of the measured model")
    return [
        *found,
        f"requests arrive at random; their costs vary by {demand.variation:g} of the mean",
        "callers are spread evenly over replicas; no two requests share a prompt at one time",
        f"an image is sent in {ENCODED_BYTES:g} bytes a pixel; JPEGs are smaller",
    ]


def manifests(plan: CapacityPlan) -> dict[str, dict[str, Any]]:
    """Return values for `docker/compose.yaml` and for the Helm chart, by their names there."""
    shm, gib, devices = plan.host.shm // MIB, plan.host.limit, plan.demand.devices
    gpus = devices if plan.speed.kind == "gpu" else 0
    # One for each process: decoders, forward models, tritonserver.
    cores = int(plan.budgets.preprocess_instances.value) + devices + 1
    memory = {"memory": f"{gib}Gi"}
    flags = ["--no-compile", *(f"{name}={value}" for name, value in _export_flags(plan).items())]
    return {
        "compose": {"shm_size": f"{shm}mb", "mem_limit": f"{gib}gb", "memswap_limit": f"{gib}gb"},
        "helm": {
            "replicas": plan.replicas,
            "gpus": gpus,
            "shmSize": f"{shm}Mi",
            "resources": {"requests": {"cpu": cores, **memory}, "limits": memory},
            "model": {"hf": {"exportArgs": flags}},
        },
    }


def commands(plan: CapacityPlan) -> dict[str, str]:
    """Return the commands that export and serve what was planned."""
    flags = [f"{name} {value}" for name, value in _export_flags(plan).items()]
    export = f"triward-server export --checkpoint {plan.subject.checkpoint or 'CHECKPOINT'}"
    serve = f"triward-server serve --repository models --max-memory {plan.host.max_memory}"
    return {"export": " ".join([export, "--output models", *flags]), "serve": serve}


def _export_flags(plan: CapacityPlan) -> dict[str, str]:
    """Return the flags of the export that was planned, but for where from and where to."""
    devices = plan.demand.devices
    if plan.speed.kind == "cpu":
        place = {"--device": "cpu"} if devices == 1 else {"--devices": ",".join(["cpu"] * devices)}
    else:
        place = {"--devices": "all"} if devices > 1 else {"--device": "cuda"}
    budgets = {
        _flag(field.name): f"{getattr(plan.budgets, field.name).value:.12g}"
        for field in fields(plan.budgets)
    }
    return {"--dtype": plan.subject.dtype, **place, **budgets}


def to_paste(plan: CapacityPlan) -> Iterator[str]:
    """Yield commands and values as they can be pasted."""
    yield from commands(plan).values()
    values = manifests(plan)
    yield "# docker/compose.yaml, service triward"
    yield from (f"{key}: {value}" for key, value in values["compose"].items())
    yield "# docker/helm/triward, values.yaml"
    yield from (f"{key}: {_inline(value)}" for key, value in values["helm"].items())


def for_machines(plan: CapacityPlan) -> dict[str, Any]:
    """Return a plan for machines: bytes, seconds, FLOPs."""
    queue, work, host = plan.queue, plan.work, plan.host
    budgets = {field.name: getattr(plan.budgets, field.name) for field in fields(plan.budgets)}
    return {
        "model": plan.subject.title,
        "dtype": plan.subject.dtype,
        "speed": asdict(plan.speed),
        "demand": asdict(plan.demand),
        "request": {
            "tokens": work.footing.total,
            "image_tokens": work.footing.image_tokens,
            "flop": work.flops,
            "seconds": work.seconds,
        },
        "replicas": plan.replicas,
        "working": plan.working,
        "replicas_between": list(plan.between),
        "missing_devices": plan.missing,
        "queue": {
            "utilisation": queue.utilisation,
            "mean_wait_s": queue.mean_wait,
            "p99_wait_s": queue.wait(P99),
            "p99_answer_s": queue.answer(P99),
        },
        "flags": {name: setting._asdict() for name, setting in budgets.items()},
        "device_memory": asdict(plan.device),
        "host_memory": asdict(host) | {"max_memory_gib": host.max_memory, "limit_gib": host.limit},
        "assumptions": assumptions(plan),
        "commands": commands(plan),
        "manifests": manifests(plan),
    }


def _inline(value: Any) -> str:
    """Return YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(json.dumps, value))}]"
    if not isinstance(value, dict):
        return str(value)
    return "{" + ", ".join(f"{key}: {_inline(each)}" for key, each in value.items()) + "}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
