"""The echo repository keeps what the real one promises, and says that it is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import brief
from triward import RewardClient, ServerError
from triward_server.schema import REWARD
from triward_server.serving.canary import Canary
from triward_server.serving.integrity import Verify, check_version
from triward_server.serving.launch import TritonServer
from triward_server.serving.triton_http import read_metrics
from triward_server.serving.watchdog import check_once
from triward_server.testing.echo import fault, make_echo

PROMPT = [{"role": "user", "content": "Is it so?"}]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "triton.log"


@pytest.fixture(scope="module")
def own(build: Callable[..., Path]) -> Path:
    repository = build("--dtype=float32", "--no-canary", "--no-verify")
    make_echo(repository)
    return repository


@pytest.fixture(scope="module")
def running(own: Path, log: Path) -> Iterator[TritonServer]:
    with brief(own, log) as server:
        yield server


@pytest.fixture
def asking(running: TritonServer) -> Iterator[RewardClient]:
    with RewardClient(running.endpoints.grpc, timeout=20, max_attempts=1) as client:
        yield client


def test_each_answer_is_its_requests_own(asking: RewardClient) -> None:
    texts = [str(number) for number in range(40)]
    together = asking.score_responses(PROMPT, texts)
    assert len({*together}) == 40 and np.abs(together).max() <= 10
    alone = asking.score_many([[*PROMPT, {"role": "assistant", "content": t}] for t in texts])
    assert alone == together
    other = asking.score_responses([{"role": "user", "content": "Or so?"}], texts)
    assert not {*other} & {*together}


def test_it_says_what_it_is(running: TritonServer, own: Path, log: Path) -> None:
    assert log.read_text().count("is an ECHO for tests") == 3
    assert json.loads((own / "reward/1/manifest.json").read_text())["echo"] is True


def test_health_and_manifest_hold(running: TritonServer, own: Path) -> None:
    check_once(running.http, own, 20, deep=True)
    assert check_version(own, REWARD, "1", Verify.FULL).files > 3
    assert Canary.of(own, "1").scores


def test_faults_on_demand_and_metrics(
    running: TritonServer, own: Path, asking: RewardClient
) -> None:
    def read(name: str) -> float:
        page = read_metrics("127.0.0.1", running.endpoints.metrics_port, 10)
        return sum(each.value for each in page if each.name == name)

    before = read("triward_conversations_total"), read("triward_errors_total")
    right = asking.score_responses(PROMPT, ["a", "b"])
    assert read("triward_conversations_total") == before[0] + 2
    fault(own, "drift", "0.5")
    wrong = asking.score_responses(PROMPT, ["a", "b"])
    assert wrong == pytest.approx([each + 0.5 for each in right], rel=1e-5)
    fault(own, "error", "CUDA error")
    with pytest.raises(ServerError, match="CUDA error"):
        asking.score_responses(PROMPT, ["a"])
    assert read("triward_errors_total") == before[1] + 1


def test_its_processes_load_nothing_heavy() -> None:
    code = "import sys, triward_server.testing.echo_models; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"torch", "transformers", "PIL", "tritonclient"} & set(modules) == set()
