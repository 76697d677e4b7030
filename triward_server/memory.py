"""How much memory this machine, or this container, has."""

from __future__ import annotations

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
