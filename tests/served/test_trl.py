"""TRL's own trainers with images, on the CPU, with their rewards from a real Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import psutil
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from tests.conftest import Served, brief
from tests.conversations import image, picture, user
from triward import RewardClient, ServerUnavailable
from triward.integrations.trl import TriwardReward
from triward_server.serving.launch import TritonServer

pytestmark = pytest.mark.slow

STEPS, ROWS = 2, 2
PICTURES = {f"What is in picture {n}?": picture(64, 48, n) for n in range(STEPS * ROWS)}

# Trainer, configuration, the column of its images, the name of its limit, completions of a prompt.
KINDS = {
    "GRPO": (GRPOTrainer, GRPOConfig, "images", "max_completion_length", 2),
    "RLOO": (RLOOTrainer, RLOOConfig, "images", "max_completion_length", 2),
    "RLOO, one column": (RLOOTrainer, RLOOConfig, "image", "max_completion_length", 2),
    "OnlineDPO": (OnlineDPOTrainer, OnlineDPOConfig, "image", "max_new_tokens", 2),
}


class Recorded(TriwardReward):
    """Keeps what the trainer asked and was answered.

    Args:
        client: whom to ask.
        victim: a server that goes before the second step's rewards are asked for.
    """

    def __init__(self, client: RewardClient, victim: TritonServer | None = None) -> None:
        super().__init__(client)
        self.victim = victim
        self.batches: list[tuple[list[Any], list[Any], list[float]]] = []

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        if self.victim and self.batches:
            psutil.Process(self.victim.pid).kill()
        rewards = super().__call__(prompts, completions, **columns)
        self.batches.append((prompts, completions, rewards))
        return rewards


@pytest.fixture(params=KINDS)
def train(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path
) -> Callable[[TriwardReward], Trainer]:
    """Makes one of the trainers, with the tiny reward model's backbone as a policy."""
    trainer, configuration, column, limit, completions = KINDS[request.param]

    def make(reward: TriwardReward) -> Trainer:
        processor = AutoProcessor.from_pretrained(checkpoint, padding_side="left")
        tokenizer = processor.tokenizer
        # A random policy would write placeholders of images, and ids that stand for nothing.
        last = AutoConfig.from_pretrained(checkpoint).get_text_config().vocab_size
        media = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        suppressed = tokenizer.convert_tokens_to_ids(media) + list(range(len(tokenizer), last))
        grouped = trainer is not OnlineDPOTrainer
        settings: dict[str, Any] = {
            "per_device_train_batch_size": ROWS * completions if grouped else ROWS,
            limit: 12,
            "generation_kwargs": {"suppress_tokens": suppressed},
            **({"num_generations": completions} if grouped else {}),
        }
        dataset = Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": question}] for question in PICTURES],
                column: [[p] if column == "images" else p for p in PICTURES.values()],
            }
        )
        return trainer(
            model=AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32),
            reward_funcs=reward, train_dataset=dataset, processing_class=processor,
            args=configuration(
                output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none",
                save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, max_steps=STEPS,
                **settings,
            ),
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def exact(served: Callable[..., Served]) -> Served:
    """A model whose scores do not depend on what is asked beside it, in their last bit either."""
    return served("trainers", "--deterministic")


def test_rewards_are_scores(train: Callable[[TriwardReward], Trainer], exact: Served) -> None:
    reward = Recorded(exact.client)
    train(reward).train()
    assert len(reward.batches) == STEPS
    scores, blind = [], []
    for prompts, completions, rewards in reward.batches:
        assert len(rewards) == 2 * ROWS
        for prompt, completion, got in zip(prompts, completions, rewards, strict=True):
            question = prompt[0]["content"][-1]["text"]
            shown = user(image(PICTURES[question]), question)
            assert got == exact.client.score([shown, *completion])
            scores.append(got)
            blind.append(exact.client.score([user(question), *completion]))
    assert len(set(scores)) > ROWS
    assert all(score != other for score, other in zip(scores, blind, strict=True))


def test_a_server_that_dies_ends_the_training(
    train: Callable[[TriwardReward], Trainer], echo_repository: Path, tmp_path: Path
) -> None:
    with (
        brief(echo_repository, tmp_path / "triton.log") as server,
        RewardClient(server.endpoints.grpc, timeout=20, max_attempts=2) as client,
    ):
        reward = Recorded(client, server)
        trainer = train(reward)
        with pytest.raises(ServerUnavailable):
            trainer.train()
    assert len(reward.batches) == 1, "rewards were made up"
    assert trainer.state.global_step == 1
