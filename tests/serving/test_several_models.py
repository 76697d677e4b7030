"""Several checkpoints in one repository and one server, each under a name of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tritonclient.grpc as triton

from tests.asking import ASK, accepted, keep_asking, model_processes, ready, wait_until
from tests.commands import Command, assert_gone, named
from tests.conftest import Exit, Served, brief
from tests.conversations import Messages
from tests.loadgen import counter
from triward import RewardClient, ServerError, ServerUnavailable
from triward_server.backend.metrics import WORKING
from triward_server.errors import LaunchError, Unhealthy
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.schema import REWARD, ModelNames
from triward_server.serving import watchdog
from triward_server.serving.canary import Canary
from triward_server.serving.launch import TritonServer
from triward_server.serving.repository import pinned, served_models, serves_on_gpu, versions
from triward_server.serving.switch import switch_version
from triward_server.serving.triton_http import HttpError, Series, TritonHttp
from triward_server.serving.watchdog import Watchdog, check_once
from triward_server.testing.echo import fault, make_echo
from triward_server.testing.oracle import Oracle, fp32_budget

Export = Callable[..., Exit]
FLAGS = (
    "--device=cpu",
    "--dtype=float32",
    "--preprocess-instances=1",
    "--threads=1",
    "--no-verify",
)
JUDGE = ModelNames("judge-2.5")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its inode and content: what is there, and that it was not written again."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.read_bytes()) for p in files}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of other seeds than the session's, by seed."""
    folder = tmp_path_factory.mktemp("others")
    for seed in (11, 12):
        make_checkpoint("tiny", seed, folder / str(seed))
    return {seed: folder / str(seed) for seed in (11, 12)}


@pytest.fixture(scope="module")
def both(
    checkpoint: Path, others: dict[int, Path], export: Export,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A repository with two checkpoints: `reward` and `judge-2.5`."""
    output = tmp_path_factory.mktemp("several") / "models"
    for name, source in ((REWARD.ensemble, checkpoint), (JUDGE.ensemble, others[11])):
        result = export("--checkpoint", source, "--output", output, "--name", name, *FLAGS)
        assert result.code == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def echoes(both: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as echoes."""
    copy = Path(shutil.copytree(both, tmp_path_factory.mktemp("echoes") / "models"))
    for names in (REWARD, JUDGE):
        make_echo(copy, names)
    return copy


@pytest.fixture(scope="module")
def running(echoes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with brief(echoes, tmp_path_factory.mktemp("log") / "triton.log") as server:
        yield server


class TestExport:
    def test_a_second_name_is_a_second_model(self, both: Path) -> None:
        assert served_models(both) == [JUDGE, REWARD]
        assert [(versions(both, names), pinned(both, names)) for names in served_models(both)] == [
            (["1"], "1"), (["1"], "1")
        ]  # fmt: skip
        folders = {path.name for path in both.iterdir()}
        steps = {*REWARD.steps, *JUDGE.steps}
        assert folders == {"reward", "judge-2.5", *steps, "reward_draining"}
        one, two = (Canary.of(both, "1", names) for names in served_models(both))
        assert one.scores != two.scores
        assert not serves_on_gpu(both)

    def test_the_default_names_are_the_contracts(self) -> None:
        assert (REWARD.ensemble, *REWARD.steps) == ("reward", "reward_preprocess", "reward_forward")

    @pytest.mark.parametrize(
        "name",
        ["", "-x", ".x", "_x", "a b", "a/b", "ä", "x" * 65, "a\n", "x_forward", "y_preprocess",
         "z_draining", "reward_vision", "reward_candidate"],
    )  # fmt: skip
    def test_names_that_cannot_be(
        self, name: str, checkpoint: Path, export: Export, tmp_path: Path
    ) -> None:
        result = export("--checkpoint", checkpoint, "--output", tmp_path / "m", f"--name={name}")
        assert result.code == 1 and f"--name {name!r}: " in result.stderr
        assert not (tmp_path / "m").exists()

    def test_a_name_and_version_that_are_there_are_refused(
        self, both: Path, checkpoint: Path, export: Export
    ) -> None:
        before = snapshot(both)
        result = export("--checkpoint", checkpoint, "--output", both, "--name=judge-2.5", *FLAGS)
        assert result.code == 1 and "has version 1 of judge-2.5; --version adds" in result.stderr
        assert snapshot(both) == before

    def test_force_replaces_one_model(
        self, both: Path, others: dict[int, Path], export: Export, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(both, tmp_path / "copy"))
        before = snapshot(copy)
        result = export(
            "--checkpoint", others[12], "--output", copy, "--name=judge-2.5", "--version=4",
            "--force", *FLAGS,
        )  # fmt: skip
        assert result.code == 0, result.stderr
        assert versions(copy, JUDGE) == ["4"] and pinned(copy, JUDGE) == "4"
        assert Canary.of(copy, "4", JUDGE).scores != Canary.of(both, "1", JUDGE).scores
        judges = (JUDGE.ensemble, *JUDGE.steps)
        left = {k: v for k, v in before.items() if not k.startswith(judges)}
        now = {k: v for k, v in snapshot(copy).items() if not k.startswith(judges)}
        assert now == left, "the other model's files are the same files"
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]

    def test_another_models_folder_is_left_alone(
        self, both: Path, checkpoint: Path, export: Export, tmp_path: Path
    ) -> None:
        """Somebody's own model in the same repository, with and without --force."""
        copy = Path(shutil.copytree(both, tmp_path / "copy"))
        (copy / "mine").mkdir()
        (copy / "mine" / "config.pbtxt").write_text('name: "mine"')
        before = snapshot(copy)
        for flags in ((), ("--force",)):
            result = export("--checkpoint", checkpoint, "--output", copy, "--name=mine", *flags)
            assert result.code == 1 and "mine is no model of ours" in result.stderr
            assert snapshot(copy) == before
        assert served_models(copy) == [JUDGE, REWARD]

    @pytest.mark.parametrize(
        ("flags", "broken_move"),
        [
            (("--name=third",), 2),  # of its three folders
            (("--name=judge-2.5", "--force"), 1),  # of three out
            (("--name=judge-2.5", "--force"), 5),  # and three in
        ],
    )
    def test_an_export_that_fails_leaves_the_repository_as_it_was(
        self, flags: tuple[str, ...], broken_move: int, both: Path, checkpoint: Path,
        export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """As when the disk fails in the middle of moving folders, wherever that is."""
        copy = Path(shutil.copytree(both, tmp_path / "copy"))
        before = snapshot(copy)
        real, moves = Path.rename, [0]

        def rename(self: Path, target: Path) -> Path:
            inside = copy in (self.parent, Path(target).parent) and self.name[0] != "."
            moves[0] += inside
            if inside and moves[0] == broken_move + 1:
                moves[0] = 99
                raise OSError(5, "Input/output error")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        result = export("--checkpoint", checkpoint, "--output", copy, *flags, *FLAGS)
        assert result.code == 1 and "Input/output error" in result.stderr
        assert snapshot(copy) == before and served_models(copy) == [JUDGE, REWARD]
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_each_scores_as_its_own_checkpoint(
    served: Callable[..., Served], client: RewardClient, cases: dict[str, Messages],
    oracle: Oracle, others: dict[int, Path],
) -> None:  # fmt: skip
    """Both at the same time, from threads, with images among them; never the other's score."""
    chosen = list(cases.values())[::5]
    assert any("image" in json.dumps(messages, default=repr) for messages in chosen)
    oracles = {REWARD: oracle, JUDGE: Oracle(others[11])}
    expected = {n: [each.score(m) for m in chosen] for n, each in oracles.items()}
    judge = served(JUDGE.ensemble, source=others[11]).client
    start = threading.Barrier(2)

    def ask(names: ModelNames) -> list[float]:
        start.wait(30)
        return {REWARD: client, JUDGE: judge}[names].score_many(chosen, concurrency=8)

    with ThreadPoolExecutor(2) as pool:
        scores = dict(zip(expected, pool.map(ask, expected), strict=True))
    for names, other in ((REWARD, JUDGE), (JUDGE, REWARD)):
        for got, mine, others_ in zip(scores[names], expected[names], expected[other], strict=True):
            assert abs(got - mine) <= fp32_budget(mine)
            assert abs(got - others_) > fp32_budget(others_)


def test_an_unknown_model_is_named(running: TritonServer) -> None:
    with (
        RewardClient(running.endpoints.grpc, timeout=20, model="jugde") as client,
        pytest.raises(ServerError, match="does not serve the model 'jugde'"),
    ):
        client.score(ASK)


def test_metrics_tell_models_apart(
    running: TritonServer, metric_of: Callable[[str, str], float]
) -> None:
    def read() -> list[float]:
        return [metric_of("triward_conversations_total", n.forward) for n in (REWARD, JUDGE)]

    before = read()
    with RewardClient(running.endpoints.grpc, timeout=60, model=JUDGE.ensemble) as client:
        client.score_responses(ASK[:1], ["a", "b", "c"])
    assert [now - then for now, then in zip(read(), before, strict=True)] == [0, 3]


@pytest.fixture
def metric_of(running: TritonServer) -> Callable[[str, str], float]:
    return lambda name, model: counter(running.endpoints.metrics_port, name, model)


class TestHealth:
    def test_every_canary_is_asked(
        self, running: TritonServer, echoes: Path, tmp_path: Path
    ) -> None:
        check_once(running.http, echoes, 20, deep=True)
        for names in (REWARD, JUDGE):
            wrong = Path(shutil.copytree(echoes, tmp_path / names.ensemble))
            canary = Canary.of(wrong, "1", names)
            assert canary.scores
            scores = tuple(score + 1 for score in canary.scores)
            replace(canary, scores=scores).write(wrong / names.ensemble / "1")
            check_once(running.http, wrong, 20)  # ready, as far as Triton can tell
            with pytest.raises(LaunchError, match=f"^{names.ensemble}: the canary scores"):
                check_once(running.http, wrong, 20, deep=True)
            dog = Watchdog(running.http, running.endpoints.metrics_port, wrong, running.pid, 60)
            with pytest.raises(Unhealthy, match=f"^{names.ensemble}: the canary scores"):
                dog.check()

    def test_a_model_that_is_not_there(
        self, running: TritonServer, echoes: Path, tmp_path: Path
    ) -> None:
        """It came to the folder after the start, or its operator has unloaded it."""
        more = Path(shutil.copytree(echoes, tmp_path / "more"))
        for folder in (JUDGE.ensemble, *JUDGE.steps):
            (more / folder).rename(more / folder.replace("judge-2.5", "third"))
        with pytest.raises(LaunchError, match=r"^third at 127\.0\.0\.1:\d+ is not ready"):
            check_once(running.http, more, 20)
        dog = Watchdog(running.http, running.endpoints.metrics_port, more, running.pid, 60)
        dog.check()  # what is not loaded is not missed

    @pytest.mark.parametrize("busy", [REWARD, JUDGE])
    def test_a_model_that_does_nothing_is_not_hidden_by_a_busy_one(
        self, busy: ModelNames, echoes: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No canary gets through; one model works all the time, the other never."""
        now = [100.0]

        def ask(*_: object) -> None:
            raise HttpError(503, "overloaded")

        def page(*_: object) -> list[Series]:
            instance = f"{busy.forward}_0_0"
            labels = {"instance": instance, "model": busy.forward, "version": "1"}
            return [Series(WORKING, labels, now[0] - 1)]

        monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(watchdog, "read_metrics", page)
        monkeypatch.setattr(watchdog, "ask_canary", ask)
        monkeypatch.setattr(Watchdog, "_check_processes", lambda self: None)
        dog = Watchdog(TritonHttp("h", 1), 2, echoes, os.getpid(), hang_timeout=10)
        dog.check()
        now[0] += 12
        [idle] = {REWARD, JUDGE} - {busy}
        with pytest.raises(Unhealthy, match=f"^{idle.ensemble} has done nothing for 12 s"):
            dog.check()

    @pytest.mark.parametrize("name", [JUDGE.forward, REWARD.preprocess])
    def test_a_dead_process_of_any_model(
        self, name: str, echoes: Path, serve: Callable[..., Command]
    ) -> None:
        server = serve(repository=echoes)
        server.wait_for(r"ready\s+grpc")
        family = server.family()
        [victim] = named(family, "triton", f"/{name}/")
        victim.kill()
        assert server.wait() == 1
        reason = server.output.splitlines()[-1]
        dead = rf"of {re.escape(name)}_0_\d is dead|model processes are left"
        assert re.search(dead, reason)
        assert_gone(family)


def test_one_is_switched_while_the_other_serves(
    running: TritonServer, echoes: Path, others: dict[int, Path], export: Export
) -> None:
    """Another version of one: the other's processes stay, and none of its requests fails."""
    with RewardClient(running.endpoints.grpc, timeout=60, model=REWARD.ensemble) as client:
        before = client.score(ASK)
    kept = _processes(running, REWARD)
    done = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking, running.endpoints.grpc, done.is_set) for _ in range(2)]
        try:
            result = export(
                "--checkpoint", others[12], "--output", echoes, "--name=judge-2.5", "--version=2",
                *FLAGS,
            )  # fmt: skip
            assert result.code == 0, result.stderr
            make_echo(echoes, JUDGE, "2")
            assert (versions(echoes, JUDGE), pinned(echoes, JUDGE)) == (["1", "2"], "1")
            assert switch_version(running.http, echoes, "2", 300, JUDGE) == "1"
        finally:
            done.set()
        answers = [answer for caller in asking for answer in caller.result()]
    assert len(answers) > 10 and answers == pytest.approx([before] * len(answers), rel=1e-5)
    assert _processes(running, REWARD) == kept
    assert (versions(echoes), pinned(echoes)) == (["1"], "1")
    assert _answers_as(running, echoes, JUDGE) == "2"
    check_once(running.http, echoes, 20, deep=True)
    with pytest.raises(LaunchError, match=r"has no model 'other', only judge-2\.5, reward$"):
        switch_version(running.http, echoes, "1", 20, ModelNames("other"))


def _answers_as(server: TritonServer, repository: Path, names: ModelNames) -> str:
    """The version that answers, which must be what its canary says."""
    canary = Canary.of(repository, pinned(repository, names), names)
    version, scores = server.http.infer(canary, 20, names.ensemble)
    assert canary.scores and canary.problem(scores) is None
    return version


def test_a_model_is_added_and_removed_while_others_serve(
    running: TritonServer, echoes: Path, others: dict[int, Path], export: Export
) -> None:
    result = export("--checkpoint", others[12], "--output", echoes, "--name=third", *FLAGS)
    assert result.code == 0, result.stderr
    third = ModelNames("third")
    make_echo(echoes, third)
    running.http.load("third", 300)  # and with it its steps
    check_once(running.http, echoes, 20, deep=True)
    assert _answers_as(running, echoes, third) == "1"
    for folder in (third.ensemble, *third.steps):
        running.http.unload(folder)
        shutil.rmtree(echoes / folder)
    assert third not in served_models(echoes)
    check_once(running.http, echoes, 20, deep=True)
    wait_until(lambda: not _processes(running, third), "its processes are still there")


def test_told_to_stop_every_model_finishes(
    echoes: Path, serve: Callable[..., Command], tmp_path: Path
) -> None:
    """In flight at both models: all finish; what comes later is refused by both."""
    slow = Path(shutil.copytree(echoes, tmp_path / "slow"))
    server = serve("--drain-timeout=100", repository=slow)
    url = ready(server)
    family = server.family()
    names = (REWARD, JUDGE)
    with (
        RewardClient(url, timeout=100, max_attempts=1) as one,
        RewardClient(url, timeout=100, max_attempts=1, model=JUDGE.ensemble) as two,
        ThreadPoolExecutor(8) as pool,
    ):
        expected = [client.score_responses(ASK[:1], ["0"]) for client in (one, two)]
        fault(slow, "delay", "0.5")
        flight = [
            pool.submit(client.score_responses, ASK[:1], [f"{number}"])
            for number in range(4) for client in (one, two)
        ]  # fmt: skip
        with triton.InferenceServerClient(url) as raw:
            wait_until(lambda: all(accepted(raw, n.preprocess) >= 5 for n in names))
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not any(raw.is_model_ready(n.ensemble, v) for n, v in
                                       ((REWARD, "1"), (JUDGE, pinned(slow, JUDGE)))))  # fmt: skip
        for client in (one, two):
            with pytest.raises(ServerUnavailable, match="shutting down"):
                client.score(ASK)
        scores = [call.result(timeout=100) for call in flight]
    assert server.wait() == 0
    assert scores[:2] == [pytest.approx(each, rel=1e-5) for each in expected]
    assert_gone(family)


def _processes(server: TritonServer, names: ModelNames) -> set[int]:
    """Of one model's steps."""
    return {p.pid for step in names.steps for p in model_processes(server.pid, f"/{step}/")}
