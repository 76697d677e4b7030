"""Attention on the device against float64: head sizes, grouped heads, fewer queries than keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import in_turns, row
from triward_server.engine.arena import Arena
from triward_server.engine.attention import Layout, make_layout, varlen
from triward_server.engine.kernels import repeats_keys, takes_pages

# Relative to the result's own size. bfloat16 rounds a result by 2^-9, and its weights as well.
BOUNDS = {torch.bfloat16: 8e-3, torch.float32: 1e-5}
WAYS = ("gathered", "pages")


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
    """Compare every case with float64, and each sequence alone with itself in company.

    Keys are gathered; where the kernel takes pages, and they are fewer rows, they are compared too.
    """
    results: dict[str, Any] = {"repeats_keys": repeats_keys(), "takes_pages": takes_pages(device)}
    worst = 0.0
    for name, case in CASES.items():
        results[name] = check_case(case, device, dtype)
        errors = (results[name].get(way, 0.0) for way in ("relative_rms", "relative_rms_by_pages"))
        worst = max(worst, *errors)
    return results | {"bound": BOUNDS[dtype], "passed": bool(worst <= BOUNDS[dtype])}


def check_case(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Relative distance from float64, and whether deterministic mode forgets the company."""
    query, key, value = _tensors(case, device, dtype)
    rows = _key_rows(case)
    exact = torch.cat([_exact(query, key, value, case, i, rows[i]) for i in range(len(rows))])
    gathered, paged = (_layout(case, device, dtype, by_pages=way) for way in (False, True))
    found = {"relative_rms": _error(varlen(query, key, value, gathered), exact)}
    if paged.pages is not None:
        found["relative_rms_by_pages"] = _error(varlen(query, key, value, paged), exact)
    alone = _layout(replace(case, queries=case.queries[:1]), device, dtype, deterministic=True)
    together = varlen(query, key, value, _layout(case, device, dtype, deterministic=True))
    first = slice(case.queries[0])
    same = torch.equal(together[first], varlen(query[first], key, value, alone))
    return {**found, "deterministic_alone_is_bitwise": same}


def time_pages(
    device: torch.device, dtype: torch.dtype, repeats: int, prompt: int = 1000, responses: int = 64
) -> dict[str, Any]:
    """Time one layer's attention of a prompt and responses of 200 tokens, both ways.

    As all layers but the last compute it, and as the last one does, where a response has one query.
    """
    if not takes_pages(device):
        return {"skipped": "the varlen kernel takes no pages here"}
    found: dict[str, Any] = {}
    for name, own in (("all tokens", 200), ("last tokens", 1)):
        case = AttentionCase((prompt, *(own,) * responses), 28, 4, 128, True, prompt)
        tensors = _tensors(case, device, dtype)
        ways = {way: _layout(case, device, dtype, by_pages=way == "pages") for way in WAYS}
        runs: dict[str, Callable[[], object]] = {
            way: partial(varlen, *tensors, layout) for way, layout in ways.items()
        }
        for run in runs.values():
            run()
        times = in_turns(runs, repeats)
        pages = ways["pages"].pages
        found[name] = {
            "rows_gathered": sum(ways["gathered"].key_lengths),
            "rows_of_pages": None if pages is None else pages.rows.numel(),
            "paths": {way: row(taken, responses) for way, taken in times.items()},
        }
    return found


def _tensors(
    case: AttentionCase, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values of all rows."""
    random = torch.Generator("cpu").manual_seed(0)
    query, key, value = (
        torch.randn(sum(case.queries), heads, case.head_dim, generator=random).to(device, dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    return query, key, value


def _layout(
    case: AttentionCase,
    device: torch.device,
    dtype: torch.dtype,
    deterministic: bool = False,
    by_pages: bool = False,
) -> Layout:
    arena, rows = Arena(device), _key_rows(case)
    lengths = [len(r) for r in rows]
    layout = make_layout(
        case.queries, case.causal, arena, dtype, lengths, np.concatenate(rows), deterministic,
        by_pages=by_pages,
    )  # fmt: skip
    arena.send()
    return layout


def _error(out: Tensor, exact: Tensor) -> float:
    if not torch.isfinite(out).all():
        return float("inf")
    return float((out.double() - exact).norm() / exact.norm())


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
