"""Strict loading: every tensor of a checkpoint is accounted for, or there is no model.

Which architecture and which head a checkpoint has is read from its files.

The card's own `load_state_dict(strict=False)` hides a missing value head and scores with a random
one. Here the expected names and shapes come from transformers' own model built from the same
config, on the meta device; a tensor that is missing, unexpected or of another shape is an error
that names it. So is a weight that is NaN or infinite.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from ..errors import CheckpointError
from .architectures import ARCHITECTURES, Architecture
from .architectures.fields import Fields
from .backbone import HEADS, Encoder, RewardModel, ValueHead
from .decoder import Decoder
from .packing import Geometry
from .processors import Pixels, load_pixels
from .vision import Cut, Tower, VisionTower

logger = logging.getLogger(__name__)

VALUE_HEAD_FILE = "value_head.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Matrices that the model reads as one, in the order in which their rows are stacked.
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PART_OF = {part: (whole, parts) for whole, parts in _JOINED.items() for part in parts}
_PART = re.compile(r"\b(" + "|".join(_PART_OF) + r")\b")

_VISION, _HEAD = "visual.", "v_head."

# Present in every checkpoint, read by no score.
_UNREAD = re.compile(r"^lm_head\.")


@dataclass(frozen=True)
class Blueprint:
    """What a checkpoint's files say of the model, weights aside.

    Attributes:
        geometry: how a batch of it is laid out.
        decoder: what the language model computes.
        tower: what the vision tower computes; None: a text model.
        cut: how media become the tower's patches; None with it.
        head: which of `backbone.HEADS`.
    """

    geometry: Geometry
    decoder: Decoder
    tower: Tower | None
    cut: Cut | None
    head: str

    def vision(self) -> VisionTower | None:
        """A tower without weights, on torch's default device."""
        if self.tower is None or self.cut is None:
            return None
        return VisionTower(self.tower, self.cut)


def load_config(checkpoint: Path) -> Any:
    """The checkpoint's model configuration.

    Raises:
        CheckpointError: there is none, or the architecture is not one of `ARCHITECTURES`.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is {checkpoint} a checkpoint's folder?")
    try:
        written = json.loads(path.read_text())
        model_type = written["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no model_type: {type(error).__name__}: {error}") from None
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: model_type {model_type!r} is not supported, only {known}")
    for part in (written, *(value for value in written.values() if isinstance(value, dict))):
        if part.get("per_layer_config"):  # transformers would answer for no layer in particular
            raise CheckpointError(f"{path}: per_layer_config is not supported, layers are alike")
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except Exception as error:  # transformers raises many types
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from None


def architecture_of(config: Any) -> Architecture:
    """How a configuration of `load_config` is read."""
    return ARCHITECTURES[config.model_type]


def head_of(checkpoint: Path, config: Any) -> str:
    """Which of `backbone.HEADS` scores: trl's value head, or transformers' classification head.

    Raises:
        CheckpointError: neither, or both, or one of several labels.
    """
    classes = list(config.architectures or ())
    classifies = any(name.endswith("ForSequenceClassification") for name in classes)
    valued = (checkpoint / VALUE_HEAD_FILE).is_file()
    if classifies == valued:
        found = "both" if valued else "neither"
        raise CheckpointError(
            f"{checkpoint}: a reward model has {VALUE_HEAD_FILE} or is a ForSequenceClassification "
            f"in config.json; this is {found} (architectures {classes})"
        )
    if valued:
        return "v_head"
    if config.num_labels != 1:
        raise CheckpointError(
            f"{checkpoint}: the head has {config.num_labels} labels, only 1 works"
        )
    if architecture_of(config).vision is not None:
        raise CheckpointError(f"{checkpoint}: {classes[0]} is not supported, only a value head is")
    return "score"


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files that hold the model, a value head last.

    Raises:
        CheckpointError: a file is missing.
    """
    index = checkpoint / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    if (checkpoint / VALUE_HEAD_FILE).is_file():
        names.append(VALUE_HEAD_FILE)
    files = [checkpoint / name for name in names]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
    return files


def read_blueprint(checkpoint: Path, config: Any) -> Blueprint:
    """Read all that a configuration of `load_config` says.

    Raises:
        CheckpointError: it asks, by whatever field, for what is not computed here.
    """
    fields, architecture = Fields(config), architecture_of(config)
    head = head_of(checkpoint, config)
    decoder = architecture.decoder(fields)
    tower, pixels = None, None
    if architecture.vision is not None:
        tower = architecture.vision(fields)
        pixels = load_pixels(checkpoint, tower)
    geometry = _geometry(fields, decoder, tower, pixels, head)
    fields.refuse_unread(f"{checkpoint / 'config.json'}", config.model_type)
    return Blueprint(geometry, decoder, tower, None if pixels is None else pixels.cut, head)


def verify(checkpoint: Path) -> Blueprint:
    """Check the configuration, and names and shapes of all tensors, without reading any data.

    Raises:
        CheckpointError: see `read_blueprint`; or naming the first tensors that are missing,
            unexpected, twice there or of a wrong shape.
    """
    config = load_config(checkpoint)
    blueprint = read_blueprint(checkpoint, config)
    expected = _expected_shapes(config, blueprint.head)
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(checkpoint):
        with _open(file, "cpu") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping, only named like one
                name = canonical_name(key)
                if name in found:
                    raise CheckpointError(f"{file}: tensor {key!r} is there twice")
                found[name] = tuple(tensors.get_slice(key).get_shape())
    _raise_for("missing", checkpoint, expected.keys() - found.keys())
    # Some savers write a matrix that nothing reads, tied to the embedding or not.
    unexpected = {name for name in found.keys() - expected.keys() if not _UNREAD.match(name)}
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
) -> RewardModel:
    """Load a verified model for inference.

    Args:
        checkpoint: folder with config, processor and weights.
        dtype: of weights and activations; the head stays float32.
        device: where the weights go, file by file.
        deterministic: see `RewardModel`.
        cache_bytes: see `RewardModel`.
        encoder: likewise; with one the vision tower's weights are not read.

    Raises:
        CheckpointError: see `verify`; or a weight is not finite.
    """
    model = empty_model(verify(checkpoint), dtype, deterministic, cache_bytes, encoder)
    state = read_state(checkpoint, dtype, device, lambda name: not (encoder and _is(_VISION, name)))
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def empty_model(
    blueprint: Blueprint,
    dtype: torch.dtype,
    deterministic: bool = False,
    cache_bytes: int = 0,
    encoder: Encoder | None = None,
) -> RewardModel:
    """The model without weights, on the meta device; arguments as for `load_model`."""
    with torch.device("meta"):
        return RewardModel(
            blueprint.geometry,
            blueprint.decoder,
            blueprint.vision() if encoder is None else None,
            blueprint.head,
            dtype,
            deterministic,
            cache_bytes,
            encoder,
        )


def check_finite(checkpoint: Path) -> None:
    """Read all weights; raises `CheckpointError` naming the first tensor that is not finite."""
    for _ in _tensors(weight_files(checkpoint), torch.device("cpu"), lambda name: True):
        pass


def load_cut(checkpoint: Path) -> tuple[Cut, int]:
    """How a checkpoint cuts media, and the width of their embeddings.

    Raises:
        CheckpointError: see `read_blueprint`; or it is a text model.
    """
    blueprint = read_blueprint(checkpoint, load_config(checkpoint))
    if blueprint.tower is None or blueprint.cut is None:
        raise CheckpointError(f"{checkpoint}: the model has no vision tower")
    return blueprint.cut, blueprint.tower.out_hidden_size


def load_vision(checkpoint: Path) -> tuple[VisionTower, ValueHead]:
    """The vision tower and the value head alone, in float32 on the CPU.

    Raises:
        CheckpointError: see `verify`; or it is a text model.
    """
    blueprint = verify(checkpoint)
    with torch.device("meta"):
        tower, head = blueprint.vision(), ValueHead(blueprint.decoder.hidden)
    if tower is None:
        raise CheckpointError(f"{checkpoint}: the model has no vision tower")
    for prefix, module in ((_VISION, tower), (_HEAD, head)):
        state = read_state(checkpoint, torch.float32, torch.device("cpu"), partial(_is, prefix))
        names = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        module.load_state_dict(names, strict=True, assign=True)
        module.requires_grad_(False).eval()
    return tower, head


def canonical_name(key: str) -> str:
    """Our name for a checkpoint's tensor.

    transformers < 4.52 wrote `model.layers…` and `visual…`, later ones
    `model.language_model.layers…` and `model.visual…`; both are in use.
    """
    key = re.sub(r"^model\.(visual|language_model)\.", r"\1.", key)
    return re.sub(r"^model\.", "language_model.", key)


def _geometry(
    fields: Fields, decoder: Decoder, tower: Tower | None, pixels: Pixels | None, head: str
) -> Geometry:
    if tower is None or pixels is None:
        return Geometry(
            image_token_id=None,
            patch_size=1,
            merge_size=1,
            vocab_size=decoder.vocab_size,
            max_tokens=decoder.positions,
            # transformers' classification head looks in front of these; trl's value head does not.
            padding_id=fields.text.pad_token_id if head == "score" else None,
        )
    return Geometry(
        image_token_id=fields.image_token_id,
        patch_size=tower.patch_size,
        merge_size=tower.spatial_merge_size,
        vocab_size=decoder.vocab_size,
        max_tokens=decoder.positions,
        video_token_id=fields.video_token_id,
        tokens_per_second=fields.vision_config.tokens_per_second,
        video_limits=pixels.video_limits,
    )


def _expected_shapes(config: Any, head: str) -> dict[str, tuple[int, ...]]:
    auto: Any = AutoModelForSequenceClassification
    if head == "v_head":
        multimodal = architecture_of(config).vision is not None
        auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            reference = auto.from_config(config, attn_implementation="eager")
    except Exception as error:  # transformers raises many types
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"config.json describes no model: {reason}") from None
    shapes = {canonical_name(k): tuple(v.shape) for k, v in reference.state_dict().items()}
    if head == "v_head":
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        hidden = config.get_text_config().hidden_size
        shapes |= {"v_head.summary.weight": (1, hidden), "v_head.summary.bias": (1,)}
    return shapes


def _open(file: Path, device: str) -> Any:
    try:
        return safe_open(file, framework="pt", device=device)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a safetensors file, or cut short: {error}") from None


def read_state(
    checkpoint: Path, dtype: torch.dtype, device: torch.device, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The wanted tensors by our names, joined; the head is float32 always."""
    tensors = _join(_tensors(weight_files(checkpoint), device, lambda name: wanted(_whole(name))))
    return {name: t.to(torch.float32 if _is_head(name) else dtype) for name, t in tensors}


def read_tensors(
    checkpoint: Path, dtype: torch.dtype, device: torch.device, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The wanted tensors by `canonical_name`, none of them joined with another."""
    tensors = _tensors(weight_files(checkpoint), device, wanted)
    return {name: tensor.to(dtype) for name, tensor in tensors}


def _is(prefix: str, name: str) -> bool:
    return name.startswith(prefix)


def _is_head(name: str) -> bool:
    return any(_is(f"{head}.", name) for head in HEADS)


def _tensors(
    files: Iterable[Path], device: torch.device, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are read, each finite, by our names."""
    checked, seconds = 0, 0.0
    for file in files:
        with _open(file, str(device)) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name = canonical_name(key)
                if not _UNREAD.match(key) and wanted(name):
                    tensor = tensors.get_tensor(key)
                    begun = time.monotonic()
                    _check_finite(file, key, tensor)
                    seconds += time.monotonic() - begun
                    checked += tensor.nbytes
                    yield name, tensor
    logger.info("%s bytes of weights are finite; looking took %.2f s", f"{checked:,}", seconds)


def _check_finite(file: Path, key: str, tensor: Tensor) -> None:
    """In one pass without a copy: a NaN is both extremes, an infinity one of them."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if tensor.itemsize == 1:  # float8, of which torch knows no extremes
        tensor = tensor.to(torch.bfloat16)
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():
        count = tensor.numel() - int(tensor.isfinite().sum())
        raise CheckpointError(
            f"{file}: tensor {key!r}: {count:,} of {tensor.numel():,} weights are NaN or infinite"
        )


def _whole(name: str) -> str:
    """The name of what `_join` makes a tensor a part of; its own, if it is left alone."""
    match = _PART.search(name)
    if match is None:
        return name
    return name[: match.start()] + _PART_OF[match[0]][0] + name[match.end() :]


def _join(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Stack the matrices of `_JOINED` as soon as all parts of one have come by."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        match = _PART.search(name)
        if match is None:
            yield name, tensor
            continue
        joined, parts = _whole(name), _PART_OF[match[0]][1]
        group = waiting.setdefault(joined, {})
        group[match[0]] = tensor
        if len(group) == len(parts):
            yield joined, torch.cat([group[part] for part in parts])
            del waiting[joined]


def _raise_for(problem: str, checkpoint: Path, names: Iterable[str]) -> None:
    first, *rest = [*sorted(names), None]
    if first is not None:
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        raise CheckpointError(f"{checkpoint}: {problem} tensor {first!r}{more}")
