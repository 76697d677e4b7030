"""Attention on a CPU, written out as matrix products by oneDNN.

torch's own kernel multiplies by MKL, which leaves AMD's wide vector units idle, and turns bfloat16
products into float32 one by one: written out, attention takes half of its time (`docs/engine.md`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import takes_onednn

_ROWS = 512  # of a product: enough for oneDNN, and few enough for a processor's cache
_VALUES = 2**23  # of a product at most, 32 MiB: a pass's budget of bytes has no part for it
_FEWEST_ROWS, _FEWEST_KEYS = 64, 256


def pays(query: Tensor, queries: int, keys: int, heads: int) -> bool:
    """Return True where written-out attention is the faster one.

    Args:
        query: [., H, D] of the sequence.
        queries: its queries.
        keys: its keys.
        heads: key heads, which H / heads query heads share.
    """
    rows = queries * query.shape[1] // heads
    return rows >= _FEWEST_ROWS and keys >= _FEWEST_KEYS and takes_onednn(query.device)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, causal: bool
) -> Tensor:
    """Softmax attention of one sequence; weights are made in float32.

    Args:
        query: [Q, H, D], the last Q places of the sequence.
        key: [K, G, D], G divides H.
        value: [K, G, D].
        scale: of the products of queries and keys.
        window: how many keys a query sees, its own the last; None for all.
        causal: whether a query sees no key behind its own.

    Returns:
        [Q, H, D] in the query's dtype.
    """
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    most = max(1, min(_ROWS, _VALUES // len(key)) // group)
    step = -(-len(query) // -(-len(query) // most))  # blocks of equal sizes: a short one is slow
    before = len(key) - len(query)
    size = step if causal else 0
    hidden = torch.full((size, size), -torch.inf).triu_(1)[:, None]
    for head in range(key.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        # Whatever can be done for all blocks is: threads that wait for each other at many small
        # operations lose most where other processes compute beside them.
        rows = torch.empty(len(query), group, query.shape[2]).copy_(query[:, mine]).mul_(scale)
        keys, values = key[:, head].float().contiguous(), value[:, head].t().contiguous()
        for first in range(0, len(query), step):
            block = rows[first : first + step]
            start, end = 0, len(key)
            if causal:
                end = before + first + len(block)
                start = max(0, end - len(block) + 1 - (window or end))
            weights = _multiply(block.flatten(0, 1), keys[start:end])
            if causal:
                _hide_(weights.unflatten(0, block.shape[:2]), hidden, window)
            # Rounded to the values' dtype, as transformers' eager attention does.
            attended = _multiply(weights.softmax(-1).to(values.dtype), values[:, start:end])
            out[first : first + step, mine] = attended.view_as(block)
    return out


def _hide_(weights: Tensor, hidden: Tensor, window: int | None) -> None:
    """Hide what lies behind a query or out of its window.

    Args:
        weights: [Q, group, K], Q the last.
        hidden: [at least Q, 1, as many], what is added to those of the last keys.
        window: see `attend`.
    """
    queries, keys = weights.shape[0], weights.shape[-1]
    weights[..., keys - queries :].add_(hidden[:queries, :, :queries])
    if window is not None and keys > window:
        out = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries - window)
        weights.masked_fill_(out[:, None], -torch.inf)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """[T, inputs] and [outputs, inputs] -> [T, outputs]."""
    weight = weight.contiguous()  # of others oneDNN has a slow kernel alone
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out
