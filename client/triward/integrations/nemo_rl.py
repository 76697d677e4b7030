"""An environment for NeMo-RL: one turn, whose reward is the score.

What is scored is the prompt's messages with the assistant's text behind them. NeMo-RL's message log
holds the prompt as the policy's chat template rendered it, without images. So the messages are
taken from the row's `extra_env_info`, as `messages` and `images`; or, for text in ChatML, from the
log. A failure raises a `TriwardError`, which ends the step.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from triward.client import RewardClient
from triward.errors import InvalidRequest
from triward.integrations.prompts import Rollout, rollouts

_interfaces: Any = importlib.import_module("nemo_rl.environments.interfaces")


class TriwardEnvironment(_interfaces.EnvironmentInterface):  # type: ignore[misc]
    """An EnvironmentInterface; `ray.remote` makes the actor of it.

    Args:
        config: `RewardClient`'s arguments, such as `url`; the environment's section in `env`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:  # noqa: D107 - the class says it
        self._client = RewardClient(**config)

    def step(
        self,
        message_log_batch: Sequence[Sequence[Mapping[str, Any]]],
        metadata: Sequence[Mapping[str, Any] | None],
    ) -> Any:
        """Return an EnvironmentReturn with the reward of each log's last message; the end.

        Args:
            message_log_batch: conversations, each of which ends with the assistant's message.
            metadata: of each, its `extra_env_info`.

        Raises:
            TriwardError: one has no score; the message names it.
        """
        torch: Any = importlib.import_module("torch")
        scores = self._client.score_many(rollouts(_rollouts(message_log_batch, metadata)))
        rewards = torch.tensor(scores, dtype=torch.float32)
        return _interfaces.EnvironmentReturn(
            observations=[{"role": "environment", "content": ""} for _ in scores],
            metadata=list(metadata),
            next_stop_strings=[None] * len(scores),
            rewards=rewards,
            terminateds=torch.ones_like(rewards),
            answers=None,
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """Return the batch as it is, and the mean reward."""
        return batch, {"mean_reward": float(batch["rewards"].float().mean())}

    def shutdown(self) -> None:
        """Close the connections."""
        self._client.close()


def _rollouts(
    logs: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Mapping[str, Any] | None]
) -> Iterator[Rollout]:
    for index, (log, row) in enumerate(zip(logs, metadata, strict=True)):
        if not log or log[-1]["role"] != "assistant":
            raise InvalidRequest(f"message_log_batch[{index}]: the last must be the assistant's")
        told = row or {}
        prompt = told.get("messages")
        if prompt is None:
            prompt = "".join(str(message["content"]) for message in log[:-1])
        images = told.get("images")
        yield prompt, str(log[-1]["content"]), [] if images is None else images
