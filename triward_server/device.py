"""The device that a process computes on, chosen before anything touches CUDA."""

from __future__ import annotations

import torch


def select(name: str) -> torch.device:
    """Make a device the process's own.

    Events, pinned memory and libraries' handles belong to the current device, which is GPU 0 until
    another is chosen: on `cuda:1` they would take a context, and memory, there.

    Args:
        name: `cpu`, `cuda` or `cuda:N`; plain `cuda` leaves the current device.
    """
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
