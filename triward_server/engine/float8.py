"""Linear layers in float8: weights by output channel, activations by row, each with a scale.

A row x is held as e4m3(x / s) with s = max |x| / 448, so that its largest value is the largest of
e4m3 and nothing overflows. A product is a sum in float32 times both scales, rounded to bfloat16.
On CUDA that is `torch._scaled_mm`; elsewhere the same is computed from the float8 values in
float32: slower than bfloat16, but nearly the GPU's numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Dtype
from ..errors import CheckpointError, ConfigError
from .layers import Linear, LowRank, linear, updated

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
# Of a row of zeros too: 0 / 0 would be NaN.
_LEAST_SCALE = torch.finfo(torch.float32).tiny
# The kernel's: rows and columns of a weight come in multiples of this.
ALIGNMENT = 16
_CAPABILITY = (8, 9)  # of the first GPUs that multiply float8
_CHUNK = 2**24  # weights that are quantised at once, 64 MiB in float32
# Bytes of a value that is multiplied, beside its bfloat16: quotient in float32, e4m3.
EXTRA_BYTES = 5


class Float8Linear(nn.Module):
    """A linear layer with weights in e4m3; bfloat16 in and out.

    Args:
        inputs: a multiple of `ALIGNMENT`.
        outputs: likewise.
        bias: whether one is added; in bfloat16.
        plora: an update for rows of media, which stays in bfloat16.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, plora: LowRank | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=E4M3), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(outputs, 1, dtype=torch.float32), requires_grad=False)
        shape = (outputs,) if bias else None
        self.bias = None if shape is None else nn.Parameter(torch.empty(shape))
        self.plora = plora

    def forward(self, x: Tensor, media: Tensor | None = None) -> Tensor:
        """bfloat16 [T, inputs] -> [T, outputs]; `media` as in `layers.Linear`."""
        return self.part(x, slice(None), media)

    def part(self, x: Tensor, outputs: slice, media: Tensor | None = None) -> Tensor:
        """Compute some outputs alone; the slice begins and ends at multiples of `ALIGNMENT`."""
        bias = None if self.bias is None else self.bias[outputs]
        values, scale = quantise(x)
        y = multiply(values, scale, self.weight[outputs], self.scale[outputs], bias)
        return updated(y, self.plora, x, media, outputs)


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[R, K] -> e4m3 [R, K] and float32 scales [R, 1].

    A row with a value that is not finite has a scale that is not, so that no product with it is.
    """
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True).float()
    scale = (largest / LARGEST).clamp(min=_LEAST_SCALE)
    return (rows / scale).to(E4M3), scale


def multiply(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply e4m3 values [T, K] by weights [N, K]; scales are float32 [T, 1] and [N, 1].

    Returns:
        bfloat16 [T, N].
    """
    if values.device.type == "cuda":
        # Sums in float32 to the end: the kernel's fast sums keep 14 bits of a product on H100.
        out: Tensor = torch._scaled_mm(
            values, weight.t(), scale, weight_scale.t(), bias,
            out_dtype=torch.bfloat16, use_fast_accum=False,
        )  # fmt: skip
        return out
    product = linear(values.float(), weight.float()).mul_(scale).mul_(weight_scale.t())
    return (product if bias is None else product.add_(bias)).to(torch.bfloat16)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise` for what is large: a few rows at a time, with little memory beside the result."""
    values = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    scale = torch.empty(len(weight), 1, device=weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    for first in range(0, len(weight), rows):
        chunk = slice(first, first + rows)
        values[chunk], scale[chunk] = quantise(weight[chunk].float())
    return values, scale


def replace_linears(layers: nn.Module) -> None:
    """Put float8 layers in the place of all linear ones, without weights, on the meta device.

    Raises:
        CheckpointError: a layer's width is no multiple of `ALIGNMENT`.
    """
    for module_name, module in list(layers.named_modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, Linear):
                continue
            inputs, outputs = child.in_features, child.out_features
            for width in (inputs, outputs):
                if width % ALIGNMENT:
                    raise CheckpointError(
                        f"dtype float8: {module_name}.{name} is {inputs} to {outputs} wide, "
                        f"only multiples of {ALIGNMENT} can be multiplied"
                    )
            with torch.device("meta"):
                new = Float8Linear(inputs, outputs, child.bias is not None, child.plora)
            setattr(module, name, new)


def weights_of(model: nn.Module) -> frozenset[str]:
    """Return the names of the weights that are held in float8."""
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, Float8Linear)
    )


def activations(dtype: Dtype) -> torch.dtype:
    """Return the dtype of what is computed between float8 layers, or of everything."""
    return {"float32": torch.float32}.get(dtype, torch.bfloat16)


def check_float8(device: torch.device) -> None:
    """Raise `ConfigError` for a GPU that does not multiply float8."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise ConfigError(
            f"dtype float8: {torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, capability))}, at least {'.'.join(map(str, _CAPABILITY))} is "
            "needed; dtype bfloat16 runs there"
        )
