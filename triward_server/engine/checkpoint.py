"""Strict loading: every tensor of a checkpoint is accounted for, or there is no model.

Which architecture and which head a checkpoint has is read from its files.

The card's own `load_state_dict(strict=False)` hides a missing value head and scores with a random
one. Here the expected names and shapes come from transformers' own model built from the same
config, on the meta device; a tensor that is missing, unexpected or of another shape is an error
that names it. So is a weight that is NaN or infinite.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from ..errors import CheckpointError
from ..model_configs import kind_of
from .architectures import ARCHITECTURES, Architecture, Head, Vision
from .architectures.fields import Fields
from .backbone import HEADS, Encoder, RewardModel
from .decoder import DecoderConfig
from .float8 import weights_of
from .geometry import Geometry
from .naming import Naming, canonical_name
from .processors import Pixels, load_pixels
from .towers import Cut, MediaTower, TowerConfig
from .vision import VisionTower
from .weights import (
    VALUE_HEAD_FILE,
    has_tensor,
    open_tensors,
    read_state,
    weight_files,
    widen_gated_mlps,
)

_VISION = "visual."

# Matrices whose rows begin at multiples of 128 bytes are multiplied faster on a GPU; Qwen2.5-VL's
# vision tower is 3,420 wide inside.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Blueprint:
    """Description of a model, read from all of a checkpoint's files but the weights.

    Attributes:
        geometry: how a batch of it is laid out.
        decoder: what the language model computes.
        tower: what the vision tower computes; None: a text model.
        cut: how media become the tower's patches; None with it.
        head: which of `backbone.HEADS`.
        naming: how the checkpoint's tensors become ours.
    """

    geometry: Geometry
    decoder: DecoderConfig
    tower: TowerConfig | None
    cut: Cut | None
    head: str
    naming: Naming

    def vision(self) -> MediaTower | None:
        """Return a tower without weights, on torch's default device."""
        if self.tower is None or self.cut is None:
            return None
        return self.tower.build(self.cut)

    def aligned(self) -> Blueprint:
        """Return the same model, its tower's inner width a multiple of `_ALIGNMENT`."""
        return self if self.tower is None else replace(self, tower=self.tower.aligned(_ALIGNMENT))


def load_config(checkpoint: Path) -> Any:
    """Return the checkpoint's model configuration.

    Raises:
        CheckpointError: there is none, or the architecture is not one of `ARCHITECTURES`.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is {checkpoint} a checkpoint's folder?")
    try:
        written = json.loads(path.read_text())
        model_type = written["model_type"]
        kind = kind_of(written)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no model_type: {type(error).__name__}: {error}") from None
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: model_type {model_type!r} is not supported, only {known}")
    for part in (written, *(value for value in written.values() if isinstance(value, dict))):
        if part.get("per_layer_config"):  # transformers would answer for no layer in particular
            raise CheckpointError(f"{path}: per_layer_config is not supported, layers are alike")
    try:
        if kind != model_type:  # which `AutoConfig` would read as another class's
            return CONFIG_MAPPING[kind].from_dict(written | {"model_type": kind})
        return AutoConfig.from_pretrained(checkpoint)
    except Exception as error:  # transformers raises many types
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from None


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a configuration of `load_config`."""
    return ARCHITECTURES[config.model_type]


def head_of(checkpoint: Path, config: Any) -> Head:
    """Return the head: trl's value head, transformers' classification head, or the class's own.

    Raises:
        CheckpointError: none, or two of them, or one of several labels.
    """
    classes, architecture = list(config.architectures or ()), architecture_of(config)
    valued = (checkpoint / VALUE_HEAD_FILE).is_file()
    own = next((architecture.heads[name] for name in classes if name in architecture.heads), None)
    classifies = any(name.endswith("ForSequenceClassification") for name in classes)
    if (classifies or own is not None) == valued:
        found = "both" if valued else "neither"
        kinds = " or ".join(["a ForSequenceClassification", *architecture.heads])
        raise CheckpointError(
            f"{checkpoint}: a reward model has {VALUE_HEAD_FILE} or is {kinds} in config.json; "
            f"this is {found} (architectures {classes})"
        )
    if valued:
        return Head("v_head")
    if own is not None:
        return own
    if config.num_labels != 1:
        raise CheckpointError(
            f"{checkpoint}: the head has {config.num_labels} labels, only 1 works"
        )
    biased = has_tensor(checkpoint, "score.bias")
    return Head("biased_score" if biased else "score", padding="last")


def read_blueprint(checkpoint: Path, config: Any) -> Blueprint:
    """Read all that a configuration of `load_config` says.

    Raises:
        CheckpointError: it asks, by whatever field, for what is not computed here.
    """
    fields, architecture = Fields(config), architecture_of(config)
    head = head_of(checkpoint, config)
    if head in architecture.heads.values():
        fields.ignore("auto_map")  # remote code, for which the head stands
    decoder = architecture.decoder(fields)
    vision, pixels = None, None
    if architecture.vision is not None:
        vision = architecture.vision(fields)
        pixels = load_pixels(checkpoint, vision)
    geometry = _geometry(fields, decoder, vision, pixels, head)
    fields.refuse_unread(f"{checkpoint / 'config.json'}", config.model_type)
    tower, cut = (None, None) if vision is None or pixels is None else (vision.tower, pixels.cut)
    naming = architecture.naming(decoder)
    return Blueprint(geometry, decoder, tower, cut, head.kind, naming)


def check_tensors(checkpoint: Path) -> Blueprint:
    """Check the configuration, and names and shapes of all tensors, without reading any data.

    Raises:
        CheckpointError: see `read_blueprint`; or naming the first tensors that are missing,
            unexpected, twice there or of a wrong shape.
    """
    config = load_config(checkpoint)
    blueprint = read_blueprint(checkpoint, config)
    expected = _expected_shapes(config, blueprint)
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(checkpoint):
        with open_tensors(file, "cpu") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping, only named like one
                name = blueprint.naming.name(key)
                if name in found:
                    raise CheckpointError(f"{file}: tensor {key!r} is there twice")
                found[name] = tuple(tensors.get_slice(key).get_shape())
    _raise_for("missing", checkpoint, expected.keys() - found.keys())
    # Some savers write a matrix that nothing reads, tied to the embedding or not.
    unread = blueprint.naming.is_unread
    unexpected = {name for name in found.keys() - expected.keys() if not unread(name)}
    _raise_for("unexpected", checkpoint, unexpected)
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            raise CheckpointError(
                f"{checkpoint}: tensor {name!r} has shape {list(found[name])}, "
                f"the configuration asks for {list(expected[name])}"
            )
    return blueprint


def load_model(
    checkpoint: Path,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
    cache_bytes: int = 0,
    encoder: Encoder | None = None,
    float8: bool = False,
) -> RewardModel:
    """Load a verified model for inference.

    Args:
        checkpoint: folder with config, processor and weights.
        dtype: of weights and activations; the head stays float32.
        device: where the weights go, file by file.
        deterministic: see `RewardModel`.
        cache_bytes: see `RewardModel`.
        encoder: likewise; with one the vision tower's weights are not read.
        float8: hold the language model's linears in float8 (`engine/float8.py`).

    Raises:
        CheckpointError: see `verify`; or a weight is not finite; or `float8.replace_linears`.
    """
    blueprint = check_tensors(checkpoint).aligned()
    model = empty_model(blueprint, dtype, deterministic, cache_bytes, encoder, float8)

    def wanted(name: str) -> bool:
        return not (encoder and _is(_VISION, name))

    in_float8 = weights_of(model)
    state = read_state(checkpoint, dtype, device, wanted, in_float8, blueprint.naming)
    if blueprint.tower is not None:
        widen_gated_mlps(state, _VISION, blueprint.tower.intermediate_size)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def empty_model(
    blueprint: Blueprint,
    dtype: torch.dtype,
    deterministic: bool = False,
    cache_bytes: int = 0,
    encoder: Encoder | None = None,
    float8: bool = False,
) -> RewardModel:
    """Return the model without weights, on the meta device; arguments as for `load_model`."""
    with torch.device("meta"):
        model = RewardModel(
            blueprint.geometry,
            blueprint.decoder,
            blueprint.vision() if encoder is None else None,
            blueprint.head,
            dtype,
            deterministic,
            cache_bytes,
            encoder,
        )
    if float8:
        model.hold_in_float8()
    return model


def load_cut(checkpoint: Path) -> tuple[Cut, int]:
    """Return how a checkpoint cuts media, and the width of their embeddings.

    Raises:
        CheckpointError: see `read_blueprint`; or it is a text model.
    """
    blueprint = read_blueprint(checkpoint, load_config(checkpoint))
    if blueprint.tower is None or blueprint.cut is None:
        raise CheckpointError(f"{checkpoint}: the model has no vision tower")
    return blueprint.cut, blueprint.tower.out_hidden_size


def load_vision(checkpoint: Path) -> tuple[VisionTower, nn.Module]:
    """Return the vision tower and the head alone, in float32 on the CPU.

    Raises:
        CheckpointError: see `verify`; or it is a text model.
    """
    blueprint = check_tensors(checkpoint)
    with torch.device("meta"):
        tower, kind = blueprint.vision(), HEADS[blueprint.head]
        head = kind.make(blueprint.decoder.hidden)
    if tower is None:
        raise CheckpointError(f"{checkpoint}: the model has no vision tower")
    if not isinstance(tower, VisionTower):
        raise CheckpointError(f"{checkpoint}: no ONNX graph of a {type(tower).__name__} is made")
    for prefix, module in ((_VISION, tower), (f"{kind.prefix}.", head)):
        cpu, wanted = torch.device("cpu"), partial(_is, prefix)
        state = read_state(checkpoint, torch.float32, cpu, wanted, naming=blueprint.naming)
        names = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        module.load_state_dict(names, strict=True, assign=True)
        module.requires_grad_(False).eval()
    return tower, head


def _geometry(
    fields: Fields,
    decoder: DecoderConfig,
    vision: Vision | None,
    pixels: Pixels | None,
    head: Head,
) -> Geometry:
    if vision is None or pixels is None:
        return Geometry(
            image_token_id=None,
            patch_size=1,
            merge_size=1,
            vocab_size=decoder.vocab_size,
            max_tokens=decoder.positions,
            **_read(fields, head),
        )
    return Geometry(
        image_token_id=vision.image_token_id,
        patch_size=vision.tower.patch_size,
        merge_size=vision.tower.spatial_merge_size,
        vocab_size=decoder.vocab_size,
        max_tokens=decoder.positions,
        video_token_id=vision.video_token_id,
        tokens_per_second=vision.tokens_per_second,
        video_limits=pixels.video_limits,
        tile=vision.tower.tile,
        **_read(fields, head),
    )


def _read(fields: Fields, head: Head) -> dict[str, Any]:
    """Where in a conversation the head is read."""
    return {
        "padding_id": fields.text.pad_token_id if head.padding else None,
        "any_padding": head.padding == "first",
        "read_id": getattr(fields, head.token) if head.token else None,
    }


def _expected_shapes(config: Any, blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors, by our names."""
    kind = HEADS[blueprint.head]
    with torch.device("meta"):
        head = kind.make(blueprint.decoder.hidden).state_dict()
    shapes = {f"{kind.prefix}.{name}": tuple(tensor.shape) for name, tensor in head.items()}
    architecture = architecture_of(config)
    if architecture.shapes is not None:
        own = architecture.shapes(blueprint.decoder, blueprint.tower)
        return {blueprint.naming.name(key): shape for key, shape in own.items()} | shapes
    auto: Any = AutoModelForImageTextToText if architecture.vision else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            reference = auto.from_config(config, attn_implementation="eager")
    except Exception as error:  # transformers raises many types
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"config.json describes no model: {reason}") from None
    found = {canonical_name(k): tuple(v.shape) for k, v in reference.state_dict().items()}
    # What has a vocabulary's head carries it, tied or not; nothing reads it.
    if blueprint.head != "v_head" or config.tie_word_embeddings:
        found = {
            name: shape for name, shape in found.items() if not blueprint.naming.is_unread(name)
        }
    return found | shapes


def _is(prefix: str, name: str) -> bool:
    return name.startswith(prefix)


def _raise_for(problem: str, checkpoint: Path, names: Iterable[str]) -> None:
    first, *rest = [*sorted(names), None]
    if first is not None:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise CheckpointError(f"{checkpoint}: {problem} tensor {first!r}{more}")
