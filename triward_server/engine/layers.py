"""Layers that language models and vision towers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding, computed in float32 and written in place.

    Args:
        heads: [T, H, D]; the two halves of D are paired.
        cos: float32 [T, D / 2].
        sin: likewise.
    """
    first, second = heads.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.addcmul(first * cos, second, sin, value=-1)
    heads_first, heads_second = heads.chunk(2, dim=-1)
    heads_second.copy_(torch.addcmul(second * cos, first, sin))
    heads_first.copy_(turned)


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467): float32 in, the weight's dtype out.

    `offset` is added to the weight (Gemma's are stored around 0).

    Its input is the residual stream, which both towers keep in float32 whatever their dtype: what
    is added up over dozens of layers is where bf16 would lose most.
    """

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        # Written out: without a compiler, torch's rms_norm reads and writes more on a CPU.
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        scale = (square / x.shape[-1] + self.eps).rsqrt()
        # Added in float32: in bfloat16 most weights that are meant as 1 + w would be lost.
        weight = self.weight.float() + self.offset if self.offset else self.weight
        out: Tensor = (x * scale).mul_(weight).to(self.weight.dtype)
        return out


def row_bytes(dim: int, heads: int, inner: int, itemsize: int) -> int:
    """Bytes of a row's intermediate results in a layer, as if nothing were freed early.

    The residual stream and its norm in float32; q, k, v, the attended, the gated MLP.

    Args:
        dim: width of the residual stream.
        heads: values of q, k, v and the attended.
        inner: width inside the MLP.
        itemsize: bytes of one activation.
    """
    return 4 * 4 * dim + itemsize * (dim + heads + 3 * inner)


class LowRank(nn.Module):
    """A low-rank update B A (arXiv:2106.09685) of a linear layer, for some rows alone.

    Args:
        inputs: of the layer.
        outputs: likewise.
        rank: of an update.
        parts: matrices of equal height that the layer stacks, each with an update of its own.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, parts: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(parts * rank, inputs))
        self.B = nn.Parameter(torch.empty(outputs, rank))

    def add_(self, y: Tensor, x: Tensor, runs: Tensor, outputs: slice) -> None:
        """Add B A x to some rows of the layer's result, in place.

        Args:
            y: [T, number of outputs].
            x: [T, inputs], what it was made of.
            runs: int64 [R, 2] on the CPU, first and last + 1 of rows that lie one behind the
                other.
            outputs: those that y has; all of them where there are several parts.
        """
        matrix = self.B[outputs]
        if torch.compiler.is_compiling():
            # One call whatever the runs are: a compiler would make code for each number of them.
            _add_low_rank(y, x, self.A, matrix, runs)
        else:
            _add_to_runs(y, x, self.A, matrix, listed(runs))


def listed(runs: Tensor) -> list[list[int]]:
    """Read runs, which are on the CPU: nothing waits."""
    rows: list[list[int]] = runs.tolist()
    return rows


def _add_to_runs(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: list[list[int]]) -> None:
    """Each run is a view, so that nothing is copied."""
    matrices = b.t().chunk(len(a) // b.shape[1], dim=1)
    for first, end in runs:
        if first < end:
            low = F.linear(x[first:end], a).chunk(len(matrices), dim=1)
            parts = y[first:end].chunk(len(matrices), dim=1)
            for part, rows, matrix in zip(parts, low, matrices, strict=True):
                part.addmm_(rows, matrix)  # the sum is rounded once


@torch.library.custom_op("triward::add_low_rank", mutates_args=["y"])
def _add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: Tensor) -> None:
    _add_to_runs(y, x, a, b, listed(runs))


@_add_low_rank.register_fake
def _(y: Tensor, x: Tensor, a: Tensor, b: Tensor, runs: Tensor) -> None:
    return None


class Linear(nn.Linear):
    """A linear layer of which some outputs can be asked for.

    Args:
        inputs: width of what goes in.
        outputs: width of what comes out.
        bias: whether one is added.
        rank: of an update for rows of media alone; 0: all rows are alike.
        parts: see `LowRank`.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, rank: int = 0, parts: int = 1
    ) -> None:
        super().__init__(inputs, outputs, bias)
        self.plora = LowRank(inputs, outputs, rank, parts) if rank else None

    def forward(self, x: Tensor, media: Tensor | None = None) -> Tensor:
        """[T, inputs] -> [T, outputs]; `media`: the runs of rows that get the update."""
        return self.part(x, slice(None), media)

    def part(self, x: Tensor, outputs: slice, media: Tensor | None = None) -> Tensor:
        """Compute these outputs alone: [T, inputs] -> [T, their number]."""
        bias = None if self.bias is None else self.bias[outputs]
        return updated(F.linear(x, self.weight[outputs], bias), self.plora, x, media, outputs)


def updated(
    y: Tensor, plora: LowRank | None, x: Tensor, media: Tensor | None, outputs: slice
) -> Tensor:
    """Add a layer's low-rank update to its result; there are runs only where there is an update."""
    if media is not None:
        assert plora is not None
        plora.add_(y, x, media, outputs)
    return y


class GatedMLP(nn.Module):
    """Gated linear unit (arXiv:2002.05202); gate and up projections are one matrix."""

    def __init__(
        self, dim: int, inner: int, bias: bool, activation: str = "silu", rank: int = 0
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up_proj = Linear(dim, 2 * inner, bias, rank, parts=2)
        self.down_proj = Linear(inner, dim, bias, rank)

    def forward(self, x: Tensor, media: Tensor | None = None) -> Tensor:
        """[T, dim] -> [T, dim]; `media` as in `Linear`."""
        gate, up = self.gate_up_proj(x, media).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate).mul_(up), media)
        return out
