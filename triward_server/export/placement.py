"""Devices of the forward model: `--device` and `--devices` -> Triton's instance groups."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

ALL = "all"  # GPUs of the machine that serves
_GPU = re.compile(r"cuda:(\d+)")


@dataclass(frozen=True)
class Placement:
    """Processes of one model, each with its own weights and caches.

    Attributes:
        device: of the model's parameters: `cpu`; or `cuda`, the GPU of Triton's instance.
        gpus: their numbers; none listed: all that the machine has.
        count: processes on each GPU, or on the CPU.
    """

    device: str
    gpus: tuple[int, ...] = ()
    count: int = 1

    @property
    def named(self) -> int:
        """Processes as far as they are named: one for all the GPUs of a machine."""
        return self.count * max(1, len(self.gpus))

    def apply(self, model: Any, count: int) -> None:
        """Write it into a configuration.

        Args:
            model: a ModelConfig.
            count: processes on each device.
        """
        group = model.instance_group[0]
        group.kind = group.KIND_CPU if self.device == "cpu" else group.KIND_GPU
        group.gpus[:] = self.gpus
        group.count = count


def placement(devices: str) -> Placement:
    """Read a list of devices, or one.

    Args:
        devices: `cuda:0,cuda:1`; `all` or `cuda`, every GPU; `cpu`, or `cpu,cpu` for two processes.

    Raises:
        ConfigError: it is none of these.
    """
    names = devices.split(",")
    if set(names) == {"cpu"}:
        return Placement("cpu", count=len(names))
    if devices in (ALL, "cuda"):
        return Placement("cuda")
    gpus = tuple(int(match[1]) for name in names if (match := _GPU.fullmatch(name)))
    if len(gpus) < len(names):
        raise ConfigError(f"--devices {devices!r}: must be cuda:0,cuda:1,…, all, or cpu,cpu,…")
    if len(set(gpus)) < len(gpus):
        raise ConfigError(f"--devices {devices!r}: names a GPU twice, each holds the weights once")
    return Placement("cuda", gpus)
