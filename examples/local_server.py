"""A server for the examples: a real Triton with a tiny random checkpoint, or $TRIWARD_URL.

    with local_server() as server, RewardClient(server.url) as client: ...

A notebook, whose cells cannot stand inside one `with`, calls `start()` and at its end `stop()`.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# No model hub is needed, and no bar belongs into what is kept of an example's output.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# A proxy would not reach this machine itself.
os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1"]))

from triward_server.serving.launch import Endpoints, TritonServer

warnings.filterwarnings("ignore", message="IProgress not found")  # of a bar in a notebook

ROOT = Path(__file__).resolve().parent.parent
URL, CHECKPOINT = "TRIWARD_URL", "TRIWARD_CHECKPOINT"


@dataclass(frozen=True)
class Server:
    """A server that can be asked.

    Attributes:
        url: of its gRPC endpoint, host:port.
        http_url: of its HTTP endpoint; None where that is not known.
        checkpoint: the folder that it serves; None where that is not known.
        about: one sentence for a reader.
    """

    url: str
    http_url: str | None
    checkpoint: Path | None
    about: str
    _cleanup: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def stop(self) -> None:
        """End what was started; a server of $TRIWARD_URL runs on."""
        self._cleanup.close()


def start() -> Server:
    """Return the server that $TRIWARD_URL names, or start a tiny one, as `start_tiny` does."""
    url, folder = os.environ.get(URL), os.environ.get(CHECKPOINT)
    if url is None:
        return start_tiny()
    return Server(url, None, Path(folder) if folder else None, f"The server that {URL} names.")


def start_tiny(say: Callable[[str], None] = lambda step: None) -> Server:
    """Make a tiny checkpoint with random weights, and start a Triton that serves it.

    Args:
        say: is told each of the three steps.

    Raises:
        RuntimeError: the checkpoint could not be made or exported; the message has the reason.
        LaunchError: Triton did not start.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="triward-demo-"))
        checkpoint, repository = Path(folder, "checkpoint"), Path(folder, "repository")
        say("making a tiny checkpoint with random weights")
        run_script("make_checkpoint.py", "--size=tiny", "--seed=0", f"--output={checkpoint}")
        say("exporting it to a Triton model repository")
        run_script(
            "build_repository.py", f"--checkpoint={checkpoint}", f"--output={repository}",
            "--dtype=float32", "--device=cpu", "--preprocess-instances=1",
        )  # fmt: skip
        say("starting Triton Inference Server")
        free = Endpoints("127.0.0.1", grpc_port=0, http_port=0, metrics_port=0)
        log = stack.enter_context(Path(folder, "triton.log").open("w"))
        running = stack.enter_context(TritonServer(repository, free, log=log))
        about = "A tiny model with random weights, on this machine: its scores mean nothing."
        at = running.endpoints
        http = f"http://{at.http_client_host}:{at.http_port}"
        server = Server(at.grpc, http, checkpoint, about, stack.pop_all())
    atexit.register(server.stop)  # a notebook may be closed before its last cell
    return server


@contextmanager
def local_server(say: Callable[[str], None] = lambda step: None) -> Iterator[Server]:
    """Run `start_tiny` and, at the end of the block, `stop`."""
    server = start_tiny(say)
    try:
        yield server
    finally:
        server.stop()


def run_script(name: str, *arguments: str) -> None:
    """Run a script of `export/`, silently unless it fails."""
    command = [sys.executable, str(ROOT / "export" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr.strip()}")
