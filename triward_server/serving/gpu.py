"""GPUs that this process can use, from the driver itself: torch's import takes seconds."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import LaunchError

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch counts it, CUDA_VISIBLE_DEVICES applied: `cuda:<index>`."""

    index: int
    name: str
    memory: int  # bytes

    def __str__(self) -> str:
        """Return the text for messages."""
        return f"cuda:{self.index} {self.name} ({self.memory / 2**30:.0f} GiB)"


def gpus() -> list[Gpu]:
    """All that are there; none where no driver is installed.

    Raises:
        LaunchError: there is a driver, and it does not work.
    """
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return []
    code = cuda.cuInit(0)
    if code == _NO_DEVICE:
        return []
    if code:
        raise LaunchError(f"the GPU driver does not start: {_reason(cuda, code)}")
    count = ctypes.c_int()
    _check(cuda, cuda.cuDeviceGetCount(ctypes.byref(count)))
    return [_gpu(cuda, index) for index in range(count.value)]


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _check(cuda, cuda.cuDeviceGet(ctypes.byref(device), index))
    _check(cuda, cuda.cuDeviceGetName(name, len(name), device))
    _check(cuda, cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device))
    return Gpu(index, name.value.decode(errors="replace"), memory.value)


def _check(cuda: ctypes.CDLL, code: int) -> None:
    if code:
        raise LaunchError(f"the GPU driver does not answer: {_reason(cuda, code)}")


def _reason(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return f"{text.value.decode() if text.value else 'unknown error'} (CUDA error {code})"


def check_gpus(needed: Mapping[str, tuple[int, ...]]) -> list[Gpu]:
    """Return the GPUs that models will use.

    Args:
        needed: a model's name -> the numbers of its GPUs; none means all there are.

    Raises:
        LaunchError: one is not there.
    """
    if not needed:
        return []
    there = {each.index: each for each in gpus()}
    used: set[int] = set()
    for model, numbers in needed.items():
        if not there:
            raise LaunchError(
                f"{model} needs a GPU, and this machine has no GPU; export with --device cpu, "
                "or give the container one (docker run --gpus 1)"
            )
        missing = sorted(set(numbers) - set(there))
        if missing:
            shown = ", ".join(map(str, there.values()))
            raise LaunchError(f"{model} needs cuda:{missing[0]}, and this machine has {shown}")
        used.update(numbers or there)
    return [there[index] for index in sorted(used)]
