"""TRL's own GRPOTrainer, on the CPU, with its rewards from a real Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from tests.conversations import picture
from tests.tools.gateways import Doorway, running
from triward import AsyncRewardClient, RewardClient, ServerUnavailable
from triward.integrations.trl import TriwardReward, async_triward_reward
from triward.rewards import RunningMoments, Shape
from triward_server.serving.launch import TritonServer
from triward_server.testing.oracle import fp32_budget

pytestmark = pytest.mark.slow

STEPS, PROMPTS, GENERATIONS = 3, 2, 4  # prompts of each step, completions of each prompt
QUESTIONS = [f"What is {n} + {n}? Take your time, and answer in one word." for n in range(8)]
Metric = Callable[[str, str], float]


class Recorded(TriwardReward):
    """Keeps what the trainer asked and was answered."""

    def __init__(self, client: RewardClient, shape: Shape | None = None) -> None:
        super().__init__(client, shape=shape)
        self.batches: list[tuple[list[Any], list[Any], list[float]]] = []

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        rewards = super().__call__(prompts, completions, **columns)
        self.batches.append((prompts, completions, rewards))
        return rewards


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path) -> Callable[..., GRPOConfig]:
    def make(**changes: Any) -> GRPOConfig:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        # A random policy would write placeholders of images, and ids that stand for nothing.
        last = AutoConfig.from_pretrained(checkpoint).get_text_config().vocab_size
        media = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        suppressed = tokenizer.convert_tokens_to_ids(media) + list(range(len(tokenizer), last))
        settings: dict[str, Any] = {
            "max_steps": STEPS,
            "per_device_train_batch_size": PROMPTS * GENERATIONS,
            "num_generations": GENERATIONS,
            "max_completion_length": 12,
            "generation_kwargs": {"suppress_tokens": suppressed},
        }
        return GRPOConfig(
            output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, **settings, **changes,
        )  # fmt: skip

    return make


@pytest.fixture
def policy(checkpoint: Path) -> Qwen2ForCausalLM:
    """Text only."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


@pytest.fixture
def trainer_of(
    policy: Qwen2ForCausalLM, checkpoint: Path, arguments: Callable[..., GRPOConfig]
) -> Callable[[Any], GRPOTrainer]:
    """Makes the trainer of the text policy with a reward function."""

    def make(reward: Any) -> GRPOTrainer:
        prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
        return GRPOTrainer(
            policy, reward, args=arguments(), train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(checkpoint, padding_side="left"),
        )  # fmt: skip

    return make


@pytest.fixture
def processor(checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(checkpoint, padding_side="left")


@pytest.fixture
def gained(metric: Metric) -> Callable[[], tuple[float, float]]:
    """Requests that the ensemble answered, and tokens it was spared, since the test began."""

    def read() -> tuple[float, float]:
        requests = metric("nv_inference_request_success", "reward")
        return requests, metric("triward_tokens_saved_total", "reward_forward")

    start = read()

    def since() -> tuple[float, float]:
        requests, tokens = read()
        return requests - start[0], tokens - start[1]

    return since


def assert_logged(trainer: GRPOTrainer, name: str, steps: list[list[float]]) -> None:
    """TRL's log holds the mean and deviation of each step's rewards."""
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(log) == len(steps) == STEPS
    for entry, rewards in zip(log, steps, strict=True):
        assert len(rewards) == PROMPTS * GENERATIONS
        assert entry[f"rewards/{name}/mean"] == pytest.approx(mean(rewards), abs=1e-3)
        assert entry[f"rewards/{name}/std"] == pytest.approx(stdev(rewards), abs=1e-3)
        assert entry["reward_std"] > 1e-3, "all completions got one reward: nothing is compared"


def test_text(
    client: RewardClient,
    trainer_of: Callable[[Any], GRPOTrainer],
    gained: Callable[[], tuple[float, float]],
) -> None:
    reward = Recorded(client)
    trainer = trainer_of(reward)
    trainer.train()

    requests, saved = gained()
    assert requests == STEPS * PROMPTS < STEPS * PROMPTS * GENERATIONS
    assert saved > 0
    alone = []
    for asked, completions, rewards in reward.batches:
        pairs = zip(asked, completions, strict=True)
        alone.append([client.score([*prompt, *completion]) for prompt, completion in pairs])
        for got, expected in zip(rewards, alone[-1], strict=True):
            assert got == pytest.approx(expected, abs=fp32_budget(expected))
    assert_logged(trainer, "triward", alone)


def through(door: Doorway, checkpoint: Path) -> Callable[..., list[float]]:
    """A reward function that asks OpenRLHF's door with rendered prompts, and keeps its rewards."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def gateway(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in prompts
        ]
        pairs = zip(texts, completions, strict=True)
        query = [text + completion[0]["content"] for text, completion in pairs]
        body = {"query": query, "prompts": texts, "labels": [None] * len(texts)}
        status, answer = door.ask("/get_reward", body)
        if status != 200:
            raise ConnectionError(f"{status}: {answer}")
        batches.append((prompts, completions, answer["rewards"]))
        return list(answer["rewards"])

    batches: list[tuple[list[Any], list[Any], list[float]]] = []
    gateway.batches = batches  # type: ignore[attr-defined]
    return gateway


def test_through_the_gateway(
    server: TritonServer,
    client: RewardClient,
    checkpoint: Path,
    trainer_of: Callable[[Any], GRPOTrainer],
    gained: Callable[[], tuple[float, float]],
) -> None:
    """Its rewards are the client's, and a prompt's completions are one request there, too."""
    with running(server.endpoints.grpc, timeout=120.0) as door:
        reward: Any = through(door, checkpoint)
        trainer = trainer_of(reward)
        trainer.train()
        counters = door.gateway.counters

    assert gained()[0] == STEPS * PROMPTS
    assert counters.requests == {("openrlhf", 200): STEPS}
    assert counters.scores["openrlhf"] == STEPS * PROMPTS * GENERATIONS
    alone = []
    for asked, completions, rewards in reward.batches:
        pairs = zip(asked, completions, strict=True)
        alone.append([client.score([*prompt, *completion]) for prompt, completion in pairs])
        for got, expected in zip(rewards, alone[-1], strict=True):
            assert got == pytest.approx(expected, abs=fp32_budget(expected))
    assert_logged(trainer, "gateway", alone)


def test_a_gateway_whose_server_is_gone_ends_the_training(
    checkpoint: Path, trainer_of: Callable[[Any], GRPOTrainer]
) -> None:
    with running("127.0.0.1:1", timeout=5.0) as door:
        trainer = trainer_of(through(door, checkpoint))
        with pytest.raises(ConnectionError, match="503"):
            trainer.train()
    assert [entry for entry in trainer.state.log_history if "reward" in entry] == []


def test_a_shape(client: RewardClient, trainer_of: Callable[[Any], GRPOTrainer]) -> None:
    reward = Recorded(client, Shape(running=RunningMoments(), clip=(-0.5, 0.5), weight=2.0))
    trainer = trainer_of(reward)
    trainer.train()

    seen: list[float] = []
    steps = []
    for asked, completions, rewards in reward.batches:
        pairs = zip(asked, completions, strict=True)
        scores = [client.score([*prompt, *completion]) for prompt, completion in pairs]
        seen += scores
        deviation = stdev(seen)
        steps.append(
            [2 * min(max((s - mean(seen)) / (deviation + 1e-4), -0.5), 0.5) for s in scores]
        )
        for got, expected, score in zip(rewards, steps[-1], scores, strict=True):
            assert got == pytest.approx(expected, abs=4 * fp32_budget(score) / deviation)
    assert {-1.0, 1.0} < {reward for step in steps for reward in step}, "nothing was clipped"
    assert_logged(trainer, "triward", steps)


def test_pixels(
    server: TritonServer,
    client: RewardClient,
    checkpoint: Path,
    processor: Any,
    arguments: Callable[..., GRPOConfig],
    gained: Callable[[], tuple[float, float]],
) -> None:
    """The tiny reward model's backbone as a policy, and the coroutine reward function."""
    ask = async_triward_reward(AsyncRewardClient(server.endpoints.grpc, timeout=120))
    batches: list[tuple[list[Any], list[Any], list[float]]] = []

    async def recorded(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        rewards = await ask(prompts=prompts, completions=completions, **columns)
        batches.append((prompts, completions, rewards))
        return rewards

    dataset = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": question}] for question in QUESTIONS],
            "images": [[picture(64, 48, seed)] for seed in range(len(QUESTIONS))],
        }
    )
    trainer = GRPOTrainer(
        AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32),
        recorded, args=arguments(), train_dataset=dataset, processing_class=processor,
    )  # fmt: skip
    trainer.train()

    requests, saved = gained()
    assert requests == STEPS * PROMPTS < STEPS * PROMPTS * GENERATIONS
    assert saved > 0
    alone, differences = [], []
    for asked, completions, rewards in batches:
        scores = []
        for prompt, completion, got in zip(asked, completions, rewards, strict=True):
            shown = [part for message in prompt for part in message["content"] if "image" in part]
            assert len(shown) == 1
            scores.append(client.score([*prompt, *completion]))
            assert got == pytest.approx(scores[-1], abs=fp32_budget(scores[-1]))
            blind = [{"role": "user", "content": prompt[0]["content"][-1:]}, *completion]
            differences.append(abs(client.score(blind) - got))
        alone.append(scores)
    assert mean(differences) > 0.1, "the images changed nothing"
    assert_logged(trainer, "recorded", alone)


def test_a_failure_ends_the_training(trainer_of: Callable[[Any], GRPOTrainer]) -> None:
    with RewardClient("127.0.0.1:1", max_attempts=1) as nobody:
        trainer = trainer_of(TriwardReward(nobody))
        with pytest.raises(ServerUnavailable):
            trainer.train()
    assert [entry for entry in trainer.state.log_history if "reward" in entry] == []
