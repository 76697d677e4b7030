"""A reward server below an actor: where it is, what becomes of it, that nothing of it stays."""

from __future__ import annotations

import re
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.asking import wait_until
from tests.commands import named
from tests.conftest import ROOT
from triward import RewardClient, ServerUnavailable
from triward_tools.ray_server import ServerActor

PROMPT = [{"role": "user", "content": "What is two and two?"}]
ANSWERS = ["Four.", "Five."]


@pytest.fixture
def running(echo_repository):
    """The actor as an object of this process, without Ray."""
    server = ServerActor(str(echo_repository), ["--drain-timeout=5"], restarts=1)
    yield server
    server.stop()


def family(server):
    """The processes of the server that runs now."""
    serve = psutil.Process(server._process.pid)
    return [serve, *serve.children(recursive=True)]


def kill_triton(server):
    [triton] = named(family(server), "tritonserver")
    triton.kill()


def gone(processes):
    return psutil.wait_procs(processes, timeout=60)[1] == []


def test_it_is_started_again_at_the_same_address(running, echo):
    expected = echo.score_responses(PROMPT, ANSWERS)
    address = running.address()
    first = family(running)
    with RewardClient(address) as client:
        assert client.score_responses(PROMPT, ANSWERS) == expected
        first[0].kill()  # its Triton notices, and has the port until it has ended
        wait_until(lambda: running._process.pid != first[0].pid, timeout=60)
        assert gone(first)
        assert running.address() == address
        assert client.score_responses(PROMPT, ANSWERS) == expected
        second = family(running)
        kill_triton(running)
        with pytest.raises(ServerUnavailable, match=r"ended with 1: .*tritonserver"):
            running.watch()
        with pytest.raises(ServerUnavailable, match="ended with 1: "):
            running.address()
        with pytest.raises(ServerUnavailable):
            client.score_responses(PROMPT, ANSWERS)
    assert gone(second)


def test_one_that_is_stopped_is_no_error(running):
    running.address()
    processes = family(running)
    running.stop()
    running.watch()
    assert gone(processes)


def test_output_that_is_no_text(tmp_path, monkeypatch, capsys):
    serve = tmp_path / "triward-server"
    serve.write_text("#!/bin/sh\nprintf 'broken \\377\\n'\nexit 3\n")
    serve.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(serve))
    server = ServerActor(str(tmp_path))
    with pytest.raises(ServerUnavailable, match="ended with 3: broken \N{REPLACEMENT CHARACTER}"):
        server.address()
    assert server._process.returncode == 3, "it was waited for"
    assert "broken" in capsys.readouterr().err


def test_one_that_never_scored_is_not_started_again(tmp_path, capsys):
    server = ServerActor(str(tmp_path), restarts=3)
    with pytest.raises(ServerUnavailable, match=r"ended with 1: .*is not a repository"):
        server.address()
    assert capsys.readouterr().err.count("is not a repository") == 1


def test_a_node_without_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerUnavailable, match=r"no triward-server; pip install"):
        ServerActor(str(tmp_path)).address()


# What docs/integrations/ray.md shows, and then what must become of a server that is killed, and of
# one whose actor is.
DRIVER = """
import os
import sys

import psutil
import ray as _ray

repository, temporary = sys.argv[1:]
_init = _ray.init
_ray.init = lambda: _init(
    num_cpus=3, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=temporary
)

{page}

from triward.errors import ServerUnavailable


def server_of(actor):
    pid = ray.get(actor.__ray_call__.remote(lambda self: self._process.pid))
    serve = psutil.Process(pid)
    print("family", pid, *[each.pid for each in serve.children(recursive=True)], flush=True)
    return serve


ray.get(ended)  # it was stopped: no error
ray.kill(server)  # has the bundle until then
second = start_server(repository, group, restarts=0)
client = RewardClient(ray.get(second.address.remote()))
ended = second.watch.remote()
print(client.score_responses(prompt, ["Four.", "Five."]))
server_of(second).kill()
try:
    ray.get(ended)
except ServerUnavailable as error:
    print("typed", error)
ray.kill(second)

third = start_server(repository, group)
ray.get(third.address.remote())
serve = server_of(third)
ray.kill(third)
assert psutil.wait_procs([serve], timeout=60)[1] == []

fourth = start_server(repository, placement_group([{"CPU": 1, "memory": 2**20}]))
ray.get(fourth.address.remote())
watching = [fourth.watch.remote() for _ in range(40)]
ray.get(fourth.stop.remote(), timeout=90)
assert ray.get(watching) == [None] * 40
print("done", flush=True)
"""


@pytest.fixture
def ray():
    """A folder for a small Ray; nothing of it is left."""
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))  # short, for the paths of sockets
    yield temporary
    shutil.rmtree(temporary)


def test_what_the_page_shows(ray, command, echo, echo_repository):
    page = (ROOT / "docs" / "integrations" / "ray.md").read_text()
    [code] = re.findall(r"```python\n([^`]*start_server\([^`]*)```", page)
    code = re.sub(r', "GPU": \d', "", code.replace('"/shared/skywork"', "repository"))
    code = re.sub(r'"CPU": \d', '"CPU": 1', code)
    running = command(
        sys.executable, "-c", DRIVER.replace("{page}", code), echo_repository, ray,
        RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
    )  # fmt: skip
    third = [running.wait_for(r"^family (.*)$")[1] for _ in range(2)][-1]
    processes = [*running.family(), *(psutil.Process(int(pid)) for pid in third.split())]
    running.wait_for("^done$")
    assert running.wait() == 0, running.output
    expected = echo.score_responses(PROMPT, ANSWERS)
    assert running.output.count(f"{expected}\n") == 2, running.output
    typed = running.output.partition("\ntyped ")[2]  # Ray adds where it was raised
    assert re.search(r"the reward server on \S+ ended with -9", typed), running.output
    assert gone(processes)
