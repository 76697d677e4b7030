"""A server that no longer scores is noticed, named and ended; one that is told to stop drains."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc as triton

from tests.asking import ASK, accepted, keep_asking, long_prompt, ready, wait_until
from tests.commands import BIN, Command, assert_gone, named, regions
from triward import RewardClient, ServerError, ServerUnavailable, TriwardError
from triward_server.backend.metrics import WORKING
from triward_server.cli import _WATCH_INTERVAL
from triward_server.errors import DEVICE_FAULT, LaunchError, Unhealthy
from triward_server.serving import watchdog
from triward_server.serving.canary import Canary
from triward_server.serving.launch import TritonServer
from triward_server.serving.repository import Canaries
from triward_server.serving.triton_http import HttpError, Loaded, Series, TritonHttp
from triward_server.serving.watchdog import Watchdog
from triward_server.testing.echo import fault
from triward_server.testing.oracle import fp32_budget

NOTICED_WITHIN = 15.0  # seconds
UTILS = "triton_python_" + "backend_utils"  # which only adapters may import

# In front of the real adapter: weights that become NaN when a file says so, or a GPU that faults.
FAULTY = f"""
from pathlib import Path

import torch
import {UTILS} as pb_utils

from triward_server.backend.triton_io import ForwardBackend

FOLDER = Path(__file__).parent


def fault(*_):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class TritonPythonModel:
    def initialize(self, args):
        self._backend = ForwardBackend(args, pb_utils)

    def execute(self, requests):
        if (FOLDER / "nan").exists():
            self._backend._scorer._model.v_head.summary.bias.data.fill_(float("nan"))
        if (FOLDER / "fault").exists():
            self._backend._scorer._passes.launch = fault
        return self._backend.execute(requests)
"""


def ended(running: Command, since: float) -> str:
    """The reason that `serve` gave, which must come in time."""
    assert running.wait() == 1
    assert time.monotonic() - since < NOTICED_WITHIN
    return running.output.splitlines()[-1].removeprefix("triward-server: ")


@pytest.mark.parametrize(
    ("number", "name", "real"),
    [
        (signal.SIGKILL, "reward_forward", True),
        (signal.SIGKILL, "reward_preprocess", False),
        (signal.SIGSTOP, "reward_forward", False),
        (signal.SIGSTOP, "tritonserver", False),
    ],
)
def test_a_process_dies_or_stops_under_load(
    number: signal.Signals,
    name: str,
    real: bool,
    serve: Callable[..., Command],
    request: pytest.FixtureRequest,
) -> None:
    expected = request.getfixturevalue("oracle" if real else "echo").score(ASK)
    budget = fp32_budget(expected)
    repository = request.getfixturevalue("repository" if real else "faulty")
    running = serve(repository=repository)
    url = ready(running)
    if not real:  # or callers are so many that Triton 24.10 aborts over the process it lost
        fault(repository, "delay", "0.05")
    family = running.family()
    [victim, *_] = named(family, name) or named(family, "triton", f"/{name}/")
    with ThreadPoolExecutor(4) as pool, ExitStack() as end:
        end.callback(running.kill)  # should the test fail, callers would wait for it
        callers = [
            pool.submit(keep_asking, url, lambda: running.process.poll() is not None)
            for _ in range(4)
        ]
        with RewardClient(url, timeout=60, max_attempts=1) as warm:
            assert abs(warm.score(ASK) - expected) <= budget
        hit = time.monotonic()
        victim.send_signal(number)
        reason = ended(running, hit)
    word = "dead" if number == signal.SIGKILL else "stopped"
    # Triton 24.10 may abort over the process that it lost before the watchdog has looked.
    aborted = number == signal.SIGKILL and "stopped by itself (signal SIGABRT)" in reason
    assert (name in reason and word in reason) or "model processes are left" in reason or aborted
    assert_gone(family)
    for answer in itertools.chain.from_iterable(caller.result() for caller in callers):
        if isinstance(answer, float):
            assert abs(answer - expected) <= budget, "no answer may be a wrong score"
        else:
            assert isinstance(answer, (ServerUnavailable, ServerError)), answer


@pytest.mark.parametrize(
    ("damage", "value", "words"),
    [
        ("hang", "", "reward_forward_0_0 has got nothing done for"),
        ("error", "CUDA error: uncorrectable ECC error", "CUDA error: uncorrectable ECC error"),
        ("nan", "", "the model's score is nan"),
        ("drift", "0.5", "the canary scores"),
    ],
)
def test_a_model_that_no_longer_scores(
    damage: str, value: str, words: str, serve: Callable[..., Command], faulty: Path
) -> None:
    running = serve("--hang-timeout=3", repository=faulty)
    ready(running)
    family = running.family()
    fault(faulty, damage, value)
    assert words in ended(running, time.monotonic())
    assert_gone(family)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("nan", "the model's score is nan"),
        ("fault", f"{DEVICE_FAULT}: AcceleratorError: CUDA error"),
    ],
)
def test_a_real_model_that_is_damaged(
    damage: str, words: str, serve: Callable[..., Command], repository: Path, tmp_path: Path
) -> None:
    """Its weights become NaN, or its device faults, which the canary meets first."""
    damaged = Path(shutil.copytree(repository, tmp_path / "damaged"))
    (damaged / "reward_forward/1/model.py").write_text(FAULTY)
    running = serve(repository=damaged)
    ready(running)
    family = running.family()
    (damaged / "reward_forward/1" / damage).touch()
    assert words in ended(running, time.monotonic())
    assert_gone(family)


def test_tritonserver_killed_in_mid_batch(serve: Callable[..., Command], faulty: Path) -> None:
    running = serve(repository=faulty)
    url = ready(running)
    family = running.family()
    fault(faulty, "delay", "5")
    with RewardClient(url, timeout=60, max_attempts=1) as client, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(client.score_responses, ASK[:1], ["a"] * 64) for _ in range(4)]
        with triton.InferenceServerClient(url) as raw:
            wait_until(lambda: accepted(raw) >= len(calls))
        named(family, "tritonserver")[0].kill()
        for call in calls:
            assert isinstance(call.exception(timeout=60), ServerUnavailable)
    assert "stopped by itself (signal SIGKILL)" in ended(running, time.monotonic())
    assert_gone(family)


def test_shared_memory_runs_out(echo_repository: Path, tmp_path: Path) -> None:
    """In a namespace whose /dev/shm is as small as a container's default: 64 MB."""
    script = tmp_path / "run.sh"
    script.write_text(
        "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "
        f"{BIN}/triward-server serve --repository {echo_repository} --host=127.0.0.1 "
        "--grpc-port=0 --http-port=0 --metrics-port=0\n"
    )
    namespace = ["unshare", "-rm", "sh"]
    if subprocess.run([*namespace, "-c", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces")
    running = Command(*namespace, script)
    try:
        url = ready(running)
        picture = b"BM" + os.urandom(60 * 2**20)
        message = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
        with RewardClient(url, timeout=60, max_attempts=1) as client:
            score = client.score(ASK)
            with pytest.raises(TriwardError) as caught:
                client.score_responses(message, ["a"])
            assert not isinstance(caught.value, ValueError), "the caller is not to blame"
            # Either it still scores, the same as before, or it was ended for a reason.
            try:
                assert client.score(ASK) == pytest.approx(score, rel=1e-5)
            except ServerUnavailable:
                assert running.wait() == 1
                assert "triward-server: " in running.output.splitlines()[-1]
    finally:
        running.kill()


def test_told_to_stop_under_load(
    serve: Callable[..., Command], client: RewardClient, repository: Path
) -> None:
    """What is in flight finishes with its score; what comes later is refused, typed."""
    prompts = [long_prompt(number) for number in range(6)]
    expected = [client.score_responses(prompt, ["yes", "no"]) for prompt in prompts]
    running = serve("--drain-timeout=100", repository=repository)
    url = ready(running)
    family = running.family()
    with RewardClient(url, timeout=100, max_attempts=1) as asking, ThreadPoolExecutor(6) as pool:
        asking.score(ASK)
        flight = [pool.submit(asking.score_responses, prompt, ["yes", "no"]) for prompt in prompts]
        with triton.InferenceServerClient(url) as raw:
            wait_until(lambda: accepted(raw) > len(prompts))
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not raw.is_model_ready("reward", "1"))
        refused = keep_asking(url, lambda: running.process.poll() is not None)
        scores = [call.result(timeout=60) for call in flight]
    assert running.wait() == 0
    for got, wanted in zip(scores, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    errors = [answer for answer in refused if not isinstance(answer, float)]
    assert len(errors) == len(refused), "nothing new is taken"
    assert {type(error) for error in errors} == {ServerUnavailable}, {str(e)[-99:] for e in errors}
    assert "shutting down" in str(errors[0])
    assert_gone(family)


def test_draining_has_an_end(serve: Callable[..., Command], faulty: Path) -> None:
    running = serve("--drain-timeout=0.5", repository=faulty)
    url = ready(running)
    fault(faulty, "delay", "0.3")
    with RewardClient(url, timeout=100, max_attempts=1) as client, ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(client.score_responses, ASK[:1], [f"{n}"]) for n in range(12)]
        with triton.InferenceServerClient(url) as raw:
            wait_until(lambda: accepted(raw) >= 6)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 0
        failures = [call.exception(timeout=60) for call in calls]
    assert "still in flight after 0.5 s" in running.output
    # Triton still finishes what its last model has; the rest is refused.
    assert all(isinstance(f, (ServerUnavailable, ServerError)) for f in failures if f)


class TestCommand:
    """`triward-server health`."""

    def run(self, server: TritonServer, *flags: object) -> subprocess.CompletedProcess[str]:
        command = [BIN / "triward-server", "health", f"--http-port={server.endpoints.http_port}"]
        return subprocess.run(
            [*map(str, [*command, *flags])], capture_output=True, text=True, timeout=60
        )

    def test_well(self, server: TritonServer, repository: Path) -> None:
        for flags in ((), ("--deep", "--repository", repository)):
            result = self.run(server, *flags)
            assert (result.returncode, result.stdout) == (0, "well\n"), result.stderr

    def test_nothing_there(self, server: TritonServer) -> None:
        result = self.run(server, "--host=127.0.0.2")
        assert result.returncode == 1
        assert result.stderr.startswith("triward-server: reward at 127.0.0.2:")

    def test_another_score(self, server: TritonServer, repository: Path, tmp_path: Path) -> None:
        """As with other weights than those that were exported."""
        changed = Path(shutil.copytree(repository, tmp_path / "changed"))
        path = changed / "reward/1/canary.json"
        canary = json.loads(path.read_text())
        score = canary["scores"][1]
        canary["scores"][1] += 0.01
        path.write_text(json.dumps(canary))
        result = self.run(server, "--deep", "--repository", changed)
        assert result.returncode == 1
        assert f"the canary scores {score:.4g}"[:-1] in result.stderr

    def test_what_is_missing_is_said(self, server: TritonServer, tmp_path: Path) -> None:
        assert "--deep needs --repository" in self.run(server, "--deep").stderr
        result = self.run(server, "--deep", "--repository", tmp_path)
        assert result.returncode == 1 and "config.pbtxt" in result.stderr
        assert "a health check reads there what to ask" in result.stderr


@pytest.fixture
def canary() -> Canary:
    return Canary("[]", ("a", "b"), (b"x",), (1.0, -30.0), 1e-3)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.0009, -30.02], None),
        ([1.0011, -30.0], "1.0011, at export 1"),
        ([1.0, -30.04], "-30.04, at export -30"),
        ([1.0], "scores [1.0]"),
        ([1.0, float("nan")], "nan"),
        ([float("inf"), 0.0], "inf"),
    ],
)
def test_what_a_canary_notices(scores: list[float], words: str | None, canary: Canary) -> None:
    problem = canary.problem(scores)
    assert problem is None if words is None else words in (problem or "")


def test_a_canary_without_scores_still_wants_numbers() -> None:
    canary = Canary("[]", ("a",), (), None, 1e-3)
    assert canary.problem([99.0]) is None
    assert canary.problem([float("nan")])


def test_a_canary_survives_its_file(canary: Canary, tmp_path: Path) -> None:
    folder = tmp_path / "reward" / "3"
    folder.mkdir(parents=True)
    canary.write(folder)
    assert Canary.of(tmp_path, "3") == canary
    (folder / "canary.json").write_text("{}")
    with pytest.raises(LaunchError, match="no canary: KeyError"):
        Canary.of(tmp_path, "3")


def labels(instance: str) -> dict[str, str]:
    return {"instance": instance, "model": instance[:-4], "version": "1"}


def _busy(*_: object) -> None:
    raise HttpError(503, "overloaded")


class TestProgress:
    """A busy server is left alone, a hung one is not."""

    @pytest.fixture
    def rounds(
        self, repository: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., str | None]:
        """Plays rounds of six seconds: how long ago each working instance got something done."""

        def play(
            *rounds: dict[str, float] | None, ask: Callable[..., None] = _busy, seconds: float = 6
        ) -> str | None:
            now = [100.0]
            page: list[Series] = []

            def read(*_: object) -> list[Series]:
                if page:
                    return page
                raise HttpError(0, "no metrics")

            monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
            monkeypatch.setattr(watchdog, "read_metrics", read)
            monkeypatch.setattr(watchdog, "ask_canary", ask)
            monkeypatch.setattr(Watchdog, "_check_processes", lambda self: None)
            dog = Watchdog(TritonHttp("h", 1), 2, repository, os.getpid(), hang_timeout=10)
            for ages in rounds:
                now[0] += seconds
                idle = {"idle": now[0]}
                ages_now = idle if ages is None else idle | ages
                page[:] = [
                    Series(WORKING, labels(name), now[0] - age) for name, age in ages_now.items()
                ]
                if ages is None:
                    page.clear()
                try:
                    dog.check()
                except Unhealthy as error:
                    return str(error)
            return None

        return play

    def test_busy(self, rounds: Callable[..., str | None]) -> None:
        """The canary never gets through; the models work."""
        assert rounds(*[{"reward_forward_0_0": 5.0, "reward_preprocess_0_1": 9.9}] * 20) is None

    def test_one_instance_hangs(self, rounds: Callable[..., str | None]) -> None:
        """Also when others answer the canary."""
        ages = {"reward_preprocess_0_0": 0.1, "reward_preprocess_0_1": 10.0}
        problem = rounds({}, ages, ask=lambda *_: None)
        assert problem == "reward_preprocess_0_1 has got nothing done for 10 s"

    def test_it_is_noticed_in_time(self, rounds: Callable[..., str | None]) -> None:
        """A round is an interval and a canary's timeout, at most."""
        longest = _WATCH_INTERVAL + watchdog.CANARY_TIMEOUT
        late = [{"reward_forward_0_0": each * longest - 0.1} for each in (1, 2)]
        assert rounds(*late, seconds=longest)
        assert 2 * longest < NOTICED_WITHIN

    def test_nothing_moves_and_nothing_answers(self, rounds: Callable[..., str | None]) -> None:
        assert rounds({}, ask=_busy) is None
        problem = rounds({}, {}, ask=_busy)
        assert problem == "reward has done nothing for 12 s; the canary: overloaded"

    def test_no_metrics_are_no_progress(self, rounds: Callable[..., str | None]) -> None:
        assert rounds(None, None, ask=lambda *_: None) is None
        assert rounds(None, None)

    def test_what_its_operator_unloaded_is_not_missed(
        self, rounds: Callable[..., str | None]
    ) -> None:
        def ask(*_: object) -> None:
            raise HttpError(404, "no available versions")

        assert rounds(*[{}] * 9, ask=ask) is None


@pytest.mark.parametrize(("status", "kind"), [(400, HttpError), (503, HttpError), (500, Unhealthy)])
def test_only_a_failure_of_the_server_ends_it_at_once(
    status: int, kind: type[Exception], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One caller's malformed tensor fails its whole batch in Triton, the canary too."""

    def infer(*_: object) -> None:
        raise HttpError(status, "no")

    monkeypatch.setattr(TritonHttp, "infer", infer)
    with pytest.raises(kind):
        watchdog.ask_canary(TritonHttp("h", 1), Canaries(repository), 1)


def test_a_process_that_goes_while_the_watchdog_begins_ends_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker that decodes media does when it is replaced."""

    class Gone:
        def name(self) -> str:
            raise psutil.NoSuchProcess(7)

    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [Gone()])
    Watchdog(TritonHttp("h", 1), 2, repository, os.getpid(), hang_timeout=10)


def test_a_missing_process_is_noticed_twice_before_it_counts(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is being unloaded goes between two looks; one that died stays away."""
    monkeypatch.setattr(TritonHttp, "index", lambda *_: [Loaded("m", "1", "READY")])
    config = {"backend": "python", "instance_group": [{"count": 2, "gpus": [0, 1]}]}
    monkeypatch.setattr(TritonHttp, "config", lambda *_: config)
    with subprocess.Popen(["sleep", "60"]) as server:  # that has no model process
        dog = Watchdog(TritonHttp("h", 1), 2, repository, server.pid, hang_timeout=10)
        dog._check_processes()
        with pytest.raises(Unhealthy, match="only 0 of 4 model processes are left"):
            dog._check_processes()
        server.kill()


def test_the_servers_own_end_is_told_by_its_exit_status(repository: Path) -> None:
    """The watchdog may see it dead first, and does not know of which signal."""
    with subprocess.Popen(["sleep", "60"]) as server:
        dog = Watchdog(TritonHttp("h", 1), 2, repository, server.pid, hang_timeout=10)
        server.kill()
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet asked why
        assert psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE
        dog._check_processes()


def test_regions_are_where_the_tests_look(server: TritonServer) -> None:
    assert regions(os.getpid()), "or `assert_gone` would prove nothing"
