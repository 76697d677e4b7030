"""Attention written out as products: where it is taken, and that it is attention."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_fake_cuda import Calls
from triward_server.engine import layers, products
from triward_server.engine.arena import Arena
from triward_server.engine.attention import LogitRules, make_layout, varlen

pytestmark = pytest.mark.skipif(not layers._ONEDNN, reason="torch has oneDNN on x86 alone")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SDPA = "aten.scaled_dot_product_attention.default"
ONEDNN = "mkldnn._linear_pointwise.default"


def draw(queries: int, keys: int, heads: int, key_heads: int, width: int) -> Tensors:
    torch.manual_seed(queries)
    sizes = ((queries, heads), (keys, key_heads), (keys, key_heads))
    query, key, value = (torch.randn(length, number, width) for length, number in sizes)
    return query, key, value


def plain(tensors: Tensors, window: int | None, causal: bool) -> torch.Tensor:
    """Attention in float64, all at once."""
    query, key, value = (tensor.double() for tensor in tensors)
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    weights = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    behind = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))
    if causal:
        hidden = (behind < 0) | (behind >= (window or len(key)))
        weights = weights.masked_fill(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", weights.softmax(-1), value)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads", "width", "window", "causal"),
    [
        (300, 300, 8, 2, 96, None, True),
        (20, 700, 8, 2, 32, None, True),  # of a shared prefix
        (700, 900, 4, 4, 80, 64, True),
        (900, 900, 4, 1, 80, 300, True),
        (700, 700, 4, 1, 16, 700, True),
        (600, 600, 16, 16, 80, None, False),  # a vision tower
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_written_out_attention_is_attention(
    queries: int, keys: int, heads: int, key_heads: int, width: int,
    window: int | None, causal: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    query, key, value = (t.to(dtype) for t in draw(queries, keys, heads, key_heads, width))
    expected = plain((query, key, value), window, causal)
    scale = width**-0.5
    attended = products.attend(query, key, value, scale, window, causal)
    assert attended.dtype == dtype
    budget = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(attended.double(), expected, rtol=budget, atol=budget)


@torch.inference_mode()
def test_a_long_sequences_products_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys there are."""
    multiply, sizes = products._multiply, list[int]()

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = multiply(x, weight)
        sizes.append(out.numel())
        return out

    tensors = draw(600, 600, 8, 2, 16)
    monkeypatch.setattr(products, "_VALUES", 20_000)
    monkeypatch.setattr(products, "_multiply", counted)
    attended = products.attend(*tensors, 0.25, None, True)
    assert max(sizes) <= 20_000
    torch.testing.assert_close(attended.double(), plain(tensors, None, True), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_blocks_are_equally_long_and_bfloat16_values_are_multiplied_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A last block of a few rows takes as long as a whole one; logits need float32."""
    multiply, seen = products._multiply, list[tuple[int, torch.dtype]]()

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert x.dtype == weight.dtype
        seen.append((len(x), x.dtype))
        return multiply(x, weight)

    monkeypatch.setattr(products, "_multiply", counted)
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        products.attend(*(t.to(dtype) for t in draw(390, 900, 8, 2, 32)), 0.2, None, True)
        assert [rows for rows, _ in seen[::2]] == 2 * [392, 392, 392, 384]
        assert {each for _, each in seen[::2]} == {torch.float32}
        assert {each for _, each in seen[1::2]} == {dtype}


@torch.inference_mode()
def test_long_sequences_are_written_out_and_short_ones_are_not() -> None:
    """Each in its place of the row, whichever kernel computes it."""
    lengths = [40, 300, 300, 12, 256]
    query, key, value = draw(sum(lengths), sum(lengths), 4, 2, 32)
    arena = Arena(torch.device("cpu"))
    layout = make_layout(lengths, True, arena, torch.float32)
    arena.send()
    with Calls() as calls:
        out = varlen(query, key, value, layout, LogitRules())
    assert calls.names[SDPA] == 2
    assert calls.names[ONEDNN] == 2 * 2 * (2 + 2 + 1)  # products, key heads, blocks of queries
    first = 0
    for length in lengths:
        own = slice(first, first + length)
        expected = plain((query[own], key[own], value[own]), None, True)
        torch.testing.assert_close(out[own].double(), expected, rtol=1e-5, atol=1e-5)
        first += length
