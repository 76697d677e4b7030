"""On a Ray cluster: a reward server as an actor, in a bundle of the trainer's placement group.

    group = placement_group([{"CPU": 6, "GPU": 1}, {"CPU": 8, "GPU": 7}])
    server = start_server("/shared/skywork", group)
    client = RewardClient(ray.get(server.address.remote()))

The server's node needs the command `triward-server` (`pip install 'triward-server[embedded]'`), and
the repository under the same path.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from triward.errors import ServerUnavailable

_COMMAND, _PACKAGE = "triward-server", "triward-server[embedded]"
_READY = re.compile(r"ready +grpc +(\S+:(\d+))\s")
_ANY = "0"
_TRITON_EXIT = 60.0  # seconds; the server itself gives its Triton 40
_CALLS = 16  # of each group at once: `watch` and `address` wait in theirs
_STOPPING = "stopping"  # a group of its own, so that however many wait, none keeps `stop` waiting
# A process that gets SIGTERM when the thread that started it ends. It asks for that itself, by
# PR_SET_PDEATHSIG of prctl(2): a `preexec_fn` would run gRPC's own handlers of a fork, which can
# abort in a child.
_ENDS_WITH_US = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.getppid() == int(sys.argv[1]) or sys.exit("the actor has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerActor:
    """The actor: runs `triward-server serve` as a process below its own.

    The server watches itself and ends when it cannot score. If it has scored, it is then started
    again at the same address, as often as `restarts` says; after that `address` and `watch` raise.

    Args:
        repository: what `triward-server export` wrote, on the actor's node.
        flags: further ones of `triward-server serve`.
        restarts: how often the server may end and is started again.
    """

    def __init__(  # noqa: D107 - the class says it
        self, repository: str, flags: Sequence[str] = (), restarts: int = 3
    ) -> None:
        self._repository, self._flags, self._restarts = repository, tuple(flags), restarts
        self._changed = threading.Condition()
        self._address = ""  # while it scores
        self._port = _ANY  # then that which it got
        self._ended: str | None = None  # why it is not started again
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False
        # The server ends with this thread, so with this process, whatever ends that.
        threading.Thread(target=self._supervise, daemon=True).start()

    def address(self) -> str:
        """Wait until the server scores; return its host:port.

        Raises:
            ServerUnavailable: it has ended for good; the message has its last line.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._address or self._ended is not None)
            self._check()
            return self._address

    def watch(self) -> None:
        """Wait until the server has ended for good; return if it was stopped.

        Raises:
            ServerUnavailable: it ended by itself once more than it may.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended is not None)
            if not self._stopping:
                self._check()

    @ray.method(concurrency_group=_STOPPING)  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        """End the server; requests in flight finish, as long as `--drain-timeout` allows."""
        with self._changed:
            self._stopping = True
            if self._process:
                self._process.terminate()
            self._changed.wait_for(lambda: self._ended is not None)

    def _check(self) -> None:
        if self._ended is not None:
            raise ServerUnavailable(self._ended)

    def _supervise(self) -> None:
        why = "the reward server was not started"
        try:
            for _ in range(self._restarts + 1):
                why = self._run()
                if self._stopping or self._port == _ANY:  # one that never scored would not now
                    break
                _wait_until_free(int(self._port))
        except OSError as error:
            why = str(error)
        finally:
            with self._changed:
                self._ended = why
                self._changed.notify_all()

    def _run(self) -> str:
        """Run a server to its end; return how it ended."""
        with self._changed:
            if self._stopping:
                return "the reward server was stopped"
            self._process = subprocess.Popen(
                self._words(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace",
            )  # fmt: skip
        assert self._process.stdout
        last = ""
        for line in self._process.stdout:
            # Ray shows an actor's output on the driver.
            print(line, end="", file=sys.stderr)
            last = line.strip() or last
            if found := _READY.match(line):
                self._say(found[1])
                self._port = found[2]
        code = self._process.wait()
        self._say("")
        return f"the reward server on {get_node_ip_address()} ended with {code}: {last}"

    def _say(self, address: str) -> None:
        with self._changed:
            self._address = address
            self._changed.notify_all()

    def _words(self) -> list[str]:
        # An environment that is not activated is not on PATH, but its interpreter runs.
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        command = shutil.which(_COMMAND, path=places)
        if command is None:
            node = get_node_ip_address()
            raise FileNotFoundError(
                f"{node}: no {_COMMAND}; pip install 'triward-server[embedded]'"
            )
        return [
            sys.executable, "-I", "-c", _ENDS_WITH_US, str(os.getpid()), command,
            "serve", "--repository", self._repository, "--host", get_node_ip_address(),
            "--grpc-port", self._port, "--http-port", "0", "--metrics-port", "0", *self._flags,
        ]  # fmt: skip


def start_server(
    repository: str | os.PathLike[str],
    group: PlacementGroup,
    bundle: int = 0,
    *,
    flags: Sequence[str] = (),
    restarts: int = 3,
) -> Any:
    """Start a `ServerActor` with all that a bundle has; return the actor's handle.

    The server ends with the actor: with its last handle, `ray.kill`, or the job. To let requests in
    flight finish, `ray.get(server.stop.remote())` before.

    Args:
        repository: what `triward-server export` wrote, on the bundle's node.
        group: of the trainer, say; `group.ready()` need not have been waited for.
        bundle: which one of it; its GPUs are those that the server sees.
        flags: further ones of `triward-server serve`.
        restarts: how often the server may end and is started again.
    """
    resources = dict(group.bundle_specs[bundle])
    actor = ray.remote(concurrency_groups={_STOPPING: 1})(ServerActor).options(
        num_cpus=resources.pop("CPU", 0),
        num_gpus=resources.pop("GPU", 0),
        memory=resources.pop("memory", 0),
        resources=resources,
        max_concurrency=_CALLS,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        ),
    )
    return actor.remote(os.fspath(repository), flags, restarts)


def _wait_until_free(port: int) -> None:
    """Wait until nothing listens: a server that was killed leaves a Triton that ends by itself."""
    end = time.monotonic() + _TRITON_EXIT
    while time.monotonic() < end:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((get_node_ip_address(), port))
            except OSError:
                time.sleep(0.1)
            else:
                return
