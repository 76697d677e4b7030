"""Rewards for AReaL, 1.0.

AReaL runs a `reward_fn` in processes, waits 15 s, tries four times, and then trains on a reward of
0. That time includes the wait for a free process, which nothing in a reward function can see. So
there are two forms:

- `AsyncArealReward`, set as a workflow's `async_reward_fn`: without AReaL's processes, and without
  that 0. Prefer it.
- `ArealReward`, a `reward_fn`: its own timeout is shorter, so that a slow server is an error, which
  AReaL raises after its tries. A busy pool of processes is still a 0.

AReaL takes any TimeoutError for its own, and so a `DeadlineExceeded`: here it is a
`ServerUnavailable`.

What is scored is the row's `messages`, or else the prompt's text, with its `images`, and the
completion behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from triward.channel import Url
from triward.conversation import Messages
from triward.errors import DeadlineExceeded, InvalidRequest, ServerUnavailable
from triward.integrations.prompts import async_client_of, client_of, rollouts

PATIENCE = 15.0  # seconds, of AReaL's AsyncRewardWrapper


class ArealReward:
    """A `reward_fn`. Can be pickled; each process makes one client.

    Args:
        url: as `RewardClient` takes it.
        timeout: seconds; less than AReaL's 15.

    Raises:
        InvalidRequest: the timeout is not.
    """

    def __init__(self, url: Url, timeout: float = 10.0) -> None:  # noqa: D107
        if not 0 < timeout < PATIENCE:
            raise InvalidRequest(
                f"timeout: must be above 0 and below {PATIENCE:g} s, after which AReaL gives up "
                f"and takes 0 for the reward; got {timeout:g}"
            )
        self.url = url
        self.timeout = timeout

    def __call__(
        self,
        prompt: str,
        completions: str,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        **data: Any,
    ) -> float:
        """Return the reward of a completion, as AReaL's workflows ask for it.

        Args:
            prompt: as the policy's chat template rendered it.
            completions: one, with the token that ended it.
            prompt_ids: not used.
            completion_ids: not used.
            data: the dataset's row; used are `messages` and `images`.

        Raises:
            TriwardError: there is no score.
        """
        with _no_timeout():
            return client_of(self.url, self.timeout).score(_conversation(prompt, completions, data))


class AsyncArealReward:
    """An `async_reward_fn` of AReaL's workflows; set it on one that was made.

    Args:
        url: as `AsyncRewardClient` takes it.
        timeout: seconds; any.
    """

    def __init__(self, url: Url, timeout: float = 60.0) -> None:  # noqa: D107
        self.url = url
        self.timeout = timeout

    async def __call__(
        self,
        prompt: str,
        completions: str,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        **data: Any,
    ) -> float:
        """Return the reward of a completion; arguments and errors are `ArealReward`'s."""
        client = async_client_of(self.url, self.timeout)
        with _no_timeout():
            return await client.score(_conversation(prompt, completions, data))


@contextmanager
def _no_timeout() -> Iterator[None]:
    try:
        yield
    except DeadlineExceeded as error:
        raise ServerUnavailable(f"no score in time: {error}") from error


def _conversation(prompt: str, completion: str, data: dict[str, Any]) -> Messages:
    said, images = data.get("messages"), data.get("images")
    # A vision dataset's `messages` is a text, rendered already, with one placeholder an image; in
    # the prompt there is one for each token of it.
    return next(rollouts([(said or prompt, completion, [] if images is None else images)]))
