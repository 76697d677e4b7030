"""What memory there is on this machine or in this container, and who may take how much."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

# What a container's limit is called in version 2 and 1 of Linux' control groups, seen from inside.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def half_of_the_machine() -> int:
    """Bytes that tritonserver may take: the other half is for its models' processes."""
    total = int(psutil.virtual_memory().total)
    limits = [path.read_text().strip() for path in _LIMITS if path.is_file()]
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())]) // 2


def lift_limit() -> None:
    """Undo tritonserver's limit in a model's process, which it started and which holds weights."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
