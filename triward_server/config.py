"""Configuration of the models: `parameters` of a `config.pbtxt` as frozen dataclasses.

Triton hands parameters over as strings. Every key must be known and every value must fit, or
loading stops with a `ConfigError` that names the parameter. Nothing is clamped or guessed.

A field with a description is an option of `triward-server export`: name, default and help stand
here alone (`export/options.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from .errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
Dtype = Literal["float32", "bfloat16", "float8"]
_STRICT = ConfigDict(extra="forbid")
MAX_TILES = 64  # of an image; more would be more tokens than models have positions

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, config=_STRICT)
class RequestLimits:
    """Limits that both models check: callers may ask the forward model directly."""

    max_responses: Annotated[Positive, Field(description="Responses in one request.")] = 256
    max_tokens: Annotated[
        Count, Field(description="Tokens of one conversation; 0: the model's positions.")
    ] = 0
    max_request_tokens: Annotated[
        Positive, Field(description="Tokens of a request: its prompt once and every response.")
    ] = 262_144


@dataclass(frozen=True, config=_STRICT)
class PreprocessConfig(RequestLimits):
    """Limits on one request, checked before anything is decoded, and how images are resized.

    Attributes:
        resize: `pillow`, exactly as the model card does it, on the CPU whatever the device; or
            `torch`, nearly so, all images of a dynamic batch together. The device decides it.
        max_media: a list of frames counts as one item.
        max_image_pixels: also the largest `min_pixels`.
        max_video_frames: of a file that are shown, or sent as a list.
        max_video_pixels: what is held.
    """

    device: Annotated[
        Device,
        Field(description="cpu: Pillow resizes, exactly; cuda, cuda:N: torch, nearly so."),
    ] = "cpu"
    resize: Literal["pillow", "torch"] = "pillow"
    max_text_bytes: Annotated[
        Positive,
        Field(description="Bytes of messages, and of all responses, in one request."),
    ] = 4 * 1024 * 1024
    max_parts: Annotated[
        Positive, Field(description="Messages and their parts in one request.")
    ] = 4096
    max_media: Annotated[Positive, Field(description="Media items in one request.")] = 64
    max_request_bytes: Annotated[
        Positive, Field(description="Bytes of all media items of a request.")
    ] = 512 * 1024 * 1024
    max_media_bytes: Annotated[Positive, Field(description="Bytes of one encoded media item.")] = (
        64 * 1024 * 1024
    )
    hd_num: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_TILES,
            description="Tiles that an image may fill unless its part says how many, for "
            "IXC-2.5-Reward alone; 0: 9.",
        ),
    ] = 0
    max_image_pixels: Annotated[
        Positive, Field(description="Pixels of one image or frame before it is resized.")
    ] = 64_000_000
    max_video_frames: Annotated[
        Positive, Field(description="Frames of one video that are shown.")
    ] = 768
    max_video_pixels: Annotated[
        Positive,
        Field(description="Pixels of all frames that one request shows, resized."),
    ] = 200_000_000
    max_decode_seconds: Annotated[
        float, Field(gt=0, description="For decoding and resizing a request's media.")
    ] = 10.0


@dataclass(frozen=True, config=_STRICT)
class ForwardConfig(RequestLimits):
    """Configuration of the forward model.

    A batch beyond a budget (`max_batch_…`) is cut into micro-batches; a single conversation beyond
    one runs alone.

    Attributes:
        dtype: of weights and activations; scores are float32 always. `float8`: of the language
            model's linear layers; everything else is bfloat16.
        device: plain `cuda` is the GPU of Triton's instance.
        max_batch_tflop: a bound on how long a pass takes.
        max_batch_bytes: of intermediate results, beside both caches.
        deterministic: a score is bitwise the same in any company, in any order, with any cache.
        overlap_batches: not with a vision step, which is asked inside of `execute` alone.
        compile: before the model is ready. It needs a C compiler; without one loading fails.
        vision: `torch`, the model itself; or `onnx`, the model that `schema.VISION` names, and no
            weights of the vision tower are loaded here.
    """

    dtype: Annotated[Dtype, Field(description="bfloat16, float32, or float8 (docs/engine.md).")] = (
        "bfloat16"
    )
    device: Annotated[Device, Field(description="cuda (each GPU; the default), cuda:N or cpu.")] = (
        "cuda"
    )
    max_batch_tokens: Annotated[Positive, Field(description="Tokens of one forward pass.")] = 32_768
    max_batch_patches: Annotated[
        Positive, Field(description="Vision patches of one forward pass.")
    ] = 65_536
    max_batch_tflop: Annotated[
        float, Field(gt=0, description="Predicted TFLOP of one forward pass.")
    ] = 500.0
    embedding_cache_bytes: Annotated[
        Count, Field(description="Image embeddings kept between batches; 0: none.")
    ] = 1024**3
    prefix_cache_bytes: Annotated[
        int,
        Field(
            ge=-1,
            description="Keys and values of prompts kept between batches; 0: none; -1: 256 MiB on "
            "a CPU, on CUDA what is left, at most 40 %.",
        ),
    ] = -1
    max_batch_bytes: Annotated[
        Positive, Field(description="Predicted bytes of one forward pass, beside the weights.")
    ] = 12 * 1024**3
    compile: Annotated[bool, Field(description="Fuse layers with torch.compile; yes on cuda.")] = (
        False
    )
    deterministic: Annotated[bool, Field(description="Scores bitwise independent of company.")] = (
        False
    )
    threads: Annotated[
        Count, Field(description="CPU threads of the forward model; 0: torch's choice.")
    ] = 0
    overlap_batches: Annotated[
        bool, Field(description="Read the next batch while one is computed (docs/engine.md).")
    ] = False
    vision: Annotated[
        Literal["torch", "onnx"],
        Field(description="torch; onnx: the vision tower is a model of its own."),
    ] = "torch"

    @model_validator(mode="after")
    def _fits(self) -> ForwardConfig:
        if self.overlap_batches and self.vision == "onnx":
            raise ValueError("overlap_batches needs the vision tower in the model, not as onnx")
        return self


@dataclass(frozen=True, config=_STRICT)
class VisionConfig:
    """Configuration of the vision tower's ONNX graph in Triton's Python backend.

    Attributes:
        threads: CPU threads of ONNX Runtime; 0 leaves its own choice.
    """

    threads: Count = 0


def token_limit(max_tokens: int, positions: int) -> int:
    """Tokens that a conversation may have: a configured limit, or the model's positions.

    Raises:
        ConfigError: the model has fewer positions than the limit allows.
    """
    if max_tokens > positions:
        raise ConfigError(f"max_tokens {max_tokens}, the model has {positions} positions")
    return max_tokens or positions


def on_instance(device: str, device_id: str) -> str:
    """Return the device, with plain `cuda` made the GPU that Triton gave to the instance."""
    return f"cuda:{device_id}" if device == "cuda" else device


def from_parameters(config_type: type[ConfigT], parameters: dict[str, Any]) -> ConfigT:
    """Build a config from Triton's `{"key": {"string_value": "…"}}` mapping.

    Raises:
        ConfigError: an unknown key or a value that does not fit, by name.
    """
    return from_strings(config_type, {key: str(v["string_value"]) for key, v in parameters.items()})


def from_strings(config_type: type[ConfigT], values: dict[str, str]) -> ConfigT:
    """Build a config from plain strings; raises `ConfigError` as `from_parameters` does."""
    try:
        return TypeAdapter(config_type).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = f"parameter {name!r} = {first['input']!r}: {first['msg']}"
        raise ConfigError(message) from None
