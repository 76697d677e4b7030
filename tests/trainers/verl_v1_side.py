"""Steps of verl's trainer V1 up to the batch that it trains on. Runs in `.venv-trainers`.

    python tests/trainers/verl_v1_side.py JOB.json

The job is that of verl_side.py, with further `options`: those of each step. The trainer's own
methods take prompts from its loader, hand them to its agent loop, sample the batch from
TransferQueue, and compute its advantages.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray
import transfer_queue as tq
from torch.utils.data import DataLoader
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, get_trainer_cls
from verl.utils.dataset.rl_dataset import collate_fn, get_dataset_class
from verl.workers.rollout.replica import TokenOutput

from tests.trainers.verl_side import Answers, Step, arrived, composed, write


class Phases(Answers):
    """Answers in the order in which it is asked, from the first again for each step.

    From the second step on all but the first `free` rollouts wait for the gate.
    """

    count = 0

    async def generate(self, request_id, *, prompt_ids, **others):
        phase, place = divmod(self.count, len(self.answers))
        self.count += 1
        if phase and place >= self.free:
            await arrived(self.gate)
        return TokenOutput(token_ids=self.answers[place], stop_reason="completed")


class Trainer(Step):
    """verl's trainer without models, and its agent loop."""

    def __init__(self, job):
        super().__init__(job)
        self.config.transfer_queue.enable = True
        tq.init(self.config.transfer_queue)
        self.data = get_dataset_class(self.config.data)(
            [self.config.data.train_files, *job["files"]],
            self.tokenizer, self.config.data, self.processor,
        )  # fmt: skip
        self.agents = AgentLoopManagerTQ.create(
            config=self.config,
            llm_client=Phases(self.config, self.answers, f"{job['folder']}/gone", job["free"]),
            reward_loop_worker_handles=self.rewards.reward_loop_worker_handles,
        )

    def step(self, number, config):
        """The rollouts of the batch that a step would train on, or its error."""
        trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
        trainer.agent_loop_manager, trainer.global_steps = self.agents, number
        size = config.data.train_batch_size
        trainer.train_dataloader = DataLoader(self.data, size, collate_fn=collate_fn)
        trainer.train_dataloader_it = None
        prompts = trainer._next_train_batch()
        indices = dict(zip(prompts["uid"], prompts["index"], strict=True))
        trainer._submit_batch_to_rollout(prompts)
        try:
            batch, _ = trainer.replay_buffer.sample(number, "train", size)
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}
        trainer._compute_advantage(batch, {})
        fields = ["rm_scores", "responses", "advantages"]
        found = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=fields)
        tq.kv_clear(keys=batch.keys, partition_id="train")
        decode = self.tokenizer.decode
        return {
            "indices": [int(indices[key.split("_")[0]]) for key in batch.keys],
            "answers": [decode(ids, skip_special_tokens=True) for ids in found["responses"]],
            "rewards": [float(scores.sum()) for scores in found["rm_scores"]],
            "advantages": [float(values[0]) for values in found["advantages"]],
        }


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    ray.init(
        num_cpus=8, object_store_memory=100 * 2**20, include_dashboard=False, _temp_dir=job["ray"]
    )
    trainer = Trainer(job)
    for number, options in enumerate(job["options"]):
        if number == 1:
            while not (folder / "go").exists():
                time.sleep(0.05)
        config = composed([*job["overrides"], *options])
        write(folder / f"step{number}.json", trainer.step(number, config))
    tq.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
