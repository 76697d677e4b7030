"""Timings: workloads in turns, ceilings, and how long the device has nothing to do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.executing import Executing
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.card import fastest_attention
from benchmarks.measure import in_turns, row, scores, timed, work
from benchmarks.workloads import Messages, Workload
from triward_server.engine.float8 import multiply, quantise, quantise_weight
from triward_server.engine.scoring import Scorer
from triward_server.schema import Features

if TYPE_CHECKING:  # not on a bare machine
    from triward import RewardClient
    from triward_server.serving.launch import TritonServer

# Of one workload, what the card's code is timed with at most: one by one, and in a padded batch.
CARD_LOOP, CARD_BATCH = 4, 8
_PROFILED = 3  # passes
_IN_A_ROW = 5  # batches that the server's code executes, one behind the other
_TIMES = 16  # each request of a workload, to a server that is to be busy
_PASSES = ("triward_vision_seconds_total", "triward_language_model_seconds_total")
_CUDA: Any = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]


def ceilings(bench: Bench) -> dict[str, Any]:
    """Matrix product in the model's dtype and copy, the best of several."""
    n = 8192 if bench.device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=bench.device).to(bench.dtype) for _ in range(2))
    source = torch.empty(8 * n * n, device=bench.device)
    target = torch.empty_like(source)
    times = in_turns({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 20)
    return {
        "matmul_size": n,
        "matmul_tflops": 2 * n**3 / min(times["matmul"]) / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / min(times["copy"]) / 1e9,
    }


def products(bench: Bench, repeats: int) -> dict[str, Any]:
    """TFLOP/s of the decoder's four products: bfloat16, float8, and with its fast sums.

    Quantising the rows counts for float8, as in a pass; on a CPU it is the emulation.
    """
    tokens = 8192 if bench.device.type == "cuda" else 64
    layer = bench.eager._model.language_model.layers[1]
    found: dict[str, Any] = {}
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        x = torch.randn(tokens, weight.shape[1], device=bench.device, dtype=bench.dtype)
        values, scale = quantise_weight(weight)
        runs: dict[str, Callable[[], object]] = {
            "bfloat16": partial(F.linear, x, weight),
            "float8": partial(_float8, x, values, scale),
            "float8, quantised before": partial(multiply, *quantise(x), values, scale, None),
        }
        if bench.device.type == "cuda":
            runs["float8, quantised before, fast sums"] = partial(
                _fast, *quantise(x), values, scale
            )
        for run in runs.values():
            run()
        flops = 2 * tokens * weight.numel()
        times = in_turns(runs, 4 * repeats)
        found[name] = {path: flops / min(taken) / 1e12 for path, taken in times.items()}
    return {"tokens": tokens, "tflops": found}


def _float8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    return multiply(*quantise(x), weight, weight_scale, None)


def _fast(
    values: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    product: torch.Tensor = torch._scaled_mm(
        values, weight.t(), scale, weight_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return product


def beside_the_card(bench: Bench, workload: Workload, repeats: int) -> dict[str, Any]:
    """Time one workload eagerly beside the card's loop and the fastest one of transformers."""
    card, rows = bench.card, workload.conversations()
    few, eight = rows[:CARD_LOOP], rows[:CARD_BATCH]
    counts = {"card, one by one": len(few), "card, padded batches of 8": len(eight)}
    result = ours(bench, bench.eager, "Scorer, eager", workload, repeats, {
        "card, one by one": lambda: [card.score(messages) for messages in few],
        "card, padded batches of 8": lambda: card.score_inputs(card.inputs(eight)),
        "features and Scorer, eager": lambda: scores(bench.eager, bench.features(workload)),
    }, counts)  # fmt: skip
    try:
        result["paths"][f"transformers, {fastest_attention()}, compiled"] = fastest_loop(
            bench, eight, repeats
        )
    except Exception as error:  # transformers' code may not compile; ours is timed all the same
        result["transformers, compiled"] = f"failed: {type(error).__name__}: {error}"[:2000]
    baseline = result["paths"]["card, one by one"]["conversations_per_s"]
    for values in result["paths"].values():
        values["speedup"] = round(values["conversations_per_s"] / baseline, 3)
    return result


def fastest_loop(bench: Bench, rows: Sequence[Messages], repeats: int) -> dict[str, Any]:
    """Time transformers' compiled layers on prepared inputs, one padded batch."""
    card = bench.card.compiled()
    inputs = card.inputs(rows)
    first = timed(partial(card.score_inputs, inputs))
    run = partial(card.score_inputs, inputs)
    run()
    times = in_turns({"run": run}, repeats)["run"]
    return row(times, len(rows)) | {"first_s": round(first, 2)}


def ours(
    bench: Bench,
    scorer: Scorer,
    name: str,
    workload: Workload,
    repeats: int,
    beside: dict[str, Callable[[], object]] | None = None,
    counts: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Any]:
    """Time one workload's prepared requests, in turns with what is beside them."""
    batch, rows = bench.features(workload), len(workload.conversations())
    runs: dict[str, Callable[[], object]] = {**(beside or {}), name: partial(scores, scorer, batch)}
    for run in runs.values():
        run()
    times = in_turns(runs, repeats)
    predicted = work(batch, scorer.geometry, scorer.cost)
    median = statistics.median(times[name])
    return {
        "conversations": rows,
        "ideal_speedup": predicted.flops_alone / predicted.flops,
        "scorer_tflops": predicted.flops / median / 1e12,
        "paths": {path: row(taken, counts.get(path, rows)) for path, taken in times.items()},
    }


def profiled(
    scorer: Scorer, bench: Bench, workload: Workload, median_s: float
) -> tuple[dict[str, Any], str]:
    """Return the share of a batch in which the device idles, and a table of what it does.

    Twice: the scorer alone, checks and digests included; and batches in a row as the forward model
    executes them, from one batch's tensors to the next one's (what Triton adds, `served` shows).

    Args:
        scorer: what is profiled.
        bench: the scorer's.
        workload: one batch.
        median_s: how long a batch takes without a profiler, which slows the host down.
    """
    batch = bench.features(workload)
    cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(_PROFILED):
            scores(scorer, batch)
    kernels = intervals(profiler.events() or ())
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=80)
    busy_s = busy_time(kernels) / 1e6 / _PROFILED
    executed_s = executed(scorer, batch)
    found = {
        "kernels_a_pass": len(kernels) // _PROFILED,
        "busy_s": busy_s,
        "idle_share": 1 - busy_s / median_s if kernels else None,
        "executed_s": executed_s,
        "executed_idle_share": 1 - busy_s / executed_s if kernels else None,
    }
    return found, table


def executed(scorer: Scorer, batch: Sequence[Features]) -> float:
    """Seconds of a batch among several that the forward model's code executes in a row."""
    backend = Executing(scorer)
    batches = [backend.batch(batch) for _ in range(_IN_A_ROW)]
    return timed(lambda: [backend.execute(each) for each in batches]) / _IN_A_ROW


def no_pass_share(server: TritonServer, client: RewardClient, batch: Sequence[Features]) -> float:
    """Return the share of the time in which no pass is on the device of a server that is busy.

    Args:
        server: Triton.
        client: of it.
        batch: what many callers send several times, each time with another first token and other
            pixels, so that nothing is shared.
    """
    from benchmarks.tokens import by_tokens

    sent = [_changed(item, number) for number in range(_TIMES) for item in batch]
    before = _seconds_of_passes(server)
    seconds = timed(partial(by_tokens, client, sent))
    return 1 - (_seconds_of_passes(server) - before) / seconds


def _changed(item: Features, number: int) -> Features:
    prompt = item.prompt_ids.copy()
    prompt[0] = number
    return replace(item, prompt_ids=prompt, media=tuple(m + np.uint8(number) for m in item.media))


def _seconds_of_passes(server: TritonServer) -> float:
    from triward_server.serving.triton_http import read_metrics

    page = read_metrics("127.0.0.1", server.endpoints.metrics_port, 10)
    return sum(series.value for series in page if series.name in _PASSES)


def intervals(events: Iterable[Any]) -> list[tuple[float, float]]:
    """Return start and end in µs of what a GPU computed or copied; no names of regions."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == _CUDA and not event.is_user_annotation
    ]


def busy_time(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long any of some intervals lasts; where several do, time counts once."""
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy
