"""IXC-2.5-Reward's networks, restated in float32: tower, projector, decoder, head.

Part of the plain restatement of IXC-2.5-Reward (`ixc_reference.py`). The tower is transformers'.
`Mistake` names what a wrong implementation would do; with one of them scores must move.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..schema import UInt8Array
from .ixc_pictures import whole_and_tiles

Mistake = Literal[
    "plora on text", "plora off", "separators missing", "tiles in column order",
    "post_layernorm applied", "wqkv as plain blocks", "bilinear without antialias",
    "BOS before the text",
]  # fmt: skip
# CLIP-L/14 of 560 pixels, which the published config.json does not describe.
CLIP_L_560: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 560, "patch_size": 14, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_TOWER = "vit.vision_tower.vision_model."


class _Tensors:
    """Tensors of a checkpoint by their published names, in float32."""

    def __init__(self, checkpoint: Path, device: str | torch.device, streamed: bool) -> None:
        self._device = device
        self._kept: dict[str, Tensor] | None = None if streamed else {}
        self._files: dict[str, Any] = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt", device="cpu")
            self._files |= dict.fromkeys(file.keys(), file)
        self.names = list(self._files)

    def __getitem__(self, name: str) -> Tensor:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        tensor: Tensor = self._files[name].get_tensor(name).to(self._device).float()
        if self._kept is not None:
            self._kept[name] = tensor
        return tensor


class IxcNetwork:
    """Weights of a checkpoint and what is computed with them.

    Args:
        checkpoint: a folder with config.json and safetensors files.
        mistake: what to do wrong.
        device: where it runs.
        streamed: keep the tower alone in memory, and read each tensor of the decoder when used.
    """

    def __init__(
        self,
        checkpoint: Path,
        mistake: Mistake | None = None,
        device: str | torch.device = "cpu",
        streamed: bool = False,
    ) -> None:
        self._mistake = mistake
        self._device = device
        self.config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
        self._tensors = _Tensors(checkpoint, device, streamed)
        vision = CLIPVisionConfig(**self.config.get("vision_config", CLIP_L_560))
        self.tile, self.patch = int(vision.image_size), int(vision.patch_size)
        self._tower: Any = CLIPVisionModel._from_config(
            vision, attn_implementation="eager", dtype=torch.float32
        )
        names = [name for name in self._tensors.names if name.startswith(_TOWER)]
        tower = {name.removeprefix(_TOWER): self._tensors[name] for name in names}
        inner = getattr(self._tower, "vision_model", self._tower)  # a level that 5.18 took away
        inner.load_state_dict(tower, strict=False)
        assert set(dict(inner.named_parameters())) == set(tower)
        self._tower.to(device).eval()

    @torch.inference_mode()
    def embed_canvas(self, canvas: UInt8Array) -> Tensor:
        """Return the vectors [tokens, hidden] that stand for one canvas in the decoder."""
        rows, columns = canvas.shape[0] // self.tile, canvas.shape[1] // self.tile
        images = whole_and_tiles(canvas, self.tile).to(self._device)
        states = self._tower(images, output_hidden_states=True).hidden_states[-1]
        if self._mistake == "post_layernorm applied":
            inner = getattr(self._tower, "vision_model", self._tower)
            states = inner.post_layernorm(states)
        side = self.tile // self.patch
        grids = _merged(states[:, 1:].reshape(len(images), side, side, -1))
        whole, tiles = grids[0], grids[1:]
        if self._mistake == "tiles in column order":
            tiles = tiles.unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
        full = tiles.unflatten(0, (rows, columns)).permute(0, 2, 1, 3, 4)
        full = full.reshape(rows * side // 2, columns * side // 2, -1)
        if self._mistake == "separators missing":
            tokens = torch.cat([whole.flatten(0, 1), full.flatten(0, 1)])
        else:
            separator = self._tensors["plora_glb_GN"][0]
            tokens = torch.cat([self._with_ends(whole), separator, self._with_ends(full)])
        hidden = functional.gelu(self._affine("vision_proj.0", tokens))
        return self._affine("vision_proj.2", hidden)

    def _with_ends(self, grid: Tensor) -> Tensor:
        """Put the sub separator behind every row of [rows, columns, width]."""
        end = self._tensors["plora_sub_GN"][0].expand(len(grid), 1, -1)
        return torch.cat([grid, end], dim=1).flatten(0, 1)

    def _affine(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    def embed_ids(self, ids: list[int]) -> Tensor:
        """Return the vectors [len(ids), hidden] of tokens of text."""
        return self._tensors["model.tok_embeddings.weight"][ids]

    @torch.inference_mode()
    def score(self, embeddings: Tensor, pictured: Tensor) -> float:
        """Return the head's number at the last token.

        Args:
            embeddings: of one sequence, [L, hidden].
            pictured: bool [L], where a picture's vectors stand.
        """
        if self._mistake == "plora on text":
            pictured = torch.ones_like(pictured)
        elif self._mistake == "plora off":
            pictured = torch.zeros_like(pictured)
        x, mask = embeddings, pictured.to(self._device)
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            x = x + self._attention(layer, self._norm(f"{layer}.attention_norm", x), mask)
            normed, mlp = self._norm(f"{layer}.ffn_norm", x), f"{layer}.feed_forward"
            gate = functional.silu(self._linear(f"{mlp}.w1", normed, mask))
            up = self._linear(f"{mlp}.w3", normed, mask)
            x = x + self._linear(f"{mlp}.w2", gate * up, mask)
        last = self._norm("model.norm", x[-1:])
        return float(last @ self._tensors["score.weight"][0])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self._tensors[f"{name}.weight"]

    def _linear(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        """Multiply with a weight; rows of `mask` with its low-rank part, too."""
        y = x @ self._tensors[f"{name}.weight"].T
        low = x[mask] @ self._tensors[f"{name}.Plora_A.weight"].T
        y[mask] += low @ self._tensors[f"{name}.Plora_B.weight"].T
        return y

    def _attention(self, layer: str, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.config["num_attention_heads"]
        groups = self.config["num_key_value_heads"]
        each = heads // groups
        joined = self._linear(f"{layer}.attention.wqkv", x, mask)
        if self._mistake == "wqkv as plain blocks":
            rows = joined.reshape(len(x), heads + 2 * groups, -1)
            q, k, v = rows.split([heads, groups, groups], dim=1)
            q = q.reshape(len(x), groups, each, -1)
        else:
            grouped = joined.reshape(len(x), groups, each + 2, -1)
            q, k, v = grouped[:, :, :each], grouped[:, :, each], grouped[:, :, each + 1]
        turns = self._angles(len(x), q.shape[-1])
        future = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        out = torch.empty_like(q)
        for group in range(groups):  # one at a time: less memory
            key = _turned(k[:, group], turns)
            for head in range(each):
                query = _turned(q[:, group, head], turns)
                products = query @ key.T / q.shape[-1] ** 0.5
                weights = products.masked_fill(future, -torch.inf).softmax(-1)
                out[:, group, head] = weights @ v[:, group]
        return self._linear(f"{layer}.attention.wo", out.reshape(len(x), -1), mask)

    def _angles(self, length: int, width: int) -> Tensor:
        """Return the angles [L, width] by which positions turn, both halves alike."""
        exponents = torch.arange(0, width, 2, device=self._device).float() / width
        rates = 1 / self.config["rope_theta"] ** exponents
        half = torch.arange(length, device=self._device).float()[:, None] * rates
        return torch.cat([half, half], dim=-1)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _merged(grids: Tensor) -> Tensor:
    """Join 2 x 2 neighbours: [N, 2 m, 2 m, width] to [N, m, m, 4 width]."""
    return torch.cat(
        [grids[:, y::2, x::2] for y in (0, 1) for x in (0, 1)],
        dim=-1,
    )
