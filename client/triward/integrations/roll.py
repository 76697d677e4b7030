"""A reward worker for ROLL's RLVR pipelines.

    class Reward(TriwardRewardWorker):
        settings = {"url": "rewards:8001"}

What is scored is the row's `messages`, or else its `prompt` in ChatML, with the response behind
them. Images come from `multi_modal_data`, or from the row's `images`. A failure raises a
`TriwardError`, which ends the step.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from triward.client import RewardClient
from triward.errors import InvalidRequest
from triward.integrations.prompts import Rollout, rollouts

_decorator: Any = importlib.import_module("roll.distributed.scheduler.decorator")
_protocol: Any = importlib.import_module("roll.distributed.scheduler.protocol")
_providers: Any = importlib.import_module("roll.models.model_providers")
_Worker: Any = importlib.import_module("roll.distributed.executor.worker").Worker


class TriwardRewardWorker(_Worker):  # type: ignore[misc]
    """A Worker. Make a class of it with the server's address, and name that as `worker_cls`.

    Attributes:
        settings: `RewardClient`'s arguments.

    Args:
        worker_config: ROLL's; its `model_args` name the policy's tokenizer.
    """

    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, worker_config: Any) -> None:  # noqa: D107 - the class says it
        super().__init__(worker_config=worker_config)
        self.rank_info.dp_rank = self.rank_info.rank
        self.rank_info.dp_size = self.rank_info.world_size
        self.tokenizer = _providers.default_tokenizer_provider(model_args=worker_config.model_args)
        self._client = RewardClient(**self.settings)

    @_decorator.register(dispatch_mode=_decorator.Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def initialize(self, pipeline_config: Any) -> None:
        """Do nothing: there is no model here."""

    @_decorator.register(  # type: ignore[untyped-decorator]
        dispatch_mode=_decorator.Dispatch.DP_MP_COMPUTE, clear_cache=False
    )
    def compute_rewards(self, data: Any) -> Any:
        """Return the rewards of a batch as `response_level_rewards` and `scores`, float32 [N].

        Args:
            data: a DataProto.

        Raises:
            TriwardError: a row has no score; the message names it.
        """
        torch: Any = importlib.import_module("torch")
        responses = data.batch["responses"]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        found = self._client.score_many(rollouts(_rollouts(data.non_tensor_batch, texts)))
        rewards = torch.tensor(found, dtype=torch.float32)
        return _protocol.DataProto.from_dict(
            tensors={
                "token_level_rewards": torch.zeros_like(responses, dtype=torch.float32),
                "response_level_rewards": rewards,
                "scores": rewards.clone(),
            }
        )


def _rollouts(fields: Mapping[str, Any], texts: list[str]) -> Iterator[Rollout]:
    for row, text in enumerate(texts):
        messages = fields["messages"][row] if "messages" in fields else None
        if isinstance(messages, str):
            messages = json.loads(messages)
        if messages is None and "prompt" not in fields:
            raise InvalidRequest("data: a row needs 'messages' or 'prompt'")
        prompt = fields["prompt"][row] if messages is None else list(messages)
        yield prompt, text, _images(fields, row)


def _images(fields: Mapping[str, Any], row: int) -> list[Any]:
    """Return a row's images, as ROLL's collator left them for vLLM, or as the dataset has them."""
    for name in ("multi_modal_data", "images"):
        held = fields[name][row] if name in fields else None
        while isinstance(held, Mapping) and not {"bytes", "path"} & held.keys():
            held = held.get("multi_modal_data", held.get("image"))
        if held is not None:
            return list(held) if isinstance(held, (list, tuple)) else [held]
    return []
