"""The model that is planned for: of a checkpoint, a repository, or by name; no weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..config import Dtype, ForwardConfig, from_strings
from ..engine.backbone import RewardModel
from ..engine.checkpoint import Blueprint, empty_model, load_config, read_blueprint
from ..engine.decoder import DecoderConfig, Rope
from ..engine.float8 import E4M3, activations
from ..engine.geometry import Geometry
from ..engine.naming import PLAIN
from ..engine.planning import Cost
from ..engine.towers import cut_of
from ..engine.vision import Tower
from ..errors import ConfigError
from ..schema import FRAMES_PER_GRID, ModelNames
from ..serving.integrity import read_manifest
from ..serving.repository import pinned, served_models


@dataclass(frozen=True)
class Named:
    """Dimensions of a published reward model, or of a random checkpoint; `vision`: its tower's.

    `vision` has width, width inside the MLP, depth, heads and the blocks that see a whole image.
    """

    title: str
    vocab_size: int
    positions: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vision: tuple[int, int, int, int, tuple[int, ...]] | None = None


NAMED = {
    "7b": Named(
        "Skywork-VL-Reward-7B", 152_064, 128_000, 3584, 18_944, 28, 28, 4,
        (1280, 3420, 32, 16, (7, 15, 23, 31)),
    ),
    "llama-8b": Named(
        "Skywork-Reward-Llama-3.1-8B", 128_256, 131_072, 4096, 14_336, 32, 32, 8
    ),
    "small": Named(
        "the random checkpoint `small`", 4096, 32_768, 512, 1536, 12, 8, 2,
        (256, 768, 8, 4, (3, 7)),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model as far as a plan needs it.

    Attributes:
        title: what it is, for people.
        geometry: patches, tokens and positions.
        cost: the planner's, of what a pass takes.
        weights: bytes on the device.
        key_bytes: keys and values of one token in the prefix cache.
        dtype: in which it is served.
        forward: budgets and caches, of the repository or the defaults.
        exported: whether a repository says the budgets.
        checkpoint: its folder; None: a model by name.
    """

    title: str
    geometry: Geometry
    cost: Cost
    weights: int
    key_bytes: int
    dtype: Dtype
    forward: ForwardConfig
    exported: bool = False
    checkpoint: Path | None = None


def subject_of(
    name: str, checkpoint: Path | None, repository: Path | None, dtype: Dtype | None
) -> Subject:
    """Describe a model.

    Args:
        name: a key of `NAMED`, where neither of the next two is given.
        checkpoint: a folder with its configuration and processor files.
        repository: what `triward-server export` wrote; its first model's served version.
        dtype: None: the repository's, else bfloat16.

    Raises:
        ConfigError: the name is not known, or two sources are given.
        CheckpointError: the folder holds no model that can be served.
        LaunchError: the repository is none.
    """
    if checkpoint and repository:
        raise ConfigError(f"--checkpoint {checkpoint} and --repository {repository}: give one")
    if repository:
        return _exported(repository, dtype)
    forward = ForwardConfig(dtype=dtype or "bfloat16")
    if checkpoint:
        blueprint = read_blueprint(checkpoint, load_config(checkpoint))
        return replace(_subject(str(checkpoint), blueprint, forward), checkpoint=checkpoint)
    if name not in NAMED:
        raise ConfigError(f"--model {name!r}: one of {', '.join(NAMED)}; --checkpoint for others")
    return _subject(NAMED[name].title, blueprint_of(NAMED[name]), forward)


def _exported(repository: Path, dtype: Dtype | None) -> Subject:
    names = served_models(repository)[0]
    version = pinned(repository, names)
    options = _options(repository, names, version)
    forward = from_strings(ForwardConfig, {k: str(v) for k, v in options["forward"].items()})
    if dtype and dtype != forward.dtype:
        raise ConfigError(f"--dtype {dtype}: {repository} was exported with {forward.dtype}")
    checkpoint = repository / names.forward / version / "checkpoint"
    blueprint = read_blueprint(checkpoint, load_config(checkpoint))
    title = f"{names.ensemble} version {version} of {repository}"
    return replace(_subject(title, blueprint, forward), exported=True)


def _options(repository: Path, names: ModelNames, version: str) -> dict[str, Any]:
    options: dict[str, Any] = read_manifest(repository, names, version)["options"]
    return options


def _subject(title: str, blueprint: Blueprint, forward: ForwardConfig) -> Subject:
    dtype = activations(forward.dtype)
    aligned = blueprint.aligned()
    model = empty_model(aligned, dtype, float8=forward.dtype == "float8")
    decoder = blueprint.decoder
    return Subject(
        title,
        blueprint.geometry,
        model.cost,
        _weight_bytes(model, dtype.itemsize),
        2 * decoder.layers * decoder.kv_heads * decoder.head_dim * dtype.itemsize,
        forward.dtype,
        forward,
    )


def _weight_bytes(model: RewardModel, itemsize: int) -> int:
    """Bytes of the weights once they are loaded; before that all are float32 or float8."""
    in_full = (f"{model.head}.",)

    def size(name: str, weight: Tensor) -> int:
        if weight.dtype == E4M3:
            return weight.numel()
        wide = name.startswith(in_full) or name.endswith(".scale")
        return weight.numel() * (4 if wide else itemsize)

    return sum(size(name, weight) for name, weight in model.named_parameters())


def blueprint_of(named: Named) -> Blueprint:
    """Return a model of these dimensions, as its own files would describe it."""
    head_dim = named.hidden // named.heads
    inverse = tuple((1.0 / 1e6 ** (np.arange(0, head_dim, 2) / head_dim)).tolist())
    decoder = DecoderConfig(
        vocab_size=named.vocab_size, positions=named.positions, hidden=named.hidden,
        inner=named.inner, heads=named.heads, kv_heads=named.kv_heads, head_dim=head_dim, eps=1e-6,
        rope=Rope(inverse, 1.0, (head_dim // 2,)), windows=(None,) * named.layers,
        qkv_bias=named.vision is not None, qk_norm=False, activation="silu", norm_offset=0.0,
        sandwich=False, embedding_scale=1.0, scale=head_dim**-0.5, softcap=None, media_rank=0,
    )  # fmt: skip
    tower = None if named.vision is None else _tower(named)
    geometry = Geometry(
        image_token_id=None if tower is None else 0,
        patch_size=1 if tower is None else tower.patch_size,
        merge_size=1 if tower is None else tower.spatial_merge_size,
        vocab_size=named.vocab_size,
        max_tokens=named.positions,
    )
    plain = (0.5,) * 3  # normalising costs nothing that is planned
    cut = None if tower is None else cut_of(tower, FRAMES_PER_GRID, tower.window, plain, plain)
    head = "v_head" if tower else "score"
    return Blueprint(geometry, decoder, tower, cut, head, PLAIN)


def _tower(named: Named) -> Tower:
    assert named.vision is not None
    hidden, inner, depth, heads, whole = named.vision
    return Tower(depth, hidden, inner, heads, named.hidden, 14, 2, 112, whole, 10_000.0)
