"""Layers that language models and vision towers share."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() == "x86_64"
_ONEDNN_WEIGHTS = 2**18  # smaller matrices take as long either way, and MKL rounds less

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


def takes_onednn(device: torch.device) -> bool:
    """Return True where oneDNN's products may be asked for; graphs have torch's own operators."""
    traced = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    return _ONEDNN and device.type == "cpu" and not traced


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, inputs] -> [T, outputs]: x Wᵀ + b.

    In float32 on an x86 CPU by oneDNN, which torch has but does not take there: MKL leaves AMD's
    wide vector units idle and takes more than twice as long (`docs/engine.md`). oneDNN adds up
    longer rows at once and rounds 1.5 to 2.2 times as much, a few 1e-7 of a result.
    """
    large = x.dtype == torch.float32 and weight.numel() >= _ONEDNN_WEIGHTS
    if large and takes_onednn(x.device):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer of which some outputs can be asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] -> [T, outputs]."""
        return linear(x, self.weight, self.bias)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """Compute these outputs alone: [T, inputs] -> [T, their number]."""
        bias = None if self.bias is None else self.bias[outputs]
        return linear(x, self.weight[outputs], bias)


class GatedMLP(nn.Module):
    """Gated linear unit (arXiv:2002.05202); gate and up projections are one matrix."""

    def __init__(self, dim: int, inner: int, bias: bool, activation: str = "silu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up_proj = Linear(dim, 2 * inner, bias=bias)
        self.down_proj = Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, dim] -> [T, dim]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self.activation(gate).mul_(up))
        return out
