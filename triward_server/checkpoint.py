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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoVideoProcessor,
)

from .architectures import ARCHITECTURES, Architecture
from .backbone import HEADS, Encoder, RewardModel, ValueHead
from .errors import CheckpointError
from .packing import Geometry
from .schema import FRAMES_PER_GRID
from .vision import Cut, VisionTower, cut_of

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


def load_config(checkpoint: Path) -> Any:
    """The checkpoint's model configuration.

    Raises:
        CheckpointError: there is none, or the architecture is not one of `ARCHITECTURES`.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is {checkpoint} a checkpoint's folder?")
    try:
        model_type = json.loads(path.read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no model_type: {type(error).__name__}: {error}") from None
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: model_type {model_type!r} is not supported, only {known}")
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


def verify(checkpoint: Path) -> None:
    """Check names and shapes of all tensors without reading any data.

    Raises:
        CheckpointError: naming the first tensors that are missing, unexpected, twice there or of
            a wrong shape.
    """
    config = load_config(checkpoint)
    head = head_of(checkpoint, config)
    architecture_of(config).decoder(config)  # raises for what it does not compute
    expected = _expected_shapes(config, head)
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
    verify(checkpoint)
    config = load_config(checkpoint)
    architecture = architecture_of(config)
    decoder, head = architecture.decoder(config), head_of(checkpoint, config)
    with torch.device("meta"):
        visual = None
        if architecture.vision is not None and encoder is None:
            visual = architecture.vision(config, AutoImageProcessor.from_pretrained(checkpoint))
        model = RewardModel(
            _geometry(checkpoint, config, head),
            decoder,
            visual,
            head,
            dtype,
            deterministic,
            cache_bytes,
            encoder,
        )
    state = _state(checkpoint, dtype, device, lambda name: not (encoder and _is(_VISION, name)))
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def check_finite(checkpoint: Path) -> None:
    """Read all weights; raises `CheckpointError` naming the first tensor that is not finite."""
    for _ in _tensors(weight_files(checkpoint), torch.device("cpu"), lambda name: True):
        pass


def _video_limits(checkpoint: Path) -> tuple[int, int] | None:
    """Fewest and most pixels of a frame that the video processor leaves as it is.

    Raises:
        CheckpointError: it does what the vision tower does not.
    """
    images = AutoImageProcessor.from_pretrained(checkpoint)
    videos = AutoVideoProcessor.from_pretrained(checkpoint)
    for name, value, supported in (
        ("image_mean", videos.image_mean, images.image_mean),
        ("image_std", videos.image_std, images.image_std),
        ("temporal_patch_size", videos.temporal_patch_size, FRAMES_PER_GRID),
        ("do_sample_frames", videos.do_sample_frames, False),
        ("cap_pixels_per_frame", bool(videos.cap_pixels_per_frame), False),
    ):
        if value != supported:
            raise CheckpointError(
                f"{checkpoint}: the video processor's {name} is {value}, only {supported} works"
            )
    size = dict(videos.size)
    return (size["shortest_edge"], size["longest_edge"]) if videos.do_resize else None


def load_cut(checkpoint: Path) -> Cut:
    """How a checkpoint cuts media; raises `CheckpointError` as `load_config` does."""
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    vision = load_config(checkpoint).vision_config
    return cut_of(vision, processor.image_mean, processor.image_std)


def load_vision(checkpoint: Path) -> tuple[VisionTower, ValueHead]:
    """The vision tower and the value head alone, in float32 on the CPU.

    Raises:
        CheckpointError: see `verify`; or it is a text model.
    """
    verify(checkpoint)
    config = load_config(checkpoint)
    architecture = architecture_of(config)
    if architecture.vision is None:
        raise CheckpointError(f"{checkpoint}: {config.model_type} has no vision tower")
    with torch.device("meta"):
        tower = architecture.vision(config, AutoImageProcessor.from_pretrained(checkpoint))
        head = ValueHead(config.get_text_config().hidden_size)
    for prefix, module in ((_VISION, tower), (_HEAD, head)):
        state = _state(checkpoint, torch.float32, torch.device("cpu"), partial(_is, prefix))
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


def _geometry(checkpoint: Path, config: Any, head: str) -> Geometry:
    text = config.get_text_config()
    if architecture_of(config).vision is None:
        return Geometry(
            image_token_id=None,
            patch_size=1,
            merge_size=1,
            vocab_size=text.vocab_size,
            max_tokens=text.max_position_embeddings,
            # transformers' classification head looks in front of these; trl's value head does not.
            padding_id=text.pad_token_id if head == "score" else None,
        )
    vision = config.vision_config
    return Geometry(
        image_token_id=config.image_token_id,
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        vocab_size=text.vocab_size,
        max_tokens=text.max_position_embeddings,
        video_token_id=config.video_token_id,
        tokens_per_second=vision.tokens_per_second,
        video_limits=_video_limits(checkpoint),
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


def _state(
    checkpoint: Path, dtype: torch.dtype, device: torch.device, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The wanted tensors by our names; the head is float32 always."""
    tensors = _join(_tensors(weight_files(checkpoint), device, wanted))
    return {name: t.to(torch.float32 if _is_head(name) else dtype) for name, t in tensors}


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


def _join(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Stack the matrices of `_JOINED` as soon as all parts of one have come by."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        match = _PART.search(name)
        if match is None:
            yield name, tensor
            continue
        whole, parts = _PART_OF[match[0]]
        joined = name[: match.start()] + whole + name[match.end() :]
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
