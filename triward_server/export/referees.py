"""References by kind of checkpoint: what `verify` compares the engine's scores with.

transformers' own class where it has one; or else a plain restatement of the published code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..errors import ConfigError
from ..model_configs import kind_of
from ..schema import Int32Array
from .ixc_reference import IxcOracle
from .reference import Messages, Reference


class Refusal(Exception):
    """The reference has no score for a conversation; the text says why."""


class Referee(Protocol):
    """Scores one conversation at a time."""

    def score(self, messages: Messages) -> float:
        """Return the number for a conversation; `Refusal` or `TemplateError` if it has none."""

    def score_ids(self, ids: Int32Array) -> float:
        """Return the number for the token ids [L] of a conversation without media."""


@dataclass(frozen=True)
class RefereeKind:
    """References of one kind.

    Attributes:
        words: for them, in reports.
        make: takes a checkpoint, a device, whether layers come and go one by one, and a dtype.
        dtypes: in which they compute; empty: in any.
    """

    words: str
    make: Callable[[Path, torch.device, bool, torch.dtype], Referee]
    dtypes: tuple[torch.dtype, ...] = ()


class IxcReferee:
    """`Referee` by the restatement of IXC-2.5-Reward; arguments as of `Reference`."""

    def __init__(
        self, checkpoint: Path, device: torch.device, streamed: bool, dtype: torch.dtype
    ) -> None:
        assert dtype == torch.float32
        self._oracle = IxcOracle(checkpoint, device=str(device), streamed=streamed)

    def score(self, messages: Messages) -> float:
        """See `Referee`."""
        try:
            return self._oracle.score(messages)
        except (ValueError, OSError) as error:
            raise Refusal(str(error)) from None

    def score_ids(self, ids: Int32Array) -> float:
        """See `Referee`."""
        return self._oracle.score_inputs(ids.tolist(), [])


TRANSFORMERS = RefereeKind("transformers' own class", Reference)
# By `kind_of`.
KINDS = {
    "internlmxcomposer2": RefereeKind(
        "the restatement of IXC-2.5-Reward", IxcReferee, (torch.float32,)
    ),
}


def kind_of_referee(checkpoint: Path) -> RefereeKind:
    """Return the references of a checkpoint that the engine has read."""
    kind = kind_of(json.loads((checkpoint / "config.json").read_text()))
    return KINDS.get(kind, TRANSFORMERS)


def check_dtype(kind: RefereeKind, dtype: torch.dtype) -> None:
    """Raise `ConfigError` for a dtype in which the references do not compute."""
    if kind.dtypes and dtype not in kind.dtypes:
        raise ConfigError(
            f"--dtype: {kind.words} computes in float32 alone, so {dtype} has no noise"
        )
