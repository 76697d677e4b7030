"""Names and arrangement of a checkpoint's tensors, and ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Our name and a tensor as the file has it -> the tensor as the model reads it, of the same shape.
Arrange = Callable[[str, Tensor], Tensor]


def canonical_name(key: str) -> str:
    """Our name for a checkpoint's tensor.

    transformers < 4.52 wrote `model.layers…` and `visual…`, later ones
    `model.language_model.layers…` and `model.visual…`; both are in use.
    """
    key = re.sub(r"^model\.(visual|language_model)\.", r"\1.", key)
    return re.sub(r"^model\.", "language_model.", key)


def _as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Naming:
    """How the tensors of an architecture's checkpoints become ours.

    Attributes:
        renames: pattern and replacement each, applied in order to what `canonical_name` returns.
        arrange: where the file has rows in another order than the model.
        unread: pattern of our names for what may be in a checkpoint and is read by no score.
    """

    renames: tuple[tuple[str, str], ...] = ()
    arrange: Arrange = _as_it_is
    unread: str = r"lm_head\..*"

    def name(self, key: str) -> str:
        """Return our name for a checkpoint's tensor."""
        name = canonical_name(key)
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def is_unread(self, name: str) -> bool:
        """Return True if no score reads a tensor of this name of ours."""
        return re.fullmatch(self.unread, name) is not None


PLAIN = Naming()  # as transformers' own classes have them
