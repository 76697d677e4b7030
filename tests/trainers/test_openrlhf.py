"""OpenRLHF's own data, rollout actor, samples, experience and advantages, with a Triton's rewards.

Stand-ins are vLLM's engine, whose answers are given, DeepSpeed and flash-attn, which are imported
only, and the policy's forward pass: every token has the log-probability 0. No model is trained.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Command
from tests.conversations import picture, says
from tests.trainers.conftest import Page, Side
from triward import RewardClient
from triward_server.serving.launch import TritonServer

pytestmark = pytest.mark.slow

PAGE = Page("openrlhf.md")
GROUP = 8  # as the page's train.sh has it
FREE = 2  # rollouts with a reward before the server goes


@pytest.fixture
def arguments(
    checkpoint: Path, mortal: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """What the page's train.sh passes, with its data and its reward function in files."""
    monkeypatch.chdir(tmp_path)
    picture(64, 48, 1).save("chart.png")
    chart = str(tmp_path / "chart.png")
    exec(PAGE.code("python", "# data.py").replace("/data/chart.png", chart), {})
    reward = PAGE.code("python", "# reward.py").replace("rewards:8001", mortal.endpoints.grpc)
    (tmp_path / "reward.py").write_text(reward)
    places = {
        "/path/to/reward.py": str(tmp_path / "reward.py"),
        "Qwen/Qwen2.5-VL-3B-Instruct": str(checkpoint),
    }
    words = PAGE.words("train_ppo_ray")
    begun = words.index("openrlhf.cli.train_ppo_ray")
    return [places.get(word, word) for word in words[begun + 1 :]]


@pytest.fixture
def http(command: Callable[..., Command], mortal: TritonServer) -> str:
    """The address of the page's HTTP server."""
    door = command(
        sys.executable, "-m", "triward.integrations.openrlhf",
        "--url", mortal.endpoints.grpc, "--port", 0,
    )  # fmt: skip
    return door.wait_for(r"listening on (\S+)")[1]


def test_a_step(
    side: Callable[..., Side], arguments: list[str], http: str, mortal: TritonServer,
    asked: RewardClient,
) -> None:  # fmt: skip
    place = arguments.index("--reward.remote_url") + 1
    over_http = [*arguments[:place], http, *arguments[place + 1 :]]
    answers = [f"Answer {n}." for n in range(2 * GROUP)]
    running = side(
        "openrlhf_side.py", stubs=True, function=arguments, http=over_http, answers=answers,
        free=FREE,
    )  # fmt: skip

    assert_rewarded(running.result("function.json"), answers, asked)
    assert_rewarded(running.result("http.json"), answers, asked)

    running.kill_after(mortal, requests=FREE)
    found = running.result("interrupted.json")
    assert "rewards" not in found, "made up"
    assert found["rewarded"] == FREE
    # By whether the first sample is among those without one.
    assert found["error"] in ("ValueError", "AttributeError")
    assert re.search("reward_model_group is required|'NoneType' object", found["message"])
    assert "Failed to fetch reward from remote RM" in running.finish()


def assert_rewarded(samples: list[dict[str, Any]], answers: list[str], asked: RewardClient) -> None:
    """Each sample's reward is its conversation's score; advantages are OpenRLHF's of those."""
    assert sorted(sample["answer"] for sample in samples) == sorted(answers)
    prompts = [json.loads(sample["label"])["messages"] for sample in samples]
    expected = [
        asked.score([*prompt, says(sample["answer"])])
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    assert len(set(expected)) == len(expected)
    assert [sample["reward"] for sample in samples] == [[score] for score in expected]
    assert [sample["score"] for sample in samples] == [[score] for score in expected]
    shown = [prompt for prompt in prompts if prompt[0]["content"][0]["type"] == "image"]
    assert len(shown) == GROUP

    groups = torch.tensor(expected).reshape(-1, GROUP)
    deviations = groups.std(-1, keepdim=True)
    advantages = ((groups - groups.mean(-1, keepdim=True)) / (deviations + 1e-9)).flatten()
    for n, sample in enumerate(samples):
        assert sample["group_std"] == pytest.approx([float(deviations[n // GROUP])])
        assert sample["advantages"] == pytest.approx(
            [float(advantages[n])] * len(sample["advantages"])
        )
        assert len(sample["advantages"]) > 1
