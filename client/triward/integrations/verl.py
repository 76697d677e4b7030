"""Rewards for verl, in the forms in which it can ask for them.

- `compute_score` and `async_compute_score`: a custom reward function, called for each rollout.
- `TriwardRewardManager`: a manager of the reward loop, called for each rollout.
- `TriwardBatchRewardManager`: a manager of verl.workers.reward_manager, as verl had it before the
  reward loop. It is called with the batch, and asks for all rollouts of a prompt at once.

What is scored is the prompt's messages with the rollout behind them: the response's tokens, decoded
without special tokens, as one message of the assistant's. So it is, too, when the rollout took
several turns.

A manager finds the prompt in verl's `raw_prompt`, with its images. A function is not told the
prompt: the dataset has to repeat its columns `prompt` and `images` inside `extra_info`. A failure
raises a `TriwardError`; no reward is made up.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from triward.aio import AsyncRewardClient
from triward.channel import Url
from triward.client import RewardClient
from triward.conversation import Message, Messages
from triward.errors import InvalidRequest
from triward.integrations.images import placed
from triward.integrations.prompts import async_client_of, client_of
from triward.rewards import Shape, mix, shape_of


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: object,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: Url = "localhost:8001",
    timeout: float = 60.0,
    shape: Shape | Mapping[str, Any] | None = None,
    **verl: object,
) -> float:
    """Return the reward of a rollout, as verl's custom reward function.

    Args:
        data_source: not used.
        solution_str: the rollout's response.
        ground_truth: not used.
        extra_info: `prompt`, the messages before the response, and `images` if they show any.
        url: as `RewardClient` takes it; from verl's `reward_kwargs`, as is `timeout`.
        timeout: seconds.
        shape: what becomes of the score, as `shape_of` takes it. What it learns, it learns once in
            a process, for all calls with equal settings.
        verl: what else some versions pass, such as `reward_router_address`; not used.

    Raises:
        TriwardError: there is no score.
    """
    conversation = _conversation(_described(extra_info), solution_str)
    return _shaped(client_of(url, timeout).score(conversation), shape)


async def async_compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: object,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: Url = "localhost:8001",
    timeout: float = 60.0,
    shape: Shape | Mapping[str, Any] | None = None,
    **verl: object,
) -> float:
    """`compute_score` as a coroutine, which verl's reward loop runs without a thread for each."""
    conversation = _conversation(_described(extra_info), solution_str)
    return _shaped(await async_client_of(url, timeout).score(conversation), shape)


class TriwardRewardManager:
    """A manager of verl's reward loop.

    The client's arguments, such as `url`, come from `reward.reward_kwargs` in verl's configuration,
    `reward_model.reward_kwargs` in that of 0.7.0. Beside them may stand `shape`, as `shape_of`
    takes it; `rule_weight`, by which the custom reward function's reward is added; and
    `level_width`, by which rewards are divided into levels for verl's `filter_groups`.

    Args:
        config: verl's.
        tokenizer: the policy's.
        compute_score: verl's custom reward function, asked if there is a `rule_weight`.
        reward_router_address: not used.
        reward_model_tokenizer: likewise.
    """

    def __init__(  # noqa: D107 - the class says it
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Callable[..., Any] | None = None,
        reward_router_address: object = None,
        reward_model_tokenizer: object = None,
    ) -> None:
        section = config["reward" if "reward" in config else "reward_model"]
        settings = dict(section.get("reward_kwargs") or {})
        self._shape = shape_of(settings.pop("shape", None))
        self._weight = settings.pop("rule_weight", None)
        self._width = settings.pop("level_width", None)
        if self._width is not None and not 0 < self._width < math.inf:
            raise InvalidRequest(f"level_width: must be above 0 and finite, got {self._width}")
        if self._weight is not None and compute_score is None:
            raise InvalidRequest("rule_weight: there is no custom reward function to be weighed")
        self._rule = compute_score
        self._client = AsyncRewardClient(**settings)
        self._tokenizer = tokenizer

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Return the reward of a trajectory: that of its last sequence, as in verl's own managers.

        Args:
            data: a DataProto of the trajectory's sequences.

        Returns:
            `reward_score`; and in `reward_extra_info`, if there is a rule, what `model` and `rule`
            gave, before the rule's weight, and, if levels have a width, the reward's `level`.

        Raises:
            TriwardError: there is no score, or the rule's is not a finite number.
        """
        item = data[-1]
        reward = await self._client.score(_rollout(item, self._tokenizer))
        if self._shape:
            reward = self._shape([reward])[0]
        told: dict[str, float] = {}
        if self._rule is not None and self._weight is not None:
            rule = await _ruled(self._rule, item, _response(item, self._tokenizer))
            mixed = mix({"model": [reward], "rule": [rule]}, {"model": 1.0, "rule": self._weight})
            told = {"model": reward, "rule": float(rule)}
            reward = float(mixed[0])
        if self._width is not None:
            # A rollout's manager does not see its group; rewards further apart than the width are
            # never on one level.
            told["level"] = float(math.floor(reward / self._width))
        return {"reward_score": reward, "reward_extra_info": told}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: Sequence[float]) -> Any:
        """Each row's reward at its response's last token, float32 [rows, response length]."""
        return _at_last_tokens(data, scores)


class TriwardBatchRewardManager:
    """A manager of verl.workers.reward_manager.

    Args:
        tokenizer: the policy's.
        num_examine: not used, as are the next two.
        compute_score: see there.
        reward_fn_key: see there.
        shape: what becomes of the scores, as `shape_of` takes it.
        settings: the client's arguments, such as `url`; from verl's `reward_kwargs`, as is `shape`.
    """

    def __init__(  # noqa: D107 - the class says it
        self,
        tokenizer: Any,
        num_examine: int = 0,
        compute_score: object = None,
        reward_fn_key: str = "data_source",
        shape: Shape | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self._shape = shape_of(shape)
        self._client = RewardClient(**settings)
        self._tokenizer = tokenizer

    def __call__(self, data: Any, return_dict: bool = False) -> Any:
        """Each row's reward at its response's last token, float32 [rows, response length].

        A batch that has rewards, in `rm_scores`, keeps them: verl asks again after its workers did.

        Args:
            data: a DataProto.
            return_dict: return a dict with the key `reward_tensor`.

        Raises:
            TriwardError: a row has no score.
        """
        if "rm_scores" in data.batch.keys():  # noqa: SIM118 - a TensorDict refuses the shorter form
            rewards = data.batch["rm_scores"]
        else:
            rewards = _at_last_tokens(data, self._scores(data))
        return {"reward_tensor": rewards, "reward_extra_info": {}} if return_dict else rewards

    def _scores(self, data: Any) -> list[float]:
        # verl may have spread a prompt's rollouts over the batch to balance its workers.
        uids = data.non_tensor_batch.get("uid", [""] * len(data))
        order = sorted(range(len(data)), key=lambda row: str(uids[row]))
        found = self._client.score_many(_rollout(data[row], self._tokenizer) for row in order)
        found = self._shape(found) if self._shape else found
        return [score for _, score in sorted(zip(order, found, strict=True))]


# By their settings: verl hands those to each call, and what is learnt has to outlive a call.
_shapes: dict[str, Shape | None] = {}


def _shaped(score: float, settings: Shape | Mapping[str, Any] | None) -> float:
    if isinstance(settings, Mapping):
        settings = _shapes.setdefault(repr(sorted(settings.items())), shape_of(settings))
    return settings([score])[0] if settings else score


async def _ruled(rule: Callable[..., Any], item: Any, response: str) -> Any:
    """Return a custom reward function's number; verl's return it, or a dict with it as `score`."""
    fields = item.non_tensor_batch
    asked = {
        "data_source": fields["data_source"],
        "solution_str": response,
        "ground_truth": fields["reward_model"]["ground_truth"],
        "extra_info": fields.get("extra_info") or {},
    }
    if inspect.iscoroutinefunction(rule):
        found = await rule(**asked)
    else:
        found = await asyncio.to_thread(rule, **asked)
    return found["score"] if isinstance(found, Mapping) else found


def _conversation(prompt: Iterable[Message], response: str) -> Messages:
    return [*prompt, {"role": "assistant", "content": response}]


def _rollout(item: Any, tokenizer: Any) -> Messages:
    """Return the conversation of a DataProtoItem."""
    fields = item.non_tensor_batch
    if "raw_prompt" in fields:
        # Up to 0.6 the images stand beside the messages.
        images = (fields.get("multi_modal_data") or {}).get("image") or []
        prompt = placed(fields["raw_prompt"], images)
    else:
        prompt = _described(fields.get("extra_info"))
    return _conversation(prompt, _response(item, tokenizer))


def _response(item: Any, tokenizer: Any) -> str:
    ids = item.batch["responses"]
    length = int(item.batch["attention_mask"][-ids.shape[-1] :].sum())
    text: str = tokenizer.decode(ids[:length], skip_special_tokens=True)
    return text


def _described(extra_info: Mapping[str, Any] | None) -> Messages:
    """Return the prompt that a dataset repeats in `extra_info`."""
    prompt = (extra_info or {}).get("prompt")
    if extra_info is None or prompt is None:
        raise InvalidRequest("extra_info: needs 'prompt', the messages before the response")
    images = extra_info.get("images")
    return placed(prompt, [] if images is None else images)


def _at_last_tokens(data: Any, scores: Sequence[float]) -> Any:
    torch: Any = importlib.import_module("torch")
    responses = data.batch["responses"]
    lengths = data.batch["attention_mask"][:, -responses.shape[-1] :].sum(dim=1)
    if (lengths == 0).any():
        row = int((lengths == 0).nonzero()[0])
        raise InvalidRequest(f"data[{row}]: the response has no token that could hold a reward")
    rewards = torch.zeros_like(responses, dtype=torch.float32)
    rows = torch.arange(len(scores), device=rewards.device)
    rewards[rows, lengths - 1] = torch.tensor(scores, dtype=torch.float32, device=rewards.device)
    return rewards
