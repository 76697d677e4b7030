"""A replay buffer for verl's trainer V1 that ends a training when rollouts have no reward.

    trainer.v1.sampler.custom_sampler.path=pkg://triward.integrations.verl_replay
    trainer.v1.sampler.custom_sampler.name=StrictReplayBuffer

verl's own writes what failed to its log, and a step trains on the rollouts that are left. This
module imports verl (0.9).
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class RolloutsFailed(RuntimeError):
    """Rollouts of a step have no reward, or failed before it."""


class StrictReplayBuffer(ReplayBuffer):  # type: ignore[misc]  # verl is not there for mypy
    """verl's buffer for `trainer.v1.trainer_mode=sync`, whose batches are whole.

    verl passes no group filter (`algorithm.filter_groups`) to a buffer that it is given.
    """

    def sample(
        self, global_steps: int, partition_id: str, batch_size: int
    ) -> tuple[Any, dict[str, Any]]:
        """Return a batch as verl's own does.

        Raises:
            RolloutsFailed: a rollout failed.
        """
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if failed := len(self.failure_keys[partition_id]):
            raise RolloutsFailed(
                f"step {global_steps}: rollouts of {failed} prompts out of {batch_size} failed; "
                "the log of the agent loop's workers has the reasons"
            )
        return batch, metrics
