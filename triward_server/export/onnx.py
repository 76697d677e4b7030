"""The vision tower and the value head as ONNX graphs.

`VisionGraph` computes what `vision.VisionTower` does, from the same layers, in a form that a graph
can hold: attention runs over rectangles of padded windows and frames, which `onnx_inputs.py` lays
out, and nothing is written in place.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

from .. import schema
from ..backend.onnx_inputs import graph_inputs
from ..backend.onnx_runner import VISION_FILE
from ..engine.vision import VisionAttention, VisionBlock, VisionTower
from ..errors import ConfigError
from ..schema import Grid
from .options import OPSET

VALUE_HEAD_FILE = "value_head.onnx"
_EXTERNAL_BYTES = 1024  # tensors from this size on are kept beside the graph
# How many leading axes vary, of each of `schema.VISION_INPUTS`.
_VARIABLE = (1, 1, 2, 1, 2, 1)


class VisionGraph(nn.Module):
    """The tower's arithmetic without control flow that depends on values.

    Args:
        tower: whose weights it shares.
    """

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower
        config = tower.config
        half = config.hidden_size // config.num_heads // 2
        steps = torch.arange(0, half, 2, dtype=torch.float32) / half
        self.register_buffer("inverse", 1.0 / config.rope_theta**steps)

    def forward(
        self,
        patches: Tensor,
        positions: Tensor,
        windows: Tensor,
        window_places: Tensor,
        frames: Tensor,
        frame_places: Tensor,
    ) -> Tensor:
        """Encode images.

        Args:
            patches: float32 [P, channels * frames * patch * patch].
            positions: int64 [P, 2], row and column of each patch.
            windows: int64 [W, L], the patches of each window, padded with -1.
            window_places: int64 [P], where each patch is in `windows`, flattened.
            frames: int64 [F, K], the same for whole images, and each pair of a video's frames.
            frame_places: int64 [P].

        Returns:
            float32 [M, out], tokens in the order of their patches.
        """
        tower = self.tower
        x = tower.patch_embed(patches)
        inverse = self.get_buffer("inverse")
        angles = (positions[..., None].float() * inverse).flatten(1)
        rotary = (angles.cos()[:, None], angles.sin()[:, None])
        for index, block in enumerate(tower.blocks):
            assert isinstance(block, VisionBlock)
            whole = index in tower.config.fullatt_block_indexes
            rectangle = (frames, frame_places) if whole else (windows, window_places)
            x = x + _attention(block.attn, block.norm1(x), rotary, *rectangle)
            x = x + block.mlp(block.norm2(x))
        out: Tensor = tower.merger(x).float()
        return out


def _attention(
    attention: VisionAttention,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    rectangle: Tensor,
    places: Tensor,
) -> Tensor:
    """[P, dim] -> [P, dim], each row of the rectangle [N, L] by itself."""
    heads = attention.heads
    rotated, value = attention.qkv(x).unflatten(-1, (3 * heads, -1)).split([2 * heads, heads], 1)
    query, key = _rotate(rotated, *rotary).chunk(2, dim=1)
    # -1 reads the last row, which the mask then hides. There is no row of padding alone.
    q, k, v = (each[rectangle].transpose(1, 2) for each in (query, key, value))
    # Not left to broadcasting: ONNX Runtime's Attention wants a row of the mask for each query.
    mask = (rectangle >= 0)[:, None, None].expand(-1, -1, rectangle.shape[1], -1)
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    rows = attended.transpose(1, 2).flatten(2).flatten(0, 1)[places]
    out: Tensor = attention.proj(rows)
    return out


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`vision.rotate_` of heads [P, H, D] by float32 [P, 1, D / 2], not in place."""
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(heads.dtype)


def export_vision(tower: VisionTower, folder: Path, opset: int = OPSET) -> None:
    """Write `vision.onnx`, and its weights beside it as `vision.onnx.data`.

    Args:
        tower: in float32 on the CPU.
        folder: where to.
        opset: version of ONNX's operators.

    Raises:
        ConfigError: onnx or onnxscript is not installed.
    """
    cut = tower.cut
    grids = [Grid(1, n * cut.merge_size, (n + 2) * cut.merge_size) for n in (5, 6)]
    shapes = [(grid.h * cut.patch_size, grid.w * cut.patch_size, 3) for grid in grids]
    example = graph_inputs([np.zeros(shape, np.uint8) for shape in shapes], grids, cut)
    inputs = {
        tensor.name: (torch.from_numpy(example[tensor]), variable)
        for tensor, variable in zip(schema.VISION_INPUTS, _VARIABLE, strict=True)
    }
    graph = VisionGraph(tower).eval()
    _export(graph, inputs, schema.EMBEDDINGS.name, folder / VISION_FILE, opset)


def export_value_head(head: nn.Module, folder: Path, opset: int = OPSET) -> None:
    """Write `value_head.onnx`: `hidden` float32 [C, dim] in, `scores` float32 [C] out.

    Args:
        head: on the CPU.
        folder: where to.
        opset: version of ONNX's operators.

    Raises:
        ConfigError: onnx or onnxscript is not installed.
    """
    hidden = torch.zeros(3, next(head.parameters()).shape[-1])
    inputs = {"hidden": (hidden, 1)}
    _export(head, inputs, schema.SCORES.name, folder / VALUE_HEAD_FILE, opset)


def _export(
    module: nn.Module,
    inputs: dict[str, tuple[Tensor, int]],
    output: str,
    file: Path,
    opset: int,
) -> None:
    """Write a checked graph; a protobuf message holds 2 GB, so large tensors go beside it.

    Args:
        module: whose forward takes the inputs in their order.
        inputs: of each an example, and how many of its leading axes may have another length.
        output: name of what it returns.
        file: where to.
        opset: version of ONNX's operators.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - what torch's exporter is made of
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, which writes graphs; "
            "pip install 'triward-server[onnx]'"
        ) from None
    with torch.inference_mode():
        program = torch.onnx.export(
            module, tuple(example for example, _ in inputs.values()), dynamo=True,
            dynamic_shapes=[dict.fromkeys(range(n), Dim.DYNAMIC) for _, n in inputs.values()],
            input_names=list(inputs), output_names=[output], opset_version=opset, verbose=False,
        )  # fmt: skip
    assert program is not None
    onnx.save_model(
        program.model_proto, str(file), save_as_external_data=True,
        location=f"{file.name}.data", size_threshold=_EXTERNAL_BYTES,
    )  # fmt: skip
    onnx.checker.check_model(str(file), full_check=True)
    for written in file.parent.glob(f"{file.name}*"):
        written.chmod(0o644)  # onnx writes weights that only their owner may read
