"""Several versions side by side, changing from one to another under load, and back."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.asking import ASK, keep_asking, model_processes, wait_until
from tests.conftest import Exit, Served, add_model, brief
from triward import RewardClient, ServerUnavailable
from triward_server.cli import app
from triward_server.errors import LaunchError
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.serving.canary import Canary
from triward_server.serving.integrity import Verify
from triward_server.serving.launch import TritonServer
from triward_server.serving.repository import pin, pinned, versions
from triward_server.serving.switch import switch_version
from triward_server.serving.triton_http import Loaded, TritonHttp
from triward_server.serving.watchdog import Watchdog
from triward_server.testing.echo import make_echo
from triward_server.testing.oracle import Oracle, fp32_budget

Export = Callable[..., Exit]


@pytest.fixture(scope="module")
def upgraded(
    build: Callable[..., Path], export: Export, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An echo that serves version 1 and has another checkpoint as version 2."""
    output = build("--dtype=float32", "--no-canary", "--no-verify")
    other = tmp_path_factory.mktemp("other") / "checkpoint"
    make_checkpoint("tiny", 7, other)
    result = export(
        "--checkpoint", other, "--output", output, "--device=cpu", "--dtype=float32",
        "--preprocess-instances=2", "--threads=1", "--version=2", "--no-canary", "--no-verify",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    for version in ("1", "2"):
        make_echo(output, version=version)
    return output


@pytest.fixture(scope="module")
def running(upgraded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    aside = upgraded.with_name("aside")
    for model in ("reward", "reward_preprocess", "reward_forward"):
        (aside / model).mkdir(parents=True)
        (upgraded / model / "2").rename(aside / model / "2")
    with brief(upgraded, log) as server:
        for model in ("reward", "reward_preprocess", "reward_forward"):  # as an export does
            (aside / model / "2").rename(upgraded / model / "2")
        yield server


def test_a_version_is_added_beside_the_others(upgraded: Path) -> None:
    assert versions(upgraded) == ["1", "2"]
    assert pinned(upgraded) == "1", "an export changes nothing that is served"
    one, two = (Canary.of(upgraded, version) for version in ("1", "2"))
    assert one.scores and two.scores and one.scores != two.scores


def test_a_version_that_is_there_is_refused(
    upgraded: Path, checkpoint: Path, export: Export
) -> None:
    result = export("--checkpoint", checkpoint, "--output", upgraded, "--version=2")
    assert result.code == 1 and "has version 2 of reward; --version adds another" in result.stderr


def test_options_that_would_change_running_versions_are_refused(
    upgraded: Path, checkpoint: Path, export: Export
) -> None:
    before = sorted(upgraded.rglob("*"))
    result = export(
        "--checkpoint", checkpoint, "--output", upgraded, "--device=cpu", "--dtype=float32",
        "--preprocess-instances=2", "--threads=1", "--version=3", "--max-responses=9",
    )  # fmt: skip
    assert result.code == 1 and "reward_preprocess/config.pbtxt would change" in result.stderr
    assert sorted(upgraded.rglob("*")) == before, "nothing was left"
    assert [p.name for p in upgraded.parent.iterdir() if p.name.startswith(".")] == []


def test_a_checkpoint_is_swapped_under_load(running: TritonServer, upgraded: Path) -> None:
    """There and back: every answer is one version's exact score, and none fails."""
    with RewardClient(running.endpoints.grpc, timeout=60, max_attempts=1) as client:
        old = client.score(ASK)
    done = threading.Event()
    # What is served, or nothing in particular while it changes.
    served: list[str | None] = ["1"]
    answers: list[tuple[str | None, float]] = []

    def ask() -> None:
        with RewardClient(running.endpoints.grpc, timeout=60, max_attempts=1) as asking:
            while not done.is_set():
                before = served[0]
                score = asking.score(ASK)  # raises, and fails the test, if it fails
                answers.append((before if before == served[0] else None, score))

    processes = {p.pid for p in model_processes(running.pid)}
    dog = Watchdog(
        running.http, running.endpoints.metrics_port, upgraded, running.pid, hang_timeout=60
    )
    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(ask) for _ in range(2)]
        try:
            for version in ("2", "1", "2", "1"):
                dog.check()
                served[0] = None
                switch_version(running.http, upgraded, version, 300)
                served[0] = version
                dog.check()
                count = len(answers)
                while len(answers) < count + 30 and not any(c.done() for c in callers):
                    done.wait(0.01)
        finally:
            done.set()
        for caller in callers:
            caller.result()
    of = {version: [score for v, score in answers if v == version] for version in ("1", "2", None)}
    new = of["2"][0]
    assert abs(new - old) > 1e-2, "two checkpoints, two opinions"
    assert of["1"] == pytest.approx([old] * len(of["1"]), rel=1e-5)
    assert of["2"] == pytest.approx([new] * len(of["2"]), rel=1e-5)
    for score in of[None]:
        assert score in (pytest.approx(old, rel=1e-5), pytest.approx(new, rel=1e-5))
    assert pinned(upgraded) == "1"
    now = {p.pid for p in model_processes(running.pid)}
    assert processes <= now and len(now - processes) == 3, "version 1 was not loaded again"


def test_a_switch_ends_when_the_old_version_gets_no_more_requests(
    running: TritonServer, upgraded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 24.10 says that the new one is loaded before it takes the old one away."""
    looks, real = 3, TritonHttp.index

    def index(http: TritonHttp, timeout: float = 5.0) -> list[Loaded]:
        nonlocal looks
        late = looks > 0 and pinned(upgraded) == "2"
        looks -= late
        return real(http, timeout) + [Loaded("reward", "1", "READY")] * late

    monkeypatch.setattr(TritonHttp, "index", index)
    switch_version(running.http, upgraded, "2", 300)
    assert looks == 0
    switch_version(running.http, upgraded, "1", 300)


def test_tokens_go_to_the_version_that_is_served(running: TritonServer, upgraded: Path) -> None:
    """Both are loaded after a change and back."""
    with RewardClient(running.endpoints.grpc, timeout=60) as client:
        before = client.score_tokens([1, 2], [[3, 4]])
        switch_version(running.http, upgraded, "2", 300)
        assert client.score_tokens([1, 2], [[3, 4]]) != pytest.approx(before, rel=1e-3)
        switch_version(running.http, upgraded, "1", 300)
        assert client.score_tokens([1, 2], [[3, 4]]) == pytest.approx(before, rel=1e-5)


def test_a_version_with_other_weights_is_never_served(
    running: TritonServer, upgraded: Path
) -> None:
    """Its canary is asked before any caller gets it, and it is unloaded again."""
    honest = Canary.of(upgraded, "2")
    assert honest.scores
    replace(honest, scores=tuple(s + 1 for s in honest.scores)).write(upgraded / "reward" / "2")
    before = {path: path.read_bytes() for path in upgraded.glob("*/config.pbtxt")}
    dog = Watchdog(
        running.http, running.endpoints.metrics_port, upgraded, running.pid, hang_timeout=60
    )
    done = threading.Event()
    answers: list[float] = []

    def ask() -> None:
        with RewardClient(running.endpoints.grpc, timeout=60, max_attempts=1) as asking:
            while not done.is_set():
                answers.append(asking.score(ASK))  # raises, and fails the test, if it fails

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(ask) for _ in range(2)]
        try:
            with pytest.raises(LaunchError, match=r"reward: .*canary .* version 1 is served"):
                switch_version(running.http, upgraded, "2", 120)
            dog.check()
            count = len(answers)
            while len(answers) < count + 30 and not any(c.done() for c in callers):
                done.wait(0.01)
        finally:
            done.set()
            honest.write(upgraded / "reward" / "2")
        for caller in callers:
            caller.result()
    assert answers == pytest.approx([answers[0]] * len(answers), rel=1e-5)
    assert {path: path.read_bytes() for path in upgraded.glob("*/config.pbtxt")} == before
    assert pinned(upgraded) == "1"
    for model in ("reward_preprocess", "reward_forward"):
        wait_until(lambda model=model: loaded(running, model) == {"1"})
    assert not running.http.is_ready("reward_candidate")
    version, scores = running.http.infer(Canary.of(upgraded, "1"), 20)
    assert version == "1" and Canary.of(upgraded, "1").problem(scores) is None


def test_a_version_that_cannot_be_loaded(running: TritonServer, upgraded: Path) -> None:
    """A file of it is missing; or, unverified, its model refuses its configuration."""
    models = ("reward", "reward_preprocess", "reward_forward")
    for model in models:
        shutil.copytree(upgraded / model / "2", upgraded / model / "3")
    weights = upgraded / "reward_forward/3/checkpoint/value_head.safetensors"
    weights.unlink()
    try:
        with pytest.raises(LaunchError, match=r"3 is broken and was not loaded: .*head.*: missing"):
            switch_version(running.http, upgraded, "3", 120)
        assert loaded(running, "reward_forward") == {"1"}
        (upgraded / "reward_forward/3/echo.json").unlink()
        with pytest.raises(LaunchError, match=r"'reward_forward': version 3 is at .*echo\.json"):
            switch_version(running.http, upgraded, "3", 120, verify=Verify.OFF)
        assert pinned(upgraded) == "1"
        for model in models[1:]:
            wait_until(lambda model=model: loaded(running, model) == {"1"})
        with RewardClient(running.endpoints.grpc, timeout=60, max_attempts=1) as client:
            client.score(ASK)
    finally:
        for model in models:
            shutil.rmtree(upgraded / model / "3")


def test_a_real_checkpoint_is_swapped_under_load(
    served: Callable[..., Served], rack: Path, checkpoint: Path, export: Export, tmp_path: Path
) -> None:
    """Two callers meanwhile: each answer is one checkpoint's. Weights that are NaN never come."""
    make_checkpoint("tiny", 7, tmp_path / "other")
    model = served("swapped")
    add_model(export, rack, tmp_path / "other", model.names, "--version=2")
    old, new = (Oracle(folder).score(ASK) for folder in (checkpoint, tmp_path / "other"))
    assert abs(new - old) > 1e-2, "two checkpoints, two opinions"
    done, url = threading.Event(), model.server.endpoints.grpc

    def one_more() -> Callable[[], bool]:
        """Ask once more when it is done: what is in flight then may be the old one's."""
        more = iter([False])
        return lambda: done.is_set() and next(more, True)

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking, url, one_more(), model.names.ensemble) for _ in range(2)]
        try:
            assert switch_version(model.server.http, rack, "2", 300, model.names) == "1"
            assert abs(model.client.score(ASK) - new) <= fp32_budget(new)
        finally:
            done.set()
        answers = [answer for caller in asking for answer in caller.result()]
    assert {min((old, new), key=lambda score: abs(score - a)) for a in answers} == {old, new}
    for answer in answers:
        assert min(abs(answer - old), abs(answer - new)) <= fp32_budget(max(old, new))
    for folder in (model.names.ensemble, *model.names.steps):
        shutil.copytree(rack / folder / "2", rack / folder / "3")
    weights = rack / model.names.forward / "3/checkpoint/value_head.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    tensors["v_head.summary.weight"][0, :5] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(LaunchError, match=r"v_head.summary.weight': 5 of 128 weights are NaN"):
        switch_version(model.server.http, rack, "3", 120, model.names, verify=Verify.OFF)
    assert abs(model.client.score(ASK) - new) <= fp32_budget(new)


def loaded(server: TritonServer, model: str) -> set[str]:
    """Versions of a model that are there, or on their way."""
    return {m.version for m in server.http.index() if m.name == model and m.state != "UNAVAILABLE"}


class TestCommands:
    """The same from a shell."""

    @pytest.fixture
    def run(self, running: TritonServer, tmp_path: Path) -> Callable[..., tuple[int, str]]:
        key = tmp_path / "key"
        key.write_text(running.admin_key)

        def run(*arguments: object) -> tuple[int, str]:
            flags = [f"--http-port={running.endpoints.http_port}", f"--admin-key-file={key}"]
            result = CliRunner().invoke(app, [*map(str, arguments), *flags])
            return result.exit_code, result.output

        return run

    def test_switch_and_back(self, run: Callable[..., tuple[int, str]], upgraded: Path) -> None:
        flag = f"--repository={upgraded}"
        for there, back, verify in ((2, 1, "sampled"), (1, 2, "full")):
            code, output = run("switch", there, flag, f"--verify={verify}")
            first, last = output.splitlines()
            assert code == 0 and last == f"reward: version {there} is served, was {back}"
            assert f"reward: version {there}: " in first and f"verified ({verify}): read" in first
        code, output = run("switch", 9, flag)
        assert code == 1 and "has no version 9, only 1, 2" in output

    def test_an_old_version_is_retired(
        self, run: Callable[..., tuple[int, str]], running: TritonServer, upgraded: Path
    ) -> None:
        """When the steps are loaded again its memory goes; then its folders may."""
        for model in ("reward_preprocess", "reward_forward"):
            assert loaded(running, model) == {"1", "2"}, "it was served a moment ago"
            assert run("load", model)[0] == 0
            wait_until(lambda model=model: loaded(running, model) == {"1"})
            (upgraded / model / "2").rename(upgraded.parent / f"{model}-2")
            assert run("load", model)[0] == 0
        assert "reward_forward" in run("models")[1]
        ready = {(m.name, m.version) for m in running.http.index() if m.state == "READY"}
        assert ("reward_forward", "1") in ready and ("reward_forward", "2") not in ready

    def test_unload_and_load(
        self, run: Callable[..., tuple[int, str]], running: TritonServer
    ) -> None:
        assert run("unload", "reward") == (0, "reward: unloaded\n")
        assert not running.http.is_ready()
        with (
            RewardClient(running.endpoints.grpc, timeout=20, max_attempts=1) as client,
            pytest.raises(ServerUnavailable, match="no available versions"),
        ):
            client.score(ASK)
        assert run("load", "reward") == (0, "reward: loaded\n")
        assert running.http.is_ready()
        code, output = run("load", "no-such-model")
        assert code == 1 and "no-such-model" in output


def test_pinning_is_one_change(upgraded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(upgraded, tmp_path / "copy"))
    pin(copy, "2", beside=["1"])
    assert pinned(copy) == "2"
    assert "versions: 1\n" in (copy / "reward_forward/config.pbtxt").read_text()
    pin(copy, "2")
    assert pinned(copy) == "2"
    assert "versions: 1\n" not in (copy / "reward_forward/config.pbtxt").read_text()
    assert sorted(p.name for p in (copy / "reward").iterdir()) == ["1", "2", "config.pbtxt"]
