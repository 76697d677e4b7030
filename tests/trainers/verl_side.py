"""A step of verl as far as its rewards: dataset, agent loop, reward loop. Runs in `.venv-trainers`.

    python tests/trainers/verl_side.py JOB.json

The job holds `overrides`, which verl's trainer would be given, `files` of the dataset, the policy's
`answers`, one for each rollout, and `folder`, where the results and signals lie. verl's own classes
do the step as its trainer calls them; the policy's server alone is a stand-in.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import ray
from hydra import compose, initialize_config_module
from verl import DataProto
from verl.experimental.agent_loop import AgentLoopManager
from verl.experimental.reward_loop import RewardLoopManager, RewardLoopWorker
from verl.trainer.ppo.reward import extract_reward
from verl.utils import hf_processor, hf_tokenizer
from verl.utils.dataset.rl_dataset import collate_fn, get_dataset_class
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput


class Answers(LLMServerClient):
    """In the place of vLLM's servers: the answer to the n-th rollout of a batch is the n-th.

    Args:
        config: verl's.
        answers: token ids.
        gate: a file; later rollouts wait until it is there.
        free: how many rollouts do not wait.
    """

    def __init__(self, config, answers, gate=None, free=0):
        super().__init__(config)
        self.answers = answers
        self.gate = gate
        self.free = free

    async def generate(self, request_id, *, prompt_ids, priority=0, **others):
        if self.gate and priority >= self.free:
            await arrived(self.gate)
        return TokenOutput(token_ids=self.answers[priority], stop_reason="completed")


async def arrived(file):
    while not Path(file).exists():
        await asyncio.sleep(0.05)


def composed(overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=overrides)


class Step:
    """What verl's RayPPOTrainer has before its first step, without models."""

    def __init__(self, job):
        self.config = config = composed(job["overrides"])
        path = config.actor_rollout_ref.model.path
        self.tokenizer, self.processor = hf_tokenizer(path), hf_processor(path)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.answers = [
            [*self.tokenizer.encode(text, add_special_tokens=False), end] for text in job["answers"]
        ]
        self.rewards = RewardLoopManager(config)

    def rollouts(self, files):
        """The batch of all rows of files, as the trainer makes it before it generates."""
        rows = []
        for file in (self.config.data.train_files, *files):
            dataset = get_dataset_class(self.config.data)(
                [file], self.tokenizer, self.config.data, self.processor
            )
            rows += [dataset[index] for index in range(len(dataset))]
        batch = DataProto.from_single_dict(collate_fn(rows))
        uids = [str(uuid.uuid4()) for _ in range(len(batch))]
        batch.non_tensor_batch["uid"] = np.array(uids, dtype=object)
        return batch.repeat(repeat_times=self.config.actor_rollout_ref.rollout.n, interleave=True)

    def generate(self, batch, gate=None, free=0):
        """The agent loop's batch; its reward workers score each rollout when it ends."""
        agents = AgentLoopManager.create(
            config=self.config,
            llm_client=Answers(self.config, self.answers, gate, free),
            reward_loop_worker_handles=self.rewards.reward_loop_worker_handles,
        )
        return agents.generate_sequences(DataProto(batch.batch, {**batch.non_tensor_batch}, {}))


def score(step, batch, variants):
    """A batch's rewards by the agent loop, by the manager, and as other settings have them."""
    generated = step.generate(batch)
    streamed, extra = extract_reward(generated)
    lengths = generated.batch["attention_mask"][:, -streamed.shape[1] :].sum(dim=1)
    again = generated.pop(batch_keys=["prompts", "responses", "attention_mask"],
                          non_tensor_batch_keys=["raw_prompt"])  # fmt: skip
    again.non_tensor_batch |= {
        key: batch.non_tensor_batch[key] for key in ("data_source", "reward_model", "extra_info")
    }
    managed = step.rewards.compute_rm_score(again).batch["rm_scores"]
    return {
        "indices": [info["index"] for info in batch.non_tensor_batch["extra_info"]],
        "prompts": [described(prompt) for prompt in batch.non_tensor_batch["raw_prompt"]],
        "streamed": streamed.sum(dim=1).tolist(),
        "managed": managed.sum(dim=1).tolist(),
        "variants": [asyncio.run(variant(settings, again)) for settings in variants],
        "places": [row.nonzero().flatten().tolist() for row in streamed],
        "lengths": lengths.tolist(),
        "extra": {key: list(map(float, values)) for key, values in extra.items()},
    }


async def variant(overrides, batch):
    """The rewards of the rows that repeat their prompt in a column, as functions need it."""
    columns = batch.non_tensor_batch["extra_info"]
    fit = [row for row, column in enumerate(columns) if "prompt" in column]
    worker = RewardLoopWorker(composed(overrides))
    return [found["reward_score"] for found in await worker.compute_score_batch(batch[fit])]


def described(messages):
    """The keys and kinds of each part that verl's dataset made."""
    contents = [message["content"] for message in messages]
    return [
        content if isinstance(content, str)
        else [{key: type(value).__name__ for key, value in part.items()} for part in content]
        for content in contents
    ]  # fmt: skip


def interrupted(step, batch, folder, free):
    """How a step ends whose reward server goes after the first rewards."""
    while not (folder / "go").exists():
        time.sleep(0.05)
    try:
        generated = step.generate(batch, str(folder / "gone"), free)
    except Exception as error:
        return {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    return {"rewards": extract_reward(generated)[0].sum(dim=1).tolist()}


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    ray.init(
        num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, _temp_dir=job["ray"]
    )
    step = Step(job)
    batch = step.rollouts(job["files"])
    write(folder / "scored.json", score(step, batch, job["variants"]))
    write(folder / "interrupted.json", interrupted(step, batch, folder, job["free"]))
    ray.shutdown()


def write(path, content):
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main()
