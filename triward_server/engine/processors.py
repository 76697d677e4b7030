"""A checkpoint's image and video processors, read by an allow-list.

The vision tower normalises as they would, and `media.py` and `video.py` resize as they would. What
else they can be told to do is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Resampling
from transformers import AutoImageProcessor, AutoVideoProcessor

from ..errors import CheckpointError
from ..schema import FRAMES_PER_GRID
from .architectures import Vision
from .architectures.fields import Fields
from .towers import Cut, cut_of
from .vision import Tower

# They change no pixel: forms of what goes in and out, and who reads the file.
_FORMS = (
    "processor_class", "auto_map", "data_format", "input_data_format", "return_tensors", "device",
    "disable_grouping", "default_to_square", "video_processor_type", "do_convert_rgb",
)  # fmt: skip
# Read by `media.py` and `video.py`, in their own way.
_SIZES = ("do_resize", "size", "min_pixels", "max_pixels")
# How a video's frames are chosen, which is qwen-vl-utils' work; limits that are off with
# `cap_pixels_per_frame`.
_FRAMES = (
    "fps", "num_frames", "min_frames", "max_frames", "max_video_tokens", "return_metadata",
    "video_metadata",
)  # fmt: skip


@dataclass(frozen=True)
class Pixels:
    """Properties of the processors that the vision tower and the preprocessor need.

    Attributes:
        cut: how media become patches.
        video_limits: fewest and most pixels of a frame that the video processor leaves as it is;
            None: it leaves all.
    """

    cut: Cut
    video_limits: tuple[int, int] | None


def load_pixels(checkpoint: Path, vision: Vision) -> Pixels:
    """Read and check both processors of a checkpoint, where the architecture needs them.

    Args:
        checkpoint: with the processors' files.
        vision: what the model reads of images.

    Raises:
        CheckpointError: one cannot be loaded, or asks for what is not done here.
    """
    if vision.cut is not None:
        return Pixels(vision.cut, None)
    tower = vision.tower
    assert isinstance(tower, Tower)
    try:
        images = AutoImageProcessor.from_pretrained(checkpoint)
        videos = AutoVideoProcessor.from_pretrained(checkpoint)
    except Exception as error:  # transformers raises many types
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint}: the processor cannot be loaded: {reason}") from None
    cut = cut_of(tower, FRAMES_PER_GRID, tower.window, images.image_mean, images.image_std)

    check = _checker(checkpoint, "image")
    fields = Fields(images.to_dict())
    fields.ignore("image_mean", "image_std", "resample", *_SIZES, *_FORMS)
    kind = str(fields["image_processor_type"]).removesuffix("Fast")  # of another implementation
    check("image_processor_type", kind, "Qwen2VLImageProcessor")
    _check_alike(fields, tower, check)

    check = _checker(checkpoint, "video")
    fields = Fields(videos.to_dict())
    fields.ignore(*_SIZES, *_FORMS, *_FRAMES)
    check("image_mean", list(fields["image_mean"]), list(images.image_mean))
    check("image_std", list(fields["image_std"]), list(images.image_std))
    check("do_sample_frames", fields["do_sample_frames"], False)
    check("cap_pixels_per_frame", bool(fields.get("cap_pixels_per_frame")), False)
    check("resample", fields["resample"], Resampling.BICUBIC)
    _check_alike(fields, tower, check)

    size = dict(videos.size)
    limits = (size["shortest_edge"], size["longest_edge"]) if videos.do_resize else None
    return Pixels(cut, limits)


def _check_alike(fields: Fields, tower: Tower, check: Callable[[str, Any, Any], None]) -> None:
    """Check what both processors must do, and that they do nothing else."""
    check("patch_size", fields["patch_size"], tower.patch_size)
    check("merge_size", fields["merge_size"], tower.spatial_merge_size)
    check("temporal_patch_size", fields["temporal_patch_size"], FRAMES_PER_GRID)
    for name in ("do_rescale", "do_normalize"):
        check(name, fields[name], True)
    check("rescale_factor", fields["rescale_factor"], 1 / 255)
    for name in ("do_center_crop", "do_pad"):
        check(name, bool(fields.get(name)), False)
    fields.ignore("crop_size", "pad_size")  # of what is off
    for name, value in fields.unread():
        check(name, value, None)


def _checker(checkpoint: Path, kind: str) -> Callable[[str, Any, Any], None]:
    def check(name: str, value: Any, supported: Any) -> None:
        if value != supported:
            raise CheckpointError(
                f"{checkpoint}: the {kind} processor's {name} is {value}, only {supported} works"
            )

    return check
