"""Regions of shared memory, without a server; tests/served/test_shared_memory.py has one."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from triward import DeadlineExceeded, InvalidRequest, RewardClient, TriwardError

if sys.platform != "linux":
    pytest.skip("only Linux has /dev/shm", allow_module_level=True)

from triward import sharedmemory
from triward.sharedmemory import FOLDER, PREFIX, Region, sweep


@pytest.fixture
def region():
    region = Region(1000)
    yield region
    region.close()


def ours():
    return {path.name for path in FOLDER.glob(PREFIX + "*")}


def content(region, place):
    assert place.region == region.name
    with region.path.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def test_a_place_holds_a_tensor(region):
    with region.lend([b"one", b"", b"three"]) as place:
        assert content(region, place) == b"".join(
            struct.pack("<I", len(value)) + value for value in (b"one", b"", b"three")
        )


def test_the_name_is_not_in_the_folder(region):
    """Whoever knows it can have a server read and write the region, without a key."""
    assert region.path.stat().st_mode & 0o777 == 0o600
    assert len(region.name) == 32
    for path in FOLDER.iterdir():
        assert region.name not in path.name and path.name not in region.name
    assert Region(1).name != Region(1).name


def test_places_do_not_overlap_and_are_used_again(region):
    with region.lend([b"a" * 396]) as first, region.lend([b"b" * 396]) as second:
        assert (first.offset, second.offset) == (0, 400)
        with region.lend([b"c" * 396]) as third:
            assert third is None, "there is no room"
        with region.lend([b"c" * 196]) as third:
            assert third.offset == 800
        assert content(region, first)[4:] == b"a" * 396
    with region.lend([b"d" * 996]) as whole:
        assert (whole.offset, whole.size) == (0, 1000)


def test_a_gap_between_places_is_found(region):
    with region.lend([b"a" * 96]), region.lend([b"b" * 96]) as middle, region.lend([b"c" * 96]):
        pass
    with region.lend([b"a" * 96]):
        with region.lend([b"b" * 96]) as second, region.lend([b"c" * 96]):
            assert second.offset == middle.offset
        with region.lend([b"d" * 146]) as place:
            assert place.offset == 100


@pytest.mark.parametrize(("error", "rests"), [(InvalidRequest, False), (TriwardError, True)])
def test_a_place_rests_unless_the_server_has_answered(region, error, rests, monkeypatch):
    with pytest.raises(error), region.lend([b"x" * 996]):
        raise error("no")
    with region.lend([b"x" * 996]) as place:
        assert (place is None) == rests
    later = sharedmemory.monotonic() + 301
    monkeypatch.setattr(sharedmemory, "monotonic", lambda: later)
    with region.lend([b"x" * 996]) as place:
        assert place is not None


def test_a_region_is_gone_when_it_is_closed():
    before = ours()
    region = Region(1000)
    assert ours() - before == {region.path.name}
    sweep()
    assert ours() - before == {region.path.name}, "its owner lives"
    region.close()
    region.close()
    assert ours() == before


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_what_a_process_leaves_is_removed(end):
    """At its end, or, if it was killed, by the next one that makes a region."""
    code = f"import os, signal\nfrom triward.sharedmemory import Region\nr = Region(1000)\n{end}"
    before = ours()
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == (-signal.SIGKILL if end else 0)
    assert len(ours() - before) == (1 if end else 0)
    Region(1000).close()
    assert ours() == before


def test_a_fork_leaves_its_parents_region_alone(region):
    child = os.fork()
    if not child:
        region.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert region.path.name in ours()


def test_wrong_settings():
    with pytest.raises(ValueError, match="at least 0"):
        RewardClient(shared_memory_bytes=-1)
    with pytest.raises(ValueError, match="only one server"):
        RewardClient(["a:1", "b:1"], shared_memory_bytes=1)


def test_more_than_the_machine_has(transport):
    client = RewardClient(_transport=transport, shared_memory_bytes=2**50)
    message = [{"role": "user", "content": [{"type": "image", "image": b"x"}]}]
    before = ours()
    with pytest.raises(TriwardError, match=r"shared memory of \d+ bytes: "):
        client.score_responses(message, ["r"])
    assert ours() == before
    assert client.score_responses([{"role": "user", "content": "q"}], ["text"]) == [4.0]


def test_a_call_ends_on_time_when_the_server_does_not_answer():
    """Not after the client's own timeout, which registering the region might wait for."""
    message = [{"role": "user", "content": [{"type": "image", "image": b"x"}]}]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with RewardClient(url, timeout=60, shared_memory_bytes=1000) as client:
            began = time.monotonic()
            with ThreadPoolExecutor(3) as pool:
                calls = [
                    pool.submit(client.score_responses, message, ["r"], timeout=0.5)
                    for _ in range(3)
                ]
            assert {type(call.exception()) for call in calls} == {DeadlineExceeded}
            assert time.monotonic() - began < 10
