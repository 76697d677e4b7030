"""`varlen(q, k, v, layout)`: attention over sequences packed in one row, without padding.

A sequence's queries lie one behind the other in the row; its keys are gathered from wherever they
lie, so that sequences can share them. One index serves all layers of a forward pass. Where the
kernel reads keys from pages (`pages`), those that sequences share are gathered once.

Two kernels, chosen openly when a layout is built (`kernel_for`): torch's varlen flash attention
for 16-bit CUDA tensors, and scaled_dot_product_attention over each run of equally long sequences
for everything else (CPU, float32), which the varlen kernel does not support; long sequences on a
CPU are written out, which is faster there (`products`). Neither kernel caps the products of query
and key; where a model does (Gemma 2), attention is written out too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..schema import Int32Array, Int64Array
from . import products
from .arena import Arena
from .kernels import by_table, parameters, repeats_keys, takes_pages
from .pages import Pages, lay_out

Kernel = Literal["sdpa", "varlen"]

# Rows that row-wise layers compute at once on a CPU: enough for fast matrix products, few enough
# for its caches.
_CPU_BLOCK = 1024

_MASK_ROWS = 512

# What capped attention may take at once: products in float32 and three things made of them.
CAPPED_BYTES = 512 * 1024**2
_masks: dict[tuple[torch.dtype, torch.device], Tensor] = {}


@dataclass(frozen=True)
class Layout:
    """The split of a packed row into S sequences.

    Attributes:
        query_lengths: S lengths; they sum to the row's.
        key_lengths: S lengths, each at least the query's.
        key_rows: int64 [sum of key_lengths], rows of the keys of each sequence, one sequence
            behind the other; None where the keys themselves lie so.
        cu_query: int32 [S + 1], cumulative sum of query_lengths, on the row's device.
        cu_key: likewise of key_lengths.
        causal: whether a query sees only keys up to its own place; the last query of a sequence
            sees all its keys.
        kernel: which kernel computes it.
        blocks: numbers of rows that row-wise layers compute at once (`blocks`).
        deterministic: whether every sequence is computed as if it were alone, so that no rounding
            depends on its company; the blocks are the sequences then.
        media: for each block int64 [R, 2] on the CPU, first and last + 1 of its runs of media, or
            None where it has none; None: no layer asks.
        pages: the rows of `key_rows` as the varlen kernel reads them from pages; None: it gets them
            gathered.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    key_rows: Tensor | None
    cu_query: Tensor
    cu_key: Tensor
    causal: bool
    kernel: Kernel
    blocks: tuple[int, ...]
    deterministic: bool
    media: tuple[Tensor | None, ...] | None = None
    pages: Pages | None = None


@dataclass(frozen=True)
class LogitRules:
    """Rules that turn products of query and key into attention's weights.

    Attributes:
        scale: what products are multiplied by; None: 1/sqrt(D).
        softcap: c, where a product p becomes c * tanh(p / c) (arXiv:2408.00118, section 2).
        window: how many keys up to its own place a query sees, where attention is causal; None:
            all of them.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None


PLAIN = LogitRules()


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel that can compute a device's tensors of a dtype."""
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "varlen" if flash else "sdpa"


def make_layout(
    lengths: Sequence[int],
    causal: bool,
    arena: Arena,
    dtype: torch.dtype,
    key_lengths: Sequence[int] | None = None,
    key_rows: NDArray[np.int64] | None = None,
    deterministic: bool = False,
    media_rows: Int64Array | None = None,
    by_pages: bool = True,
) -> Layout:
    """Describe sequences of `lengths` queries that lie one behind the other.

    Args:
        lengths: queries of each sequence.
        causal: see `Layout`.
        arena: of the device where the tensors are; it is to be sent.
        dtype: of queries, keys and values.
        key_lengths: keys of each sequence, where they are not the queries' rows.
        key_rows: their rows, see `Layout`.
        deterministic: see `Layout`.
        media_rows: rows of media, ascending, where layers treat them apart.
        by_pages: whether keys may lie in pages, where the kernel takes these and they are fewer
            rows. Not in deterministic mode, where every pass takes the same way.
    """
    keys = lengths if key_lengths is None else key_lengths
    total = sum(lengths)
    block = _CPU_BLOCK if arena.device.type == "cpu" else total
    even = [min(block, total - row) for row in range(0, total, block)]
    cut = tuple(lengths if deterministic else even)
    kernel = kernel_for(arena.device, dtype)
    pages = None
    if key_rows is not None and kernel == "varlen" and by_pages and not deterministic:
        pages = lay_out(key_rows, keys, arena) if takes_pages(arena.device) else None
    return Layout(
        query_lengths=tuple(lengths),
        key_lengths=tuple(keys),
        key_rows=None if key_rows is None else arena.add(key_rows),
        cu_query=arena.add(_cumulative(lengths)),
        cu_key=arena.add(_cumulative(keys)),
        causal=causal,
        kernel=kernel,
        blocks=cut,
        deterministic=deterministic,
        media=None if media_rows is None else tuple(_runs_of_media(media_rows, cut)),
        pages=pages,
    )


def _runs_of_media(rows: Int64Array, lengths: Sequence[int]) -> Iterator[Tensor | None]:
    """Find each block's runs, counted from its first row; behind them two empty ones.

    A compiler takes no number of three or more for another size that is 1 or 2.
    """
    ends = np.cumsum(lengths)
    parts = np.split(rows, np.searchsorted(rows, ends[:-1]))
    for part, first in zip(parts, ends - lengths, strict=True):
        gaps = np.flatnonzero(np.diff(part) > 1)
        if not len(part):
            yield None
            continue
        runs = np.stack([part[[0, *(gaps + 1)]], part[[*gaps, -1]] + 1], axis=1) - first
        yield torch.from_numpy(np.concatenate([runs, np.zeros((2, 2), np.int64)]))


def blocks(layout: Layout, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Iterate over [Q, …] tensors block by block, for layers that compute each row for itself.

    Behind the tensors' parts come a block's runs of media, where it has any.

    On CUDA one block is the whole row. On the CPU a block's intermediate results stay in its
    caches. In deterministic mode a block is a sequence: how a matrix product rounds a row depends
    on how many rows it has.
    """
    parts = zip(*(tensor.split(layout.blocks) for tensor in rows), strict=True)
    if layout.media is None:
        return parts
    return (
        part if media is None else (*part, media)
        for part, media in zip(parts, layout.media, strict=True)
    )


def join(parts: Iterable[Tensor]) -> Tensor:
    """Join the blocks' results into one tensor; a single one is not copied."""
    first, *rest = parts
    return torch.cat([first, *rest]) if rest else first


def varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rules: LogitRules = PLAIN
) -> Tensor:
    """Softmax attention within each sequence of the layout.

    Args:
        query: [Q, H, D], Q the sum of query_lengths.
        key: [K, G, D], G divides H: each key head serves H / G query heads.
        value: [K, G, D].
        layout: which rows belong together.
        rules: how weights are made of products.

    Returns:
        [Q, H, D].
    """
    fused = layout.kernel == "varlen" and rules.softcap is None
    kernel = _varlen_kernel if fused else _sdpa_by_shape
    return kernel(query, key, value, layout, rules)


def _sdpa_by_shape(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rules: LogitRules
) -> Tensor:
    """Make one batched call for each run of consecutive sequences of equal lengths."""
    out = torch.empty_like(query)
    first_query = first_key = 0
    together = rules.softcap is None and not layout.deterministic
    for queries, keys, count in _runs(layout, together):
        rows = slice(first_query, first_query + count * queries)
        seen = slice(first_key, first_key + count * keys)
        # Gathered run by run: what all runs see together can be many times what there is.
        own = seen if layout.key_rows is None else layout.key_rows[seen]
        run = [t.unflatten(0, (count, -1)) for t in (query[rows], key[own], value[own])]
        first_query, first_key = rows.stop, seen.stop
        if rules.softcap is None and products.pays(query, queries, keys, key.shape[1]):
            scale = rules.scale or query.shape[-1] ** -0.5
            for index, (q, k, v) in enumerate(zip(*run, strict=True)):
                first = rows.start + index * queries
                out[first : first + queries] = products.attend(
                    q, k, v, scale, rules.window, layout.causal
                )
            continue
        q, k, v = (tensor.transpose(1, 2) for tensor in run)
        causal = layout.causal and queries > 1
        windowed = layout.causal and rules.window is not None and keys > rules.window
        far_ahead = causal and keys >= 2 * queries
        if windowed or far_ahead or rules.softcap is not None:
            attended = _masked(q, k, v, rules)
        else:
            if causal and queries < keys:
                # Short ancestors: queries for them, which nobody reads, cost less than a mask,
                # behind which the kernel computes the upper triangle too.
                q = pad(q, (0, 0, keys - queries, 0))
            attended = _sdpa(q, k, v, rules, is_causal=causal)
        out[rows] = attended[:, :, -queries:].transpose(1, 2).flatten(0, 1)
    return out


def _runs(layout: Layout, together: bool) -> Iterator[tuple[int, int, int]]:
    """Yield queries, keys and number of consecutive sequences of equal lengths; or one at a time.

    A single query's attention rounds differently in another company, as a written-out product does,
    which also takes memory for all of it.
    """
    for (queries, keys), run in groupby(zip(layout.query_lengths, layout.key_lengths, strict=True)):
        count = len(list(run))
        yield from [(queries, keys, count)] if together else [(queries, keys, 1)] * count


def _masked(q: Tensor, k: Tensor, v: Tensor, rules: LogitRules) -> Tensor:
    """Causal attention of the last Q of K places: q [N, H, Q, D], k and v [N, G, K, D].

    In blocks of queries, each with the keys that it can see, so that the mask stays small.
    """
    before = k.shape[2] - q.shape[2]
    window = rules.window or k.shape[2]
    rows = _MASK_ROWS
    attend: Callable[..., Tensor] = _sdpa
    if rules.softcap is not None:
        rows = max(1, min(rows, CAPPED_BYTES // (16 * q.shape[1] * k.shape[2])))
        attend = _capped
    parts = []
    for first in range(0, q.shape[2], rows):
        block = q[:, :, first : first + rows]
        start, end = max(0, before + first + 1 - window), before + first + block.shape[2]
        mask = _lower_right(block.shape[2], end - start, q.dtype, q.device)
        if window < end - start:
            mask = _windowed(mask, window)
        parts.append(attend(block, k[:, :, start:end], v[:, :, start:end], rules, attn_mask=mask))
    return torch.cat(parts, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rules: LogitRules, **options: Any) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, scale=rules.scale, enable_gqa=q.shape[1] != k.shape[1], **options
    )


def _capped(q: Tensor, k: Tensor, v: Tensor, rules: LogitRules, attn_mask: Tensor) -> Tensor:
    """Attention with capped products; weights are float32 until they meet the values."""
    assert rules.softcap is not None
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # a key head's queries lie together
    products = grouped @ k.transpose(2, 3) * (rules.scale or q.shape[-1] ** -0.5)
    capped = products.float().div_(rules.softcap).tanh_().mul_(rules.softcap)
    masked = capped.unflatten(2, (-1, q.shape[2])) + attn_mask
    weights = masked.flatten(2, 3).softmax(-1).to(v.dtype)
    attended: Tensor = (weights @ v).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return attended


def _windowed(mask: Tensor, window: int) -> Tensor:
    """Hide keys that lie `window` or more back in a mask [queries, keys], aligned bottom-right."""
    queries, keys = mask.shape
    far = torch.ones_like(mask, dtype=torch.bool).tril(keys - queries - window)
    return mask.masked_fill(far, -torch.inf)


def _lower_right(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive causal mask [queries, keys] whose last row sees everything (is_causal: the first).

    It is the lower right part of any larger one, so one is kept, as large as was ever needed.
    """
    mask = _masks.get((dtype, device))
    if mask is None or mask.shape[1] < keys:
        width = max(_MASK_ROWS, 1 << (keys - 1).bit_length())
        mask = torch.zeros(_MASK_ROWS, width, dtype=dtype, device=device)
        mask.masked_fill_(
            torch.ones_like(mask, dtype=torch.bool).triu(width - _MASK_ROWS + 1), -torch.inf
        )
        _masks[dtype, device] = mask
    return mask[-queries:, -keys:]


def _varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rules: LogitRules
) -> Tensor:
    # Imported late: the module exists from torch 2.10 on and is of no use without CUDA.
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if layout.pages is not None:
        key, value = key[layout.pages.rows], value[layout.pages.rows]
        options = by_table(layout.pages)
    elif layout.key_rows is not None:
        key, value = key[layout.key_rows], value[layout.key_rows]
    groups, takes = query.shape[1] // key.shape[-2], parameters(varlen_attn)
    if groups > 1 and repeats_keys():
        key, value = (t.repeat_interleave(groups, dim=-2) for t in (key, value))
    elif groups > 1 and "enable_gqa" in takes:
        options["enable_gqa"] = True
    if "num_splits" in takes and (layout.pages or layout.deterministic or not layout.causal):
        # One split does not depend on company, and pages need it (`kernels`). It also keeps torch
        # from handing attention without a mask to cuDNN, which builds and keeps a graph for every
        # new total of rows.
        options["num_splits"] = 1
    back = -1 if rules.window is None else rules.window - 1
    window = (back, 0) if layout.causal else (-1, -1)  # causal is aligned bottom-right
    out = varlen_attn(
        query, key, value, layout.cu_query, layout.cu_key,
        max(layout.query_lengths), max(layout.key_lengths), scale=rules.scale,
        window_size=window, **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _cumulative(lengths: Sequence[int]) -> Int32Array:
    return np.cumsum([0, *lengths], dtype=np.int32)
