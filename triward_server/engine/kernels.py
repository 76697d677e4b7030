"""What torch's varlen kernel takes: read from its parameters, and tried where these do not say."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import is_device_fault, is_out_of_memory
from .arena import Arena
from .pages import PAGE, Pages, lay_out

logger = logging.getLogger(__name__)

# What attention by pages needs. torch up to 2.14 divides pages' keys among blocks where
# `num_splits` leaves it the choice, and puts the parts together wrongly for packed sequences
# (https://github.com/Dao-AILab/flash-attention/issues/1217); it must be 1.
_PAGED = {"block_table", "seqused_k", "num_splits", "enable_gqa"}


def repeats_keys() -> bool:
    """Return True if torch's kernel needs as many key heads as query heads.

    torch >= 2.12 says that it does not. Before, whatever the kernel takes is undocumented, so it is
    tried, once a process.
    """
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in parameters(varlen_attn):
        return False
    return not (torch.cuda.is_available() and groups_heads(varlen_attn, torch.device("cuda")))


def takes_pages(device: torch.device) -> bool:
    """Return True if torch's kernel reads keys from pages, and reads them right.

    torch >= 2.14 says that it does. It is tried nevertheless, once a process and device.
    """
    from torch.nn.attention.varlen import varlen_attn

    return torch.cuda.is_available() and reads_pages(varlen_attn, device)


@cache
def groups_heads(kernel: Callable[..., Any], device: torch.device) -> bool:
    """Try whether a varlen kernel lets several query heads share a key head.

    Args:
        kernel: torch's `varlen_attn`, or what stands in for it.
        device: where it runs.
    """
    lengths = [5, 3]
    query = torch.linspace(-2, 2, 8 * 4 * 64, device=device).sin().view(8, 4, 64).bfloat16()
    key, value = query[:, :2].flip(0).contiguous(), query[:, 1:3].flip(1).contiguous()
    ends = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
    rest = (ends, ends, max(lengths), max(lengths))
    try:
        grouped = kernel(query, key, value, *rest, window_size=(-1, 0))
    except (RuntimeError, ValueError, TypeError) as error:
        if is_device_fault(error):
            raise
        return False
    repeated = (t.repeat_interleave(2, dim=1) for t in (key, value))
    expected = kernel(query, *repeated, *rest, window_size=(-1, 0))
    return _agree(grouped, expected)


@cache
def reads_pages(kernel: Callable[..., Any], device: torch.device) -> bool:
    """Try whether a varlen kernel computes the same from pages as from gathered keys.

    Args:
        kernel: torch's `varlen_attn`, or what stands in for it.
        device: where it runs.
    """
    missing = _PAGED - parameters(kernel)
    if missing:
        logger.info("keys are gathered: the varlen kernel has no %s", ", ".join(sorted(missing)))
        return False
    try:
        for head_dim, back in ((64, -1), (128, -1), (128, PAGE + 40)):
            paged, gathered = _by_pages(kernel, device, head_dim, (back, 0))
            if not _agree(paged, gathered):
                logger.warning(
                    "keys are gathered: from pages the varlen kernel computes something else "
                    "(head size %d, window %d)", head_dim, back,
                )  # fmt: skip
                return False
    except (RuntimeError, ValueError, TypeError) as error:
        if is_device_fault(error) or is_out_of_memory(error):
            raise
        logger.warning("keys are gathered: the varlen kernel refuses pages: %s", error)
        return False
    return True


def _by_pages(
    kernel: Callable[..., Any], device: torch.device, head_dim: int, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Attention of a prompt and what follows it, from pages and from gathered keys."""
    queries = [2 * PAGE + 44, 40, PAGE - 26, 1]
    own = np.split(np.arange(sum(queries)), np.cumsum(queries)[:-1])
    seen = [own[0], *(np.concatenate([own[0], rows]) for rows in own[1:])]
    lengths = [len(rows) for rows in seen]
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(queries), heads, head_dim, generator=random).to(device, torch.bfloat16)
        for heads in (4, 2, 2)
    )
    arena, in_a_row = Arena(device), np.concatenate(seen)
    key_rows, pages = arena.add(in_a_row), lay_out(in_a_row, lengths, arena)
    assert pages is not None, "the prompt fills two pages, which four sequences see"
    ends = (arena.add(np.cumsum([0, *each], dtype=np.int32)) for each in (queries, lengths))
    rest = (*ends, max(queries), max(lengths))
    arena.send()
    options = {"window_size": window, "enable_gqa": True, "num_splits": 1}
    paged = kernel(query, key[pages.rows], value[pages.rows], *rest, **options, **by_table(pages))
    return paged, kernel(query, key[key_rows], value[key_rows], *rest, **options)


def by_table(pages: Pages) -> dict[str, Tensor]:
    """Return what tells the varlen kernel that its keys are pages, and which."""
    return {"block_table": pages.table, "seqused_k": pages.used}


@cache
def parameters(kernel: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a kernel's parameters; asking costs more than the call of a layer."""
    return frozenset(inspect.signature(kernel).parameters)


def _agree(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2))
