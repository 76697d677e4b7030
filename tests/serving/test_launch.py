"""The launcher says what is wrong in one sentence, stops when told, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.asking import ASK
from tests.commands import BIN, Command, assert_gone, named, regions
from tests.conftest import LOCAL, ROOT, brief
from triward import RewardClient, ServerUnavailable
from triward_server import __version__
from triward_server.cli import app
from triward_server.errors import LaunchError
from triward_server.schema import CONTRACT_VERSION
from triward_server.serving import gpu, installation, launch
from triward_server.serving.ending import why_it_ended
from triward_server.serving.installation import find_triton
from triward_server.serving.launch import Endpoints, TritonServer
from triward_server.serving.progress import Progress
from triward_server.serving.triton_http import HttpError, Loaded, TritonHttp


def free(port: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", int(port))) != 0


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM], [signal.SIGINT] * 3, [signal.SIGHUP, signal.SIGTERM]]
)
def test_serve_until_told_to_stop(numbers: list[int], serve: Callable[..., Command]) -> None:
    # A proxy for everything else must not come between the launcher and its own server.
    running = serve("--", "--log-verbose=0", http_proxy="http://127.0.0.1:9")
    grpc = running.wait_for(r"ready\s+grpc\s+(127.0.0.1:\d+)")[1]
    http = running.wait_for(r"http\s+http://127.0.0.1:(\d+)")[1]
    metrics = running.wait_for(r"metrics\s+http://127.0.0.1:(\d+)/metrics")[1]
    with RewardClient(grpc) as client:
        assert np.isfinite(client.score(ASK))
    family = running.family()
    assert len(named(family, "triton_python_b")) == 4
    assert len(regions(running.process.pid)) == 4, "they are where this test looks for them"
    for number in numbers:  # a terminal's Ctrl-C reaches the whole group
        os.killpg(running.process.pid, number)
    assert running.wait() == 0
    assert_gone(family)
    assert all(map(free, [grpc.split(":")[1], http, metrics]))
    with RewardClient(grpc, timeout=5, max_attempts=1) as client, pytest.raises(ServerUnavailable):
        client.score(ASK)


def test_told_to_stop_while_starting(serve: Callable[..., Command]) -> None:
    running = serve()
    running.wait_for("loading: reward_")
    family = running.family()
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    assert "ready  grpc" not in running.output
    assert running.output.splitlines().count("triward-server: told to stop by SIGTERM") == 1
    assert_gone(family)


def catches(process: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    [mask] = re.findall(r"^SigCgt:\s+(\w+)$", status, re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop_in_its_first_moment(
    number: signal.Signals, serve: Callable[..., Command]
) -> None:
    running = serve()
    while not catches(running.family()[0], number):
        pass
    running.process.send_signal(number)
    assert running.wait() == 0
    # Behind what a start says, if this process got no time between the two lines above.
    assert running.output.splitlines()[-1] == f"triward-server: told to stop by {number.name}"


def test_signals_are_taken_before_anything_slow_is_imported() -> None:
    """In the first tenth of a second, most of which is Python's own start."""
    program = (
        "import sys; from triward_server.serving import signals; "
        "print(*{'typer', 'psutil', 'rich'} & {*sys.modules})"
    )
    output = subprocess.check_output([sys.executable, "-c", program, "serve"], text=True)
    assert output == "\n"
    lines = (ROOT / "triward_server" / "cli.py").read_text().splitlines()
    first = [line for line in lines if re.match("(from|import) ", line)][1]  # after __future__
    assert first.startswith("from .serving.signals import")


def test_a_signal_for_tritonserver_itself_is_explained(serve: Callable[..., Command]) -> None:
    running = serve()
    running.wait_for(r"ready\s+grpc")
    family = running.family()
    named(family, "tritonserver")[0].send_signal(signal.SIGTERM)
    assert running.wait() == 1
    told = f"send it to triward-server (process {running.process.pid}), which drains"
    assert told in running.output
    last = "triward-server: tritonserver was told to stop, but not by triward-server"
    assert running.output.splitlines()[-1] == last
    assert_gone(family)


def test_death_of_the_launcher_stops_the_server(serve: Callable[..., Command]) -> None:
    running = serve()
    running.wait_for(r"ready\s+grpc")
    family = running.family()
    running.process.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    for region in regions(running.process.pid):  # nobody is left who could have
        region.unlink(missing_ok=True)


def test_death_of_the_server_is_reported(serve: Callable[..., Command]) -> None:
    running = serve()
    running.wait_for(r"ready\s+grpc")
    family = running.family()
    named(family, "tritonserver")[0].kill()
    assert running.wait() == 1
    assert "triward-server: tritonserver stopped by itself (signal SIGKILL)" in running.output
    assert_gone(family)


@pytest.mark.parametrize("name", ["grpc", "http", "metrics"])
def test_port_in_use(name: str, repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        endpoints = Endpoints("127.0.0.1", **{"grpc_port": 0, "http_port": 0, "metrics_port": 0,
                                              f"{name}_port": port})  # fmt: skip
        with (
            pytest.raises(LaunchError, match=rf"^{name} port {port} on 127.0.0.1: .*in use"),
            TritonServer(repository, endpoints),
        ):
            pass


def test_port_in_use_is_one_sentence_and_a_code(serve: Callable[..., Command]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = serve(f"--grpc-port={port}")
        assert failed.wait() == 1
    assert failed.output.splitlines() == [
        f"triward-server: grpc port {port} on 127.0.0.1: Address already in use"
    ]


def test_a_model_that_fails_to_load(
    serve: Callable[..., Command], repository: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(repository, tmp_path / "broken"))
    (broken / "reward_forward/1/checkpoint/value_head.safetensors").unlink()
    failed = serve(repository=broken)
    assert failed.wait() == 1
    assert failed.output.splitlines() == [
        "triward-server: reward: version 1, which is served, is broken: "
        "reward_forward/1/checkpoint/value_head.safetensors: missing"
    ]
    failed = serve("--verify=off", repository=broken)
    assert failed.wait() == 1
    last = failed.output.splitlines()[-1]
    # Triton names the model, unless it crashes while it gives the others up.
    assert re.match("triward-server: (reward_forward: )?CheckpointError: .*/reward_forward/", last)
    assert "a reward model has value_head.safetensors or" in last
    assert regions(failed.process.pid) == []


NOISE = 'E1122 22:49:50.751575 26067 server.cc:241] "CudaDriverHelper has not been initialized."'
STUB = 'I1122 22:51:28 9 pb_stub.cc:366] "Failed to initialize Python stub: CheckpointError: bad"'
LOADING = (
    "E1122 22:51:33.1 26067 model_lifecycle.cc:642] "
    "\"failed to load 'reward_forward' version 1: Internal: CheckpointError: bad\""
)


NO_GPU = (
    "E1126 10:59:57.864446 10193 model_lifecycle.cc:642] "
    "\"failed to load 'reward_forward' version 1: "
    "Invalid argument: instance group reward_forward_0 of model reward_forward has kind KIND_GPU "
    'but no GPUs are available"'
)
LAST = "error: creating server: Internal - failed to load all models"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ([NOISE], None),
        (
            [NOISE, NO_GPU, LAST],
            "reward_forward: instance group reward_forward_0 of model reward_forward has kind "
            "KIND_GPU but no GPUs are available",
        ),
        ([NOISE, STUB], "CheckpointError: bad"),
        ([NOISE, STUB, LOADING], "reward_forward: CheckpointError: bad"),
        ([NOISE, NOISE.replace("CudaDriverHelper has not been", "It was")], "It was initialized."),
    ],
)
def test_what_a_log_tells_of_a_start_that_ends_early(log: list[str], reason: str | None) -> None:
    """As when Triton crashes while it gives up its other models."""
    assert why_it_ended(1, log) == (reason or "tritonserver: exit code 1")
    crash = "tritonserver: signal SIGABRT"  # is told beside what led to it
    assert why_it_ended(-signal.SIGABRT, log) == (f"{reason}; {crash}" if reason else crash)


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has a GPU")
def test_a_repository_for_a_gpu_where_there_is_none(
    serve: Callable[..., Command], repository: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(repository, tmp_path / "gpu"))
    config = broken / "reward_forward" / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_CPU", "KIND_GPU"))
    failed = serve(repository=broken)
    assert failed.wait() == 1
    assert failed.output.splitlines() == [  # not a word of tritonserver's: it was not started
        "triward-server: reward_forward needs a GPU, and this machine has no GPU; export with "
        "--device cpu, or give the container one (docker run --gpus 1)"
    ]


class Driver:
    """What libcuda.so.1 answers on a machine with two GPUs, or on a broken one."""

    def __init__(self, code: int = 0) -> None:
        self._code = code

    def cuInit(self, flags: int) -> int:
        return self._code

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = 80 * 2**30
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"system not yet initialized"
        return 0


def test_which_gpus_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Driver())
    used = gpu.check_gpus({"reward_forward": (1,)})
    assert list(map(str, used)) == ["cuda:1 NVIDIA H100 80GB HBM3 (80 GiB)"]
    assert [each.index for each in gpu.check_gpus({"reward_forward": ()})] == [0, 1]
    assert gpu.check_gpus({}) == []
    with pytest.raises(LaunchError, match="reward_forward needs cuda:2, and this machine has cuda"):
        gpu.check_gpus({"reward_forward": (2,)})


def test_a_gpu_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Driver(802))
    with pytest.raises(LaunchError, match=r"system not yet initialized \(CUDA error 802\)"):
        gpu.check_gpus({"reward_forward": ()})
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Driver(100))
    with pytest.raises(LaunchError, match="this machine has no GPU; export with --device cpu"):
        gpu.check_gpus({"reward_forward": ()})


@pytest.mark.parametrize(
    ("mistake", "meant"),
    [(["srve"], "serve"), (["serve", "--repositry=x"], "--repository"),
     (["health", "--htp-port=1"], "--http-port")],
)  # fmt: skip
def test_a_typing_mistake_is_answered_with_what_was_meant(mistake: list[str], meant: str) -> None:
    result = CliRunner().invoke(app, mistake)
    assert result.exit_code == 2
    assert meant in result.stderr


def test_its_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout == f"triward-server {__version__}, wire contract {CONTRACT_VERSION}\n"


def test_a_wrong_parameter(serve: Callable[..., Command], faulty: Path) -> None:
    config = faulty / "reward_preprocess" / "config.pbtxt"
    config.write_text(config.read_text().replace('"256"', '"many"'))
    failed = serve(repository=faulty)
    assert failed.wait() == 1
    assert "parameter 'max_responses' = 'many'" in failed.output.splitlines()[-1]


def test_not_a_repository(serve: Callable[..., Command], tmp_path: Path) -> None:
    failed = serve(repository=tmp_path)
    assert failed.wait() == 1
    assert failed.output.splitlines() == [
        f"triward-server: {tmp_path} is not a repository (no model's config.pbtxt)"
    ]


def test_flags_behind_the_dashes_reach_tritonserver(serve: Callable[..., Command]) -> None:
    failed = serve("--", "--no-such-flag=1")
    assert failed.wait() == 1
    assert "--no-such-flag" in failed.output


def test_tritonserver_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The container's own is used as it is: no flags, no changed environment."""
    fake = tmp_path / "tritonserver"
    fake.write_text("#!/bin/sh\nexit 7\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with ExitStack() as cleanup:
        found = find_triton(cleanup)
    assert (found.executable, found.flags) == (str(fake), ())
    assert found.environment == dict(os.environ)


def test_server_that_exits_at_once(
    tmp_path: Path, echo_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_tritonserver_on_path_comes_first(tmp_path, monkeypatch)
    with pytest.raises(LaunchError, match="exit code 7"), TritonServer(echo_repository, LOCAL):
        pass


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as cleanup, monkeypatch.context() as patch:
        patch.setattr(installation, "version", lambda name: "2.1.0")
        with pytest.raises(LaunchError, match=r"numpy 2\.1\.0.*pip install 'numpy<2'"):
            find_triton(cleanup)
    with ExitStack() as cleanup, monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(LaunchError, match=r"pip install 'triward-server\[embedded\]'"):
            find_triton(cleanup)
    with ExitStack() as cleanup, monkeypatch.context() as patch:
        patch.setattr(installation.sysconfig, "get_config_var", lambda name: "/nowhere")
        with pytest.raises(LaunchError, match=r"libpython3\.\d+\.so\.1\.0 \(looked in /nowhere\)"):
            find_triton(cleanup)


def test_cli_scores(server: TritonServer, client: RewardClient) -> None:
    """`triward score`, as DESIGN has it, against the real server."""
    chart = ROOT / "examples" / "chart.png"
    result = subprocess.run(
        [BIN / "triward", "score", "--url", server.endpoints.grpc, "--image", chart,
         "--prompt", "Is Purple the highest value?", "--response", "Yes.", "--response", "No.",
         "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    prompt = [
        {"role": "user", "content": [{"type": "image", "image": str(chart)},
                                     {"type": "text", "text": "Is Purple the highest value?"}]}
    ]  # fmt: skip
    expected = client.score_responses(prompt, ["Yes.", "No."])
    assert json.loads(result.stdout)["scores"] == pytest.approx(expected, rel=1e-5)
    broken = subprocess.run(
        [BIN / "triward", "score", "--url", server.endpoints.grpc, "--image", ROOT / "LICENSE",
         "--prompt", "?", "--response", "Yes."],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert broken.returncode == 2
    assert broken.stderr.count("\n") == 1 and "media[0]" in broken.stderr


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["3/4", "4/4"])
def test_ctrl_c_during_the_demo(
    moment: str, command: Callable[..., Command], tmp_path: Path
) -> None:
    demo = command(sys.executable, ROOT / "examples" / "demo.py", TMPDIR=str(tmp_path))
    demo.wait_for(moment)
    family = demo.family()
    os.killpg(demo.process.pid, signal.SIGINT)
    demo.wait()
    assert_gone(family)
    assert list(tmp_path.iterdir()) == []


def test_the_chart_is_what_its_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("draw_chart", ROOT / "examples/draw_chart.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with Image.open(ROOT / "examples" / "chart.png") as shipped:
        assert np.asarray(shipped.convert("RGB")).tobytes() == np.asarray(script.draw()).tobytes()


def test_a_request_that_triton_never_lets_go_delays_no_stop(
    echo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 24.10 keeps some cancelled requests, so its model is unloading for ever."""
    looks = 0

    def unloading(http: TritonHttp, timeout: float = 5.0) -> list[Loaded]:
        nonlocal looks
        looks += 1
        return [Loaded("reward", "1", "UNLOADING")]

    with (tmp_path / "triton.log").open("w") as log:
        with TritonServer(echo_repository, LOCAL, log=log, drain_timeout=600):
            monkeypatch.setattr(TritonHttp, "index", unloading)
        assert 0 < looks < 100, "it waits for a model that has nothing to do"
    assert "still in flight" not in (tmp_path / "triton.log").read_text()


def test_an_index_that_does_not_answer_does_not_end_the_draining(
    echo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def silent(http: TritonHttp, timeout: float = 5.0) -> list[Loaded]:
        nonlocal looks
        looks += 1
        raise HttpError(0, "no answer within 5 s")

    with (
        (tmp_path / "triton.log").open("w") as log,
        TritonServer(echo_repository, LOCAL, log=log, drain_timeout=600),
    ):
        monkeypatch.setattr(TritonHttp, "index", silent)
    assert looks > 1, "it gave up"
    assert "cannot drain" not in (tmp_path / "triton.log").read_text()


def test_a_crash_while_models_load_is_tried_once_more(
    echo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, script = tmp_path / "tried", tmp_path / "tritonserver"

    def crashing(cleanup: ExitStack) -> installation.Installation:
        real = find_triton(cleanup)
        script.write_text(
            f'#!/bin/sh\n[ -e {tried} ] && exec {real.executable} "$@"\n'
            f"touch {tried}\nkill -ABRT $$\n"
        )
        script.chmod(0o755)
        return replace(real, executable=str(script))

    monkeypatch.setattr(launch, "find_triton", crashing)
    with brief(echo_repository, tmp_path / "triton.log") as server:
        assert server.http.is_ready()
    said = (tmp_path / "triton.log").read_text()
    assert said.count("it is started again") == 1
    assert "tritonserver: signal SIGABRT" in said


def test_a_crash_that_comes_again_is_told(
    echo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "tritonserver"
    script.write_text("#!/bin/sh\nkill -ABRT $$\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with (
        (tmp_path / "triton.log").open("w") as log,
        pytest.raises(LaunchError, match="tritonserver: signal SIGABRT"),
        TritonServer(echo_repository, LOCAL, log=log),
    ):
        pass
    assert (tmp_path / "triton.log").read_text().count("it is started again") == 2


@pytest.mark.slow
def test_a_start_that_stands_still_is_tried_again(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 24.10 gives up a process that is silent for a second, and then waits for it."""
    monkeypatch.setattr(launch, "Progress", partial(Progress, patience=8.0))
    done, others = threading.Event(), {*psutil.Process().children(recursive=True)}

    def is_loading(process: psutil.Process) -> bool:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        return "reward_forward" in " ".join(process.cmdline()) and "libtorch_cpu" in maps

    def freeze_one() -> None:
        while not done.wait(0.02):
            for process in {*psutil.Process().children(recursive=True)} - others:
                with suppress(psutil.Error, OSError):
                    if is_loading(process):
                        process.suspend()  # for good: its end comes with the server's
                        return

    with (tmp_path / "triton.log").open("w") as log, ThreadPoolExecutor(1) as pool:
        freezing = pool.submit(freeze_one)
        try:
            with TritonServer(repository, LOCAL, log=log) as server:
                assert server.http.is_ready()
        finally:
            done.set()
        freezing.result()
    said = (tmp_path / "triton.log").read_text()
    assert said.count("tritonserver stands still") == said.count("it is started again") == 1, said
