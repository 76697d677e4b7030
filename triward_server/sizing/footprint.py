"""Memory of one replica: the GPU's, tritonserver's, its models' processes' and /dev/shm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import ForwardConfig
from ..errors import ConfigError
from .demand import RequestWork
from .models import Subject

MIB, GIB = 1024**2, 1024**3

GPU_RESERVE = 2 * 10**9  # context, kernels, what the allocator cannot use: assumed
_PREFIX_SHARE = 0.4  # `prefix_cache.py`: of the device, at most
_CPU_PREFIX = 256 * MIB  # likewise
# An idle tritonserver takes up to 1.5 GiB, mostly threads' stacks (`memory.py`); `serve` allows it
# 4 GiB at least.
TRITON_IDLE, TRITON_LEAST = 1.5 * GIB, 4 * GIB
# Resident after an hour of mixed load: benchmarks/results/2026-11-22-soak-5.json.
PREPROCESS_PROCESS, FORWARD_PROCESS = 830 * MIB, 892 * MIB
CUDA_PROCESS = 4 * GIB  # of a forward process, on the host: assumed
# What a decoding process may take beside the files of a request (docs/operations.md).
DECODER, PIXEL_BYTES = 256 * MIB, 24
TMP = 1 * GIB  # /tmp of the manifests
QUEUE_BYTES = 4 * GIB  # for requests that wait before each of the two models: chosen
BATCH_BYTES = 512 * MIB  # of one batch's media, in /dev/shm: chosen
# Of /dev/shm, as docker/compose.yaml has it: half as much again, for larger images.
_SHM_MARGIN = 1.5


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device of a replica, in bytes.

    Attributes:
        weights: of the model.
        batch: `--max-batch-bytes`.
        embeddings: `--embedding-cache-bytes`.
        prefixes: what the prefix cache takes then, by its own rule.
        reserve: for nobody.
        total: that there are; None: on a CPU it is the machine's.
    """

    weights: int
    batch: int
    embeddings: int
    prefixes: int
    reserve: int
    total: int | None

    @property
    def used(self) -> int:
        """All together."""
        return self.weights + self.batch + self.embeddings + self.prefixes + self.reserve


def device_memory(
    subject: Subject, total: int | None, single: float, largest: float, images: bool
) -> DeviceMemory:
    """Divide a device's memory.

    Args:
        subject: the model.
        total: the GPU's bytes; None: a CPU, which has what it takes.
        single: bytes of a pass over one conversation, which is never cut.
        largest: bytes of the largest pass of a batch, with the default budgets.
        images: whether requests have any.

    Raises:
        ConfigError: weights, or one conversation beside them, do not fit.
    """
    forward = subject.forward
    embeddings = forward.embedding_cache_bytes if images else 0
    if total is None:
        batch = min(forward.max_batch_bytes, _up(max(single, largest), 256 * MIB))
        prefixes = _CPU_PREFIX if forward.prefix_cache_bytes < 0 else forward.prefix_cache_bytes
        return DeviceMemory(subject.weights, batch, embeddings, prefixes, 0, None)
    left = total - GPU_RESERVE - subject.weights - forward.embedding_cache_bytes
    if left <= 0:
        raise ConfigError(
            f"--gpus: weights of {_gb(subject.weights)}, the embedding cache and a reserve of "
            f"{_gb(GPU_RESERVE)} exceed the GPU's {_gb(total)}; a larger GPU, or --dtype float8"
        )
    if single > left:
        raise ConfigError(
            f"--prompt-tokens, --images: a pass over one conversation takes {_gb(single)}, the "
            f"GPU's {_gb(total)} leave {_gb(left)} beside weights of {_gb(subject.weights)}; "
            "shorter conversations, smaller images, or a larger GPU (--gpus)"
        )
    batch = forward.max_batch_bytes
    if batch > left:  # three quarters; the rest is for the prefix cache
        batch = max(_down(0.75 * left, 256 * MIB), math.ceil(single))
    batch = max(batch, math.ceil(single))
    prefixes = _prefixes(forward, total, left - batch)
    return DeviceMemory(
        subject.weights, batch, forward.embedding_cache_bytes, prefixes, GPU_RESERVE, total
    )


def _prefixes(forward: ForwardConfig, total: int, left: int) -> int:
    if forward.prefix_cache_bytes < 0:
        return max(0, min(left, int(_PREFIX_SHARE * total)))
    if forward.prefix_cache_bytes > left:
        raise ConfigError(
            f"--prefix-cache-bytes {forward.prefix_cache_bytes:,}: {left:,} are left on the GPU"
        )
    return forward.prefix_cache_bytes


@dataclass(frozen=True)
class Flags:
    """What the host's memory depends on of the export.

    Attributes:
        waiting: requests that wait before each of the two models, at most.
        preprocessors: processes.
        batch: requests that travel together.
    """

    waiting: int
    preprocessors: int
    batch: int


@dataclass(frozen=True)
class HostMemory:
    """Memory of one replica's machine or container, in bytes.

    Attributes:
        tritonserver: with the requests that wait.
        preprocessing: its processes and their decoders.
        forward: its processes.
        shm: /dev/shm, which counts as memory.
    """

    tritonserver: int
    preprocessing: int
    forward: int
    shm: int

    @property
    def max_memory(self) -> int:
        """GiB for `serve --max-memory`: what tritonserver itself may take."""
        return math.ceil(max(self.tritonserver, TRITON_LEAST) / GIB)

    @property
    def limit(self) -> int:
        """GiB of the container: all together, and twice `max_memory` at least, as by default."""
        processes = self.preprocessing + self.forward + self.shm + TMP
        return max(math.ceil(self.max_memory + processes / GIB), 2 * self.max_memory)


def host_memory(device: DeviceMemory, devices: int, work: RequestWork, flags: Flags) -> HostMemory:
    """Add up what a replica's processes take.

    Args:
        device: what each device holds; on a CPU that is the machine's memory.
        devices: forward processes.
        work: of a request.
        flags: of the export.
    """
    decoder = DECODER + PIXEL_BYTES * work.image + work.held
    on_cpu = device.total is None
    forward = FORWARD_PROCESS + device.used if on_cpu else CUDA_PROCESS
    return HostMemory(
        tritonserver=math.ceil(TRITON_IDLE + 2 * flags.waiting * work.held),
        preprocessing=math.ceil(flags.preprocessors * (PREPROCESS_PROCESS + decoder)),
        forward=math.ceil(devices * forward),
        shm=shm_bytes(flags.preprocessors, devices, flags.batch, work.held),
    )


def shm_bytes(preprocessors: int, devices: int, batch: int, request: int) -> int:
    """(Preprocessing instances + forward instances + 1) x the largest batch, and half as much."""
    regions = preprocessors + devices + 1
    return _up(max(_SHM_MARGIN * regions * batch * request, regions * MIB), 256 * MIB)


def _up(size: float, unit: int) -> int:
    return math.ceil(size / unit) * unit


def _down(size: float, unit: int) -> int:
    return int(size // unit) * unit


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
