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


_LEAST = 4 * 2**30  # an idle one takes up to 1.5 GiB on two cores, mostly threads' stacks


def half_of_the_machine() -> int:
    """Bytes that tritonserver may take: the other half is for its models' processes.

    Never below 4 GiB: what a small machine lacks its own limit says sooner.
    """
    total = int(psutil.virtual_memory().total)
    limits = [path.read_text().strip() for path in _LIMITS if path.is_file()]
    machine = min([total, *(int(limit) for limit in limits if limit.isdecimal())])
    return max(machine // 2, _LEAST)


def lift_limit() -> None:
    """Undo tritonserver's limit in a model's process, which it started and which holds weights."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
