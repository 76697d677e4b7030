"""A server stands by what it has loaded: broken versions beside it, and its folder's end."""

from __future__ import annotations

import os
import shutil
import signal
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tritonclient.grpc as triton

from tests.asking import ASK, accepted, conversation, ready, wait_until
from tests.commands import Command, assert_gone
from tests.conftest import Exit
from triward import RewardClient, ServerUnavailable
from triward_server.schema import ModelNames
from triward_server.testing.echo import fault, make_echo

MODELS = ("reward", "reward_preprocess", "reward_forward")


@pytest.fixture
def damaged(
    echo_repository: Path, checkpoint: Path, export: Callable[..., Exit], tmp_path: Path
) -> Path:
    """Two models; version 1 of each is served, and beside them stands what cannot be."""
    folder = Path(shutil.copytree(echo_repository, tmp_path / "models"))
    result = export(
        "--checkpoint", checkpoint, "--output", folder, "--name=judge", "--device=cpu",
        "--dtype=float32", "--preprocess-instances=1", "--threads=1", "--no-canary", "--no-verify",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    make_echo(folder, ModelNames("judge"))
    for model in (*MODELS, "judge", "judge_preprocess", "judge_forward"):
        shutil.copytree(folder / model / "1", folder / model / "3")
    os.truncate(folder / "reward_forward/3/checkpoint/model-00001-of-00004.safetensors", 9999)
    (folder / "judge_preprocess/3/checkpoint/tokenizer.json").unlink()
    for model in MODELS:
        (folder / model / "4").mkdir()
    return folder


def test_what_nobody_serves_may_be_broken_and_the_folder_may_go(
    damaged: Path, serve: Callable[..., Command], echo: RewardClient
) -> None:
    """It starts, names what is broken, loads what is served; and finishes without its folder."""
    prompts = [conversation(number)[:1] for number in range(6)]
    expected = [echo.score_responses(prompt, ["yes", "no"]) for prompt in prompts]
    running = serve("--drain-timeout=100", repository=damaged)
    url = ready(running)
    assert "judge: version 3 is broken, and not served: judge_preprocess/3/" in running.output
    words = "reward: version 3 is broken, and not served: reward_forward/3/checkpoint/model-00001"
    assert words in running.output and "9,999 bytes" in running.output
    assert "reward: version 4 is broken, and not served: reward/4/manifest" in running.output
    assert "reward: version 1: " in running.output and "verified (sampled)" in running.output
    family = running.family()
    shutil.rmtree(damaged)
    metrics = running.wait_for(r"metrics\s+(http://\S+)")[1]
    asked = [canaries(metrics, model) for model in ("reward", "judge")]
    with (
        RewardClient(url, timeout=100, max_attempts=1) as asking,
        RewardClient(url, timeout=100, max_attempts=1, model="judge") as judge,
        ThreadPoolExecutor(6) as pool,
    ):
        for model, count in zip(("reward", "judge"), asked, strict=True):
            wait_until(lambda model=model, count=count: canaries(metrics, model) >= count + 3)
        assert asking.score(ASK) == pytest.approx(echo.score(ASK), rel=1e-5)
        assert judge.score(ASK) == pytest.approx(echo.score(ASK), rel=1e-5)
        fault(damaged, "delay", "0.5")
        with triton.InferenceServerClient(url) as raw:
            before = accepted(raw)
            flight = [pool.submit(asking.score_responses, each, ["yes", "no"]) for each in prompts]
            wait_until(lambda: accepted(raw) >= before + len(prompts))
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not raw.is_model_ready("reward", "1"))
        with pytest.raises(ServerUnavailable, match="shutting down"):
            asking.score(ASK)
        scores = [call.result(timeout=100) for call in flight]
    assert running.wait() == 0, running.output
    assert "cannot drain" not in running.output
    for got, wanted in zip(scores, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert_gone(family)


def test_a_wrong_score_is_noticed_without_the_folder(
    serve: Callable[..., Command], faulty: Path
) -> None:
    running = serve(repository=faulty)
    ready(running)
    metrics = running.wait_for(r"metrics\s+(http://\S+)")[1]
    family = running.family()
    shutil.rmtree(faulty)
    count = canaries(metrics, "reward")
    wait_until(lambda: canaries(metrics, "reward") >= count + 2)
    fault(faulty, "drift", "0.5")
    assert running.wait() == 1
    assert "the canary scores" in running.output.splitlines()[-1]
    assert_gone(family)


def canaries(metrics: str, model: str) -> int:
    """Requests that a public model has answered; of a quiet one these are canaries."""
    with urllib.request.urlopen(metrics, timeout=10) as response:
        lines = response.read().decode().splitlines()
    name = f'nv_inference_request_success{{model="{model}",'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))
