"""`varlen(q, k, v, layout)`: attention over sequences packed in one row, without padding.

Two kernels, chosen openly when a layout is built (`kernel_for`): torch's varlen flash attention
for 16-bit CUDA tensors, and scaled_dot_product_attention over each run of equally long sequences
for everything else (CPU, float32), which the varlen kernel does not support.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Kernel = Literal["sdpa", "varlen"]


@dataclass(frozen=True)
class Layout:
    """How a packed row splits into sequences, each of which attends to itself alone.

    Attributes:
        lengths: length of each sequence; they sum to the row's.
        cu_seqlens: int32 [S + 1], their cumulative sum, on the row's device.
        causal: whether a token sees only itself and what stands before it.
        kernel: which kernel computes it.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    causal: bool
    kernel: Kernel


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel that can compute a device's tensors of a dtype."""
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "varlen" if flash else "sdpa"


def make_layout(
    lengths: Sequence[int], causal: bool, device: torch.device, dtype: torch.dtype
) -> Layout:
    """Describe sequences of `lengths` tokens that lie one behind the other."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Layout(
        lengths=tuple(lengths),
        cu_seqlens=cu_seqlens.to(device, non_blocking=True),
        causal=causal,
        kernel=kernel_for(device, dtype),
    )


def varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Softmax attention scaled by 1/sqrt(D), within each sequence of the layout.

    Args:
        query: [T, H, D].
        key: [T, G, D], G divides H: each key head serves H / G query heads.
        value: [T, G, D].
        layout: where the sequences lie in T.

    Returns:
        [T, H, D].
    """
    if layout.kernel == "varlen":
        return _varlen_kernel(query, key, value, layout)
    return _sdpa_by_length(query, key, value, layout)


def _sdpa_by_length(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """One batched call for each run of consecutive sequences of equal length; no row is copied."""
    out = torch.empty_like(query)
    start = 0
    for length, run in groupby(layout.lengths):
        count = len(list(run))
        rows = slice(start, start + count * length)
        q, k, v = (
            tensor[rows].unflatten(0, (count, length)).transpose(1, 2)
            for tensor in (query, key, value)
        )
        attended = scaled_dot_product_attention(
            q, k, v, is_causal=layout.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[rows] = attended.transpose(1, 2).flatten(0, 1)
        start = rows.stop
    return out


def _varlen_kernel(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    # Imported late: the module exists from torch 2.10 on and is of no use without CUDA.
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # torch < 2.12
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    longest = max(layout.lengths)
    window = (-1, 0) if layout.causal else (-1, -1)
    out = varlen_attn(
        query, key, value, layout.cu_seqlens, layout.cu_seqlens, longest, longest,
        window_size=window, **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out
