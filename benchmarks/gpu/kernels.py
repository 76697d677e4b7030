"""Attention on the device against float64: head sizes, grouped heads, fewer queries than keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triward_server.engine.arena import Arena
from triward_server.engine.attention import make_layout, repeats_keys, varlen

# Relative to the result's own size. bfloat16 rounds a result by 2^-9, and its weights as well.
BOUNDS = {torch.bfloat16: 8e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class AttentionCase:
    """Sequences of one call.

    Attributes:
        queries: rows of each sequence; in front of its last ones it sees the first sequence's.
        heads: of queries.
        kv_heads: of keys.
        head_dim: width of a head.
        causal: as a language model, or as a vision tower.
        shared: rows of the first sequence that all others see too.
    """

    queries: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    shared: int = 0


# Qwen2.5-VL-7B's heads; lengths that are no multiple of any block.
CASES = {
    "vision, windows": AttentionCase((64,) * 9 + (32, 16), 16, 16, 80, False),
    "vision, images": AttentionCase((1000, 36), 16, 16, 80, False),
    "decoder, grouped heads": AttentionCase((517, 1, 64), 28, 4, 128, True),
    "decoder, shared prefix": AttentionCase((517, 90, 33), 28, 4, 128, True, 517),
    "decoder, last tokens": AttentionCase((300, 1, 1, 1), 28, 4, 128, True, 300),
    "decoder, equal heads": AttentionCase((517, 90), 8, 8, 128, True, 200),
    "vision, grouped heads": AttentionCase((130, 70), 8, 2, 80, True, 130),
}


def check_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Compare every case with float64, and each sequence alone with itself in company."""
    results: dict[str, Any] = {"repeats_keys": repeats_keys()}
    worst = 0.0
    for name, case in CASES.items():
        error, same = check_case(case, device, dtype)
        results[name] = {"relative_rms": error, "deterministic_alone_is_bitwise": same}
        worst = max(worst, error)
    return results | {"bound": BOUNDS[dtype], "passed": bool(worst <= BOUNDS[dtype])}


def check_case(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> tuple[float, bool]:
    """Relative distance from float64, and whether deterministic mode forgets the company."""
    random = torch.Generator("cpu").manual_seed(0)
    total = sum(case.queries)
    query, key, value = (
        torch.randn(total, heads, case.head_dim, generator=random).to(device, dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    rows = _key_rows(case)
    lengths = [len(r) for r in rows]

    def attend(only: slice, deterministic: bool) -> Tensor:
        chosen = range(len(rows))[only]
        own = torch.cat([torch.arange(total).split(case.queries)[i] for i in chosen])
        arena = Arena(device)
        layout = make_layout(
            [case.queries[i] for i in chosen], case.causal, arena, dtype,
            [lengths[i] for i in chosen], np.concatenate([rows[i] for i in chosen]), deterministic,
        )  # fmt: skip
        arena.send()
        return varlen(query[own.to(device)], key, value, layout)

    out = attend(slice(None), False)
    exact = torch.cat([_exact(query, key, value, case, i, rows[i]) for i in range(len(rows))])
    error = float((out.double() - exact).norm() / exact.norm())
    if not torch.isfinite(out).all():
        error = float("inf")
    together = attend(slice(None), True).split(case.queries)
    first = attend(slice(0, 1), True)
    return error, torch.equal(together[0], first)


def _key_rows(case: AttentionCase) -> list[Any]:
    """Rows of the keys of each sequence."""
    ends = np.cumsum(case.queries)
    own = [np.arange(end - n, end) for end, n in zip(ends, case.queries, strict=True)]
    prefix = np.arange(case.shared)
    return [own[0], *(np.concatenate([prefix, rows]) for rows in own[1:])]


def _exact(
    query: Tensor, key: Tensor, value: Tensor, case: AttentionCase, index: int, rows: Any
) -> Tensor:
    """One sequence, written out in float64."""
    first = sum(case.queries[:index])
    q = query[first : first + case.queries[index]].double()
    seen = torch.from_numpy(rows).to(query.device)
    groups = case.heads // case.kv_heads
    k, v = (t[seen].double().repeat_interleave(groups, dim=1) for t in (key, value))
    products = torch.einsum("qhd,khd->hqk", q, k) / case.head_dim**0.5
    if case.causal:
        ahead = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
        products.masked_fill_(ahead.triu(len(k) - len(q) + 1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", products.softmax(-1), v)
