"""The speed of one device: measured, or a share of a data sheet's peak that is assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import Dtype
from ..errors import ConfigError
from .gpus import EFFICIENCY, GPUS, LEAST_EFFICIENCY, MOST_EFFICIENCY, DataSheet
from .measured import Rates

UNMEASURED = (
    "No version of Triward has been measured on a GPU. The efficiency is an ASSUMPTION. Measure "
    "it: python -m benchmarks.gpu (docs/gpu.md), then --measured FILE"
)


@dataclass(frozen=True)
class Speed:
    """How fast one device of a replica computes.

    Attributes:
        device: what it is.
        kind: `gpu` or `cpu`.
        flops: FLOP/s.
        bounds: FLOP/s, pessimistic and optimistic.
        memory: bytes of a GPU; None of a CPU.
        measured: whether `flops` was measured.
        why: where `flops` is from.
        notes: what to know about it.
    """

    device: str
    kind: Literal["gpu", "cpu"]
    flops: float
    bounds: tuple[float, float]
    memory: int | None
    measured: bool
    why: str
    notes: tuple[str, ...] = ()


def assumed(gpu: DataSheet, dtype: Dtype, efficiency: float = EFFICIENCY) -> Speed:
    """Return a GPU's speed by its data sheet.

    Raises:
        ConfigError: it does not multiply this dtype in its tensor cores, or no such share.
    """
    if dtype == "float8" and not gpu.float8:
        raise ConfigError(f"--dtype float8: {gpu.name} has compute capability below 8.9")
    if dtype == "float32":
        raise ConfigError("--dtype float32: on a GPU it is for checks; --dtype bfloat16")
    if not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency {efficiency:g}: must be above 0 and at most 1")
    peak = gpu.tflops * 1e12
    notes = [UNMEASURED]
    if dtype == "float8":
        notes.append("float8 is planned with bfloat16's speed: what it gains is not measured")
    return Speed(
        gpu.name,
        "gpu",
        peak * efficiency,
        (peak * min(LEAST_EFFICIENCY, efficiency), peak * max(MOST_EFFICIENCY, efficiency)),
        gpu.memory,
        False,
        f"{efficiency:g} (assumed) of {gpu.tflops:g} TFLOP/s, dense bfloat16 ({gpu.source})",
        tuple(notes),
    )


def from_rates(rates: Rates, dtype: Dtype, gpu: DataSheet | None, on_cpu: bool = False) -> Speed:
    """Return a measured speed.

    Args:
        rates: of a file.
        dtype: in which the model will be served.
        gpu: what `--gpus` named; None: it named none, or a CPU.
        on_cpu: whether it named a CPU.

    Raises:
        ConfigError: the file is of another device or dtype, or does not say which; or how large
            the GPU is.
    """
    named = gpu.name if gpu else "cpu" if on_cpu else None
    if rates.dtype and rates.dtype != dtype:
        raise ConfigError(f"--dtype {dtype}: {rates.source} was measured in {rates.dtype}")
    if rates.device is None and named is None:
        raise ConfigError(f"--measured {rates.source}: the server's device needs --gpus NAME")
    if rates.device is not None and named and not _is(rates, gpu):
        raise ConfigError(f"--gpus {named}: {rates.source} was measured on {rates.device}")
    memory = None
    if gpu or rates.gpu:
        found = [each.memory for each in GPUS.values() if _is(rates, each)]
        memory = gpu.memory if gpu else rates.memory or next(iter(found), None)
        if memory is None:
            raise ConfigError(f"--measured {rates.source}: the memory of {rates.gpu} is not said")
    device = rates.device or str(named)
    why = f"median of {len(rates.rows)} workloads of {rates.source} on {device}"
    low, high = rates.bounds
    spread = f"its workloads ran at {low / 1e12:.3g} to {high / 1e12:.3g} TFLOP/s"
    kind: Literal["gpu", "cpu"] = "cpu" if memory is None else "gpu"
    notes = (spread, *rates.notes)
    return Speed(device, kind, rates.typical, (low, high), memory, True, why, notes)


def _is(rates: Rates, gpu: DataSheet | None) -> bool:
    """Whether a file is of this GPU; None: of a CPU."""
    if gpu is None or rates.gpu is None:
        return gpu is None and rates.gpu is None
    return gpu.name.split("-")[0].lower() in rates.gpu.lower()
