"""`Arena`: the small arrays of one forward pass travel to its device in one copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK_BYTES = 1 << 20  # what one pass of thousands of tokens needs
_ALIGNMENT = 16


class Arena:
    """Arrays that are laid side by side in pinned memory, and the device's copy of that.

    Args:
        device: where the arrays are needed.
        gathers: whether they are copied; by default not on a CPU, which has them already.
    """

    def __init__(self, device: torch.device, gathers: bool | None = None) -> None:
        self.device = device
        self._gathers = device.type != "cpu" if gathers is None else gathers
        self._chunks: list[_Chunk] = []

    def add(self, array: NDArray[Any]) -> Tensor:
        """Return the array's tensor on the device, which holds its values from `send` on."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        if not self._gathers:
            return host
        if not self._chunks or not self._chunks[-1].fits(host.nbytes):
            self._chunks.append(_Chunk(max(_CHUNK_BYTES, host.nbytes), self.device))
        return self._chunks[-1].add(host)

    def send(self) -> None:
        """Copy what was added to the device, without waiting for it."""
        for chunk in self._chunks:
            chunk.send()
        self._chunks = []


class _Chunk:
    def __init__(self, size: int, device: torch.device) -> None:
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.empty(size, dtype=torch.uint8, device=device)
        self._used = 0

    def fits(self, size: int) -> bool:
        return self._used + size <= len(self._host)

    def add(self, array: Tensor) -> Tensor:
        place = slice(self._used, self._used + array.nbytes)
        self._used = -(-place.stop // _ALIGNMENT) * _ALIGNMENT
        here, there = (part[place].view(array.dtype) for part in (self._host, self._device))
        here.copy_(array.flatten())
        return there.view(array.shape)

    def send(self) -> None:
        used = min(self._used, len(self._host))
        self._device[:used].copy_(self._host[:used], non_blocking=True)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy one large tensor to the device without waiting for it, from pinned memory."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
