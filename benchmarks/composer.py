"""IXC-2.5-Reward: its own loop, restated, and our Scorer; and what its partial LoRA costs.

    python -m benchmarks.composer --size small --repeats 5 --output results.json

The loop scores one conversation at a time, as the published `get_score` does; here it is the
project's restatement of it in float32, with torch's fused attention. Both read the same token ids
and canvases, made at random: what the score is worth does not depend on them. The Scorer runs with
the updates of its linear layers for tokens of images, and without. No Triton.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.commands import run_main
from benchmarks.measure import in_turns, machine, row, scores, work, writable
from triward_server.config import ForwardConfig
from triward_server.engine.geometry import Geometry
from triward_server.engine.scoring import Scorer
from triward_server.export.ixc_network import IxcNetwork
from triward_server.export.ixc_reference import IxcOracle
from triward_server.export.options import Size
from triward_server.export.random_ixc_checkpoint import make_ixc_checkpoint
from triward_server.schema import Features

LOOP = "its own loop, one by one"
OURS = "Scorer, in-process"
WITHOUT = "Scorer, without the updates for images"
_TILES = ((1, 1), (1, 2), (2, 2), (2, 3))  # rows and columns of a single conversation's image
_PROMPT, _RESPONSE = 60, 120  # tokens of text


def batches_of(geometry: Geometry) -> dict[str, list[Features]]:
    """Make the batches, by name."""
    rng = np.random.default_rng(0)
    side = (geometry.tile or 1) * geometry.patch_size

    def request(rows: int, columns: int, responses: int) -> Features:
        image = rng.integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
        count = geometry.tokens(geometry.grid(image))
        shown = np.full(count, geometry.image_token_id or 0, np.int32)
        text = rng.integers(300, 1500, _PROMPT).astype(np.int32)
        answers = tuple(
            rng.integers(300, 1500, _RESPONSE).astype(np.int32) for _ in range(responses)
        )
        for answer in answers:
            answer[-1] = geometry.read_id
        return Features(np.concatenate([[1], shown, text]).astype(np.int32), answers, (image,))

    return {
        "8 single conversations, 1 to 6 tiles": [request(*size, 1) for size in _TILES * 2],
        "8 responses, one request, 6 tiles": [request(2, 3, 8)],
    }


class _Fused(IxcNetwork):
    """The restatement's networks with torch's attention for all heads at once."""

    def _attention(self, layer: str, x: Tensor, mask: Tensor) -> Tensor:
        groups = self.config["num_key_value_heads"]
        each = self.config["num_attention_heads"] // groups
        rows = self._linear(f"{layer}.attention.wqkv", x, mask).unflatten(1, (groups, each + 2, -1))
        q, k, v = (part.flatten(1, 2).transpose(0, 1) for part in rows.split([each, 1, 1], dim=2))
        angles = self._angles(len(x), q.shape[-1])
        out = scaled_dot_product_attention(
            _turned(q, angles)[None], _turned(k, angles)[None], v[None],
            is_causal=True, enable_gqa=True,
        )  # fmt: skip
        return self._linear(f"{layer}.attention.wo", out[0].transpose(0, 1).flatten(1), mask)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Ways:
    """The ways to score a batch.

    Args:
        checkpoint: a folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        config = ForwardConfig(dtype="float32", device="cpu", prefix_cache_bytes=0)
        # No cache: a pass that repeats must not be faster for it.
        self.scorer = Scorer(checkpoint, replace(config, embedding_cache_bytes=0))
        self._loop = IxcOracle(checkpoint)
        self._loop.network = _Fused(checkpoint)
        self._language = self.scorer._model.language_model
        self._decoder = self._language.decoder

    def all(self) -> dict[str, Callable[[Sequence[Features]], list[float]]]:
        """Return them by name."""
        return {LOOP: self.loop, OURS: self.ours, WITHOUT: self.without}

    def loop(self, batch: Sequence[Features]) -> list[float]:
        """Score one conversation after the other."""
        return [
            self._loop.score_inputs([*item.prompt_ids.tolist(), *ids.tolist()], item.media)
            for item in batch
            for ids in item.response_ids
        ]

    def ours(self, batch: Sequence[Features]) -> list[float]:
        """Score all as one batch."""
        return scores(self.scorer, batch)

    def without(self, batch: Sequence[Features]) -> list[float]:
        """Score as if images' tokens were text, which are other scores."""
        self._language.decoder = replace(self._decoder, media_rank=0)
        try:
            return scores(self.scorer, batch)
        finally:
            self._language.decoder = self._decoder


def measure(ways: Ways, batch: Sequence[Features], repeats: int) -> dict[str, Any]:
    """Median seconds of each way, taken in turns."""
    reference = np.array(ways.loop(batch))
    distance = np.abs(np.array(ways.ours(batch)) - reference) / np.maximum(1, np.abs(reference))
    seconds = in_turns({name: partial(way, batch) for name, way in ways.all().items()}, repeats)
    rows = {name: row(taken, len(reference)) for name, taken in seconds.items()}
    for each in rows.values():
        each["speedup"] = round(rows[LOOP]["median_s"] / each["median_s"], 3)
    paired = np.array([seconds[OURS], seconds[WITHOUT]])
    predicted = work(batch, ways.scorer.geometry, ways.scorer.cost)
    return {
        "conversations": len(reference),
        "ideal_speedup": round(predicted.flops_alone / predicted.flops, 3),
        "max_relative_distance": float(distance.max()),
        "updates_share": round(float(np.median(1 - paired[1] / paired[0])), 4),
        "updates_share_of_flops": round(_share(ways, batch), 4),
        "paths": rows,
    }


def _share(ways: Ways, batch: Sequence[Features]) -> float:
    cost = ways.scorer.cost
    geometry = ways.scorer.geometry
    plain = work(batch, geometry, replace(cost, per_media_token=0))
    return 1 - plain.flops / work(batch, geometry, cost).flops


def main(
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "small",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file that gets the rows.")] = None,
) -> None:
    """Measure all ways side by side on this machine's CPU, in float32."""
    writable(output)
    results: dict[str, Any] = {"machine": machine(), "size": size, "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        make_ixc_checkpoint(size, 0, checkpoint)
        ways = Ways(checkpoint)
        results["workloads"] = {
            name: measure(ways, batch, repeats)
            for name, batch in batches_of(ways.scorer.geometry).items()
        }
    text = json.dumps(results, indent=2)
    print(text)
    if output:
        output.write_text(text + "\n")


if __name__ == "__main__":
    run_main(main)
