"""An environment for SkyRL (skyrl-gym 0.4): one turn, whose reward is the score.

    skyrl_gym.register(id="triward", entry_point="triward.integrations.skyrl:TriwardEnv")

What is scored is the prompt's messages with the policy's text behind them. Images stand in the
messages, or in the row's `images`. A failure raises a `TriwardError`, which ends the step.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from triward.conversation import Messages
from triward.errors import InvalidRequest
from triward.integrations.prompts import client_of, rollouts

_Base: Any = importlib.import_module("skyrl_gym.envs.base_text_env").BaseTextEnv


class TriwardEnv(_Base):  # type: ignore[misc]
    """A BaseTextEnv.

    Args:
        env_config: `url`, and perhaps `timeout` in seconds; `environment.skyrl_gym.triward` of
            SkyRL's configuration.
        extras: the dataset's row; used is `images`.

    Raises:
        InvalidRequest: there is no `url`.
    """

    def __init__(  # noqa: D107 - the class says it
        self, env_config: Any = None, extras: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        settings = dict(env_config or {})
        if "url" not in settings:
            raise InvalidRequest("env_config: needs 'url', the address of the reward server")
        self._client = client_of(settings["url"], float(settings.get("timeout", 60.0)))
        self._images = (extras or {}).get("images")
        self._prompt: Messages = []

    def init(self, prompt: Messages) -> tuple[Messages, dict[str, Any]]:
        """Remember the prompt."""
        self._prompt = [dict(message) for message in prompt]
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        """Return a BaseTextEnvStepOutput with the reward of the policy's text; the end.

        Raises:
            TriwardError: there is no score.
        """
        self.turns += 1
        images = [] if self._images is None else self._images
        reward = self._client.score(next(rollouts([(self._prompt, action, images)])))
        return {"observations": [], "reward": reward, "done": True, "metadata": {}}
