"""torch's varlen kernel on a CPU: what FlashAttention 2 computes, and what it refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from triward_server.engine import pages


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: tuple[int, int]
) -> Tensor:
    """One sequence in float64: [Q, H, D], K keys of G heads, the last query beside the last key."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(t.double().repeat_interleave(groups, 1) for t in (key, value))
    products = torch.einsum("qhd,khd->hqk", q, k) * (scale or query.shape[-1] ** -0.5)
    places = torch.arange(len(k)) - torch.arange(len(k) - len(q), len(k))[:, None]
    back, ahead = (len(k) if side < 0 else side for side in window)
    hidden = (places < -back) | (places > ahead)
    weights = products.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """torch 2.14's. Of pages it reads what `seqused_k` says, and nothing behind it."""
    sequences = len(cu_seq_q) - 1
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    for given in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        require(given is None or given.dtype == torch.int32, "int32")
    require(enable_gqa or query.shape[1] == key.shape[-2], "the same number of heads")
    if block_table is None:
        require(seqused_k is None, "seqused_k is for pages")
        require(key.dim() == 3 and len(key) == sum(keys), "[keys, heads, width]")
        parts = [torch.arange(len(key)).split(keys), key, value]
    else:
        require(seqused_k is not None and tuple(seqused_k.shape) == (sequences,), "seqused_k")
        require(len(block_table) == sequences, "a row of the table for each sequence")
        require(key.dim() == 4 and key.shape[1] % pages.PAGE == 0, "pages of multiples of 256")
        require(num_splits == 1, "torch up to 2.14 computes several splits of pages wrongly")
        assert seqused_k is not None
        keys = seqused_k.tolist()
        flat = [t.flatten(0, 1) for t in (key, value)]
        rows = block_table.long()[..., None] * key.shape[1] + torch.arange(key.shape[1])
        parts = [[row.flatten()[:n] for row, n in zip(rows, keys, strict=True)], *flat]
    require(max(queries) == max_q and max(keys) <= max_k, "max_q and max_k")
    out = [
        attend(own, parts[1][rows], parts[2][rows], scale, window_size)
        for own, rows in zip(query.split(queries), parts[0], strict=True)
    ]
    return torch.cat(out).to(query.dtype)


def require(holds: bool, what: str) -> None:
    """Refuse as the kernel does."""
    if not holds:
        raise RuntimeError(what)
