"""Resources of a running server: memory, /dev/shm, file descriptors and threads, by process."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

_STUB = "triton_python_b"  # the kernel keeps 15 characters
_SHARED_MEMORY = Path("/dev/shm")
_REGION = re.compile(rf"{_SHARED_MEMORY}/(triward-\d+-\w+-)")


@dataclass(frozen=True)
class Held:
    """Resources of one process.

    Attributes:
        rss: resident bytes, shared pages counted in every process that maps them.
        anon: resident bytes that no file backs and no process shares: heaps and stacks.
        fds: open file descriptors.
        threads: of the process.
    """

    rss: int
    anon: int
    fds: int
    threads: int


@dataclass(frozen=True)
class Footprint:
    """Return the resources of a server and its models' processes.

    Attributes:
        processes: by name; models' processes by their model and a number.
        shm_bytes: of its regions in /dev/shm.
        shm_regions: how many there are.
    """

    processes: dict[str, Held] = field(default_factory=dict)
    shm_bytes: int = 0
    shm_regions: int = 0

    def flat(self) -> dict[str, float]:
        """Every quantity under a name of its own, sums under `total`."""
        values: dict[str, float] = {"shm.bytes": self.shm_bytes, "shm.regions": self.shm_regions}
        for name, held in self.processes.items():
            for kind, value in asdict(held).items():
                values[f"{name}.{kind}"] = value
                values[f"total.{kind}"] = values.get(f"total.{kind}", 0) + value
        return values


def take(pid: int) -> Footprint:
    """Look at a server that runs.

    Args:
        pid: of tritonserver; its models' processes are below it.
    """
    server = psutil.Process(pid)
    # Not psutil's `children`: it compares times of birth by the wall clock, and when that is set it
    # loses those that were born soon after their parent.
    stubs = [
        process
        for process in psutil.process_iter(["ppid", "name"])
        if process.info["ppid"] == pid and process.info["name"].startswith(_STUB)
    ]
    processes = {"tritonserver": _held(server)}
    for stub in sorted(stubs, key=lambda process: process.pid):
        # A stub's first argument is its model's file, <model>/<version>/model.py.
        model = Path(stub.cmdline()[1]).parts[-3]
        number = sum(name.startswith(model) for name in processes)
        processes[f"{model}-{number}"] = _held(stub)
    # Every region that bears the server's prefix, mapped by a process or forgotten by all.
    prefixes = set(_REGION.findall(Path(f"/proc/{pid}/maps").read_text()))
    regions = [path for prefix in prefixes for path in _SHARED_MEMORY.glob(f"{prefix}*")]
    return Footprint(processes, sum(path.stat().st_size for path in regions), len(regions))


def _held(process: psutil.Process) -> Held:
    status = Path(f"/proc/{process.pid}/status").read_text()
    anonymous = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    anon = 1024 * int(anonymous[1]) if anonymous else 0  # a process that has ended has no such line
    return Held(process.memory_info().rss, anon, process.num_fds(), process.num_threads())
