"""The forward model's process keeps freed memory for the next tensor, and gives it back in time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGES = 2048  # of 4 KiB, in one buffer
TURNS = 20
# `serve` sets this for all processes of Triton.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
USE = f"""
import resource, time
from triward_server import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

heap = memory.Heap({{keep}})
before = faults()
for _ in range({TURNS}):
    buffer = bytearray(b"x") * ({PAGES} * 4096)
    del buffer
used = faults() - before
resident = lambda: int(open("/proc/self/statm").read().split()[1])
kept = resident()
heap._last -= memory._INTERVAL
heap.tidy()
print(used, kept - resident())
"""


def use(keep: int) -> tuple[int, int]:
    """Page faults of buffers made and freed in turns, and pages that tidying gives back then."""
    command = [sys.executable, "-c", USE.format(keep=keep)]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=True
    )
    used, given_back = map(int, done.stdout.split())
    return used, given_back


def test_freed_memory_serves_the_next_tensor() -> None:
    used, given_back = use(2**30)
    assert used < 2 * PAGES, "the first buffer's pages are all that are ever taken"
    assert given_back > 0.9 * PAGES, "they stay until the heap is tidied"


@pytest.mark.parametrize("keep", [0, 4 * 2**20])
def test_no_more_than_asked_for_is_kept(keep: int) -> None:
    """Mapped one by one, or more than the heap's end may hold: each buffer takes new pages."""
    used, given_back = use(keep)
    assert used > 0.9 * TURNS * PAGES and given_back < PAGES
