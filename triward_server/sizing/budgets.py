"""Flags of the export that a load decides, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigError
from ..export.options import TritonConfig
from ..schema import MAX_BATCH_SIZE
from .demand import Demand, RequestWork
from .footprint import BATCH_BYTES, GIB, MIB, QUEUE_BYTES, DeviceMemory
from .models import Subject
from .speed import Speed

# A fifth of the time without progress after which `serve` takes a device for hung: 10 s and 120 s.
_PASS_SECONDS = {"gpu": 2.0, "cpu": 24.0}
# Of one core for a megapixel: decoding 4 ms, Pillow's resizing 9 ms. Measured on one core of a
# development machine; no results file has it.
_DECODE_SECONDS = 0.013
_DECODE_SHARE = 0.5  # of an instance's time: chosen
_BATCH_SHARE = 0.25  # of the callers' timeout, for one batch: chosen
_DEFAULT = "the default"


class Setting(NamedTuple):
    """A flag's value, and why it has that."""

    value: float
    why: str


@dataclass(frozen=True)
class Budgets:
    """Flags of the export."""

    max_batch_tokens: Setting
    max_batch_bytes: Setting
    max_batch_tflop: Setting
    forward_batch_size: Setting
    preprocess_batch_size: Setting
    preprocess_instances: Setting
    max_queue_size: Setting
    queue_timeout_ms: Setting


def budgets_for(
    subject: Subject,
    speed: Speed,
    demand: Demand,
    work: RequestWork,
    memory: DeviceMemory,
    working: int,
) -> Budgets:
    """Choose the flags.

    Args:
        subject: the model.
        speed: of a device.
        demand: what is asked.
        work: of a request.
        memory: of a device.
        working: replicas that share the peak.

    Raises:
        ConfigError: a request takes so long that it has no time to wait.
    """
    batch = _batch_size(demand, work)
    timeout = _queue_timeout(demand, work, int(batch.value))
    return Budgets(
        max_batch_tokens=_batch_tokens(subject, work, memory.batch),
        max_batch_bytes=_batch_bytes(subject, work, memory),
        max_batch_tflop=_batch_tflop(subject, speed),
        forward_batch_size=batch,
        preprocess_batch_size=batch,
        preprocess_instances=_preprocessors(demand, work, working),
        max_queue_size=_queue_size(demand, work, timeout.value / 1000),
        queue_timeout_ms=timeout,
    )


def _least(*settings: Setting) -> Setting:
    """Return the smallest; of equal ones the first."""
    return min(settings, key=lambda setting: setting.value)


def _batch_size(demand: Demand, work: RequestWork) -> Setting:
    found = _least(
        Setting(max(1, MAX_BATCH_SIZE // demand.devices), "the default: 64 / devices of a replica"),
        Setting(
            int(_BATCH_SHARE * demand.timeout / work.seconds),
            f"what takes a quarter of the timeout, {_BATCH_SHARE * demand.timeout:.3g} s",
        ),
        Setting(
            BATCH_BYTES // work.held, f"{BATCH_BYTES // MIB} MiB / {_mb(work.held)} of a request"
        ),
    )
    return found if found.value >= 1 else Setting(1, "one is the least")


def _queue_timeout(demand: Demand, work: RequestWork, batch: int) -> Setting:
    seconds = 0.95 * demand.timeout - batch * work.seconds
    if seconds <= 0:
        raise ConfigError(
            f"--timeout {demand.timeout:g} s: a request takes {work.seconds:.3g} s of it, which "
            "leaves no time to wait"
        )
    return Setting(
        int(1000 * seconds), f"95 % of the timeout, less a batch's {batch * work.seconds:.3g} s"
    )


def _queue_size(demand: Demand, work: RequestWork, seconds: float) -> Setting:
    capacity = demand.devices / work.seconds
    found = _least(
        Setting(TritonConfig.max_queue_size, _DEFAULT),
        Setting(int(capacity * seconds), f"{capacity:.3g} requests/s x the queue timeout"),
        Setting(
            QUEUE_BYTES // (2 * work.held),
            f"{QUEUE_BYTES // GIB} GiB / {_mb(work.held)} of a request, for two queues",
        ),
    )
    return found if found.value >= 1 else Setting(1, "one is the least")


def _batch_tokens(subject: Subject, work: RequestWork, size: int) -> Setting:
    found = _least(
        Setting(subject.forward.max_batch_tokens, _default(subject)),
        Setting(size // subject.cost.token_bytes, "what --max-batch-bytes holds"),
    )
    if work.largest > size:  # passes are smaller than was looked at
        return found
    return Setting(found.value, f"{found.why}; the largest pass here has {work.tokens:,}")


def _batch_bytes(subject: Subject, work: RequestWork, memory: DeviceMemory) -> Setting:
    if memory.batch == subject.forward.max_batch_bytes:
        return Setting(memory.batch, _default(subject))
    if memory.total is None:
        return Setting(memory.batch, "what the largest pass takes")
    if memory.batch == math.ceil(work.single):
        return Setting(memory.batch, "what one conversation takes, which is never cut")
    return Setting(memory.batch, "what weights and caches leave of the GPU")


def _batch_tflop(subject: Subject, speed: Speed) -> Setting:
    seconds = _PASS_SECONDS[speed.kind]
    return _least(
        Setting(subject.forward.max_batch_tflop, _default(subject)),
        Setting(
            float(f"{speed.flops * seconds / 1e12:.2g}"),
            f"{seconds:g} s a pass, a fifth of serve's --hang-timeout",
        ),
    )


def _preprocessors(demand: Demand, work: RequestWork, working: int) -> Setting:
    pixels = demand.shape.images * work.image
    busy = demand.rate / working * pixels / 1e6 * _DECODE_SECONDS
    most = Setting(
        math.ceil(busy / _DECODE_SHARE),
        f"{busy:.2g} cores at {1000 * _DECODE_SECONDS:g} ms a megapixel, each half of its time",
    )
    default = Setting(TritonConfig.preprocess_instances * demand.devices, "the default: 4 a device")
    return max(default, most, key=lambda setting: setting.value)


def _default(subject: Subject) -> str:
    return "the repository's" if subject.exported else _DEFAULT


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g} MB"
