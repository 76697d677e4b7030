"""GPUs by name: what their data sheets say. No version of Triward has been measured on one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError

CPU = "cpu"
# Share of the data sheet's peak that a forward pass reaches: ASSUMED. vLLM's prefill of Llama 3.1
# 8B in bfloat16 is published at 0.47 on an H100 (torchao's documentation); ours has smaller
# products, a vision tower and Triton around it.
EFFICIENCY = 0.40
LEAST_EFFICIENCY, MOST_EFFICIENCY = 0.25, 0.50
_COUNTED = re.compile(r"(?:(\d{1,4})\s*x\s*)?([A-Za-z][\w-]*)")


@dataclass(frozen=True)
class DataSheet:
    """What a GPU's data sheet says.

    Attributes:
        name: as `--gpus` takes it.
        tflops: dense bfloat16 in its tensor cores, 10^12 FLOP/s.
        memory: bytes; the sheet's GB, 10^9 each.
        float8: whether it multiplies float8 (compute capability 8.9 or more).
        source: title of the data sheet.
    """

    name: str
    tflops: float
    memory: int
    float8: bool
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        DataSheet("H200", 989.0, 141 * 10**9, True, "NVIDIA H200 data sheet, SXM"),
        DataSheet("H100", 989.0, 80 * 10**9, True, "NVIDIA H100 data sheet, SXM"),
        DataSheet("H100-PCIe", 756.0, 80 * 10**9, True, "NVIDIA H100 data sheet, PCIe"),
        DataSheet("A100", 312.0, 80 * 10**9, False, "NVIDIA A100 data sheet, 80 GB SXM"),
        DataSheet("A100-40GB", 312.0, 40 * 10**9, False, "NVIDIA A100 data sheet, 40 GB"),
        DataSheet("L40S", 362.0, 48 * 10**9, True, "NVIDIA L40S data sheet"),
    )
}


def parse_gpus(text: str) -> tuple[int | None, DataSheet | None]:
    """Read `H100`, `8xH100` or `cpu`: how many there are, None if it is not said, and which.

    Raises:
        ConfigError: no such GPU, or none of them.
    """
    match = _COUNTED.fullmatch(text.strip())
    names = {name.lower(): gpu for name, gpu in GPUS.items()}
    if match is None or match[2].lower() not in {*names, CPU}:
        known = ", ".join([*GPUS, CPU])
        raise ConfigError(f"--gpus {text!r}: NAME or COUNTxNAME of {known}; --measured for others")
    count = int(match[1]) if match[1] else None
    if count == 0:
        raise ConfigError(f"--gpus {text!r}: 0 of them; at least 1 is needed")
    return count, names.get(match[2].lower())
