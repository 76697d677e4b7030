"""A step of OpenRLHF up to its advantages: data, rollouts, experience. Runs in `.venv-trainers`.

    python tests/trainers/openrlhf_side.py JOB.json

The job holds `arguments` of `train_ppo_ray`, the same with the reward's server for `http`, and
`folder`, where the results and signals lie. OpenRLHF's own classes do the step as its trainer calls
them; stubs/ has what stands in vLLM's place, and `Actors` is what stands in the policy's.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

import openrlhf.utils
import ray
import torch
from openrlhf.trainer.ppo_trainer import prepare_datasets
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray import create_vllm_engines
from openrlhf.utils.utils import get_tokenizer
from torch.utils.data import DataLoader


class Parsed(Exception):
    """Carries the arguments out of OpenRLHF's command."""


def parsed(arguments):
    """The arguments as `train_ppo_ray` has them when it begins to train."""

    def leave(args):
        raise Parsed(args)

    command, sys.argv = sys.argv, ["train_ppo_ray", *arguments]
    openrlhf.utils.get_strategy = leave
    try:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
    except Parsed as carrier:
        return carrier.args[0]
    finally:
        sys.argv = command


class Strategy:
    """In DeepspeedStrategy's place: the arguments, and a loader in the data's order."""

    def __init__(self, args):
        self.args = args
        self.print = print

    def is_rank_0(self):
        return True

    def setup_dataloader(self, data, batch_size, pin, shuffle, collate, num_workers=0, **others):
        return DataLoader(data, batch_size, shuffle=False, collate_fn=collate)


class Actors:
    """In the place of the policy's RayActorGroup: each token has log-probability 0."""

    def async_run_method_batch(self, method_name, action_mask, **others):
        assert method_name == "forward"
        return [ray.put([torch.zeros(mask.shape)]) for mask in action_mask]


class Step:
    """What OpenRLHF's trainer has before its first step, without models."""

    def __init__(self, arguments):
        self.args = args = parsed(arguments)
        self.strategy = Strategy(args)
        self.path = args.actor.model_name_or_path
        self.tokenizer = get_tokenizer(self.path, None, "left", self.strategy)
        loader, _, _ = prepare_datasets(self.strategy, self.tokenizer)
        engines = create_vllm_engines(
            args.vllm.num_engines, args.vllm.tensor_parallel_size, self.path, args.train.seed,
            False, False, True, args.data.max_len, remote_rm_url=args.reward.remote_url,
            max_images_per_prompt=args.data.max_images_per_prompt,
        )  # fmt: skip
        self.generator = SamplesGenerator(self.strategy, loader, None, self.tokenizer, engines)
        self.maker = RemoteExperienceMaker(
            Actors(), None, None, None, FixedKLController(0.0), self.strategy, self.tokenizer
        )

    def run(self):
        """The experience of the whole dataset."""
        samples, *_ = self.generator.generate_samples(
            max_len=self.args.data.max_len, max_new_tokens=64
        )
        rewards = [None if s.rewards is None else s.rewards.flatten().tolist() for s in samples]
        self.rewarded = sum(reward is not None for reward in rewards)
        return rewards, self.maker.make_experience_batch(samples)

    def described(self, sample, rewards):
        [ids], [mask] = sample.sequences, sample.action_mask
        answer = self.tokenizer.decode(ids[1:][mask.bool()], skip_special_tokens=True)
        return {
            "label": sample.labels[0], "answer": answer, "reward": rewards,
            "score": sample.scores.flatten().tolist(),
            "advantages": sample.advantages[0][mask.bool()].tolist(),
            "group_std": sample.info["group_reward_std"].flatten().tolist(),
        }  # fmt: skip


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    ray.init(
        num_cpus=6, num_gpus=3, object_store_memory=100 * 2**20, include_dashboard=False,
        _temp_dir=job["ray"],
    )  # fmt: skip
    answer(job, gate=folder)  # which is there
    for name in ("function", "http"):
        step = Step(job[name])
        rewards, made = step.run()
        described = [step.described(*pair) for pair in zip(made, rewards, strict=True)]
        write(folder / f"{name}.json", described)
    while not (folder / "go").exists():
        time.sleep(0.05)
    answer(job, gate=folder / "gone")
    write(folder / "interrupted.json", interrupted(job["function"]))
    ray.shutdown()


def answer(job, gate):
    """Tell the next engine what to answer, and what all but the first answers wait for."""
    plan = {"answers": job["answers"], "free": job["free"], "gate": str(gate)}
    Path(os.environ["TRIWARD_ANSWERS"]).write_text(json.dumps(plan))


def interrupted(arguments):
    """How a step ends whose reward server goes after the first rewards."""
    step = Step(arguments)
    try:
        rewards, _ = step.run()
    except Exception as error:
        name = type(error).__name__
        return {"rewarded": step.rewarded, "error": name, "message": str(error)}
    return {"rewards": rewards}


def write(path, content):
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main()
