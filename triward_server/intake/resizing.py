"""Resizing with torch: the processor's own resize, and on a GPU all of it for a whole batch.

`TorchResizer` does what else Pillow does while it decodes (`image_codec.py`). Its filter is
Pillow's but its arithmetic is not: of a photograph's values one in five differs, by one or two
levels (docs/engine.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.image_utils import SizeDict

from ..errors import DeviceFault, Unavailable, is_device_fault, is_out_of_memory
from ..schema import UInt8Array
from .decoding import Size

# Pixels that wait for a flush, before or after it, whichever are more; in float32 768 MB.
_MAX_WAITING = 64_000_000

# Torch's filter needs more shared memory than a GPU has for much larger reductions; beyond this one
# Pillow does them, exactly.
_MAX_REDUCTION = 32


def limited(processor: Any, pixels: UInt8Array) -> UInt8Array:
    """Resize one image, uint8 [H, W, 3], as the processor does."""
    resized: UInt8Array = _channels_last(_limited(processor, _channels_first(pixels)))[0]
    return resized


def is_steep(encoded: Size, resized: Size) -> bool:
    """Return True if a reduction is beyond what `TorchResizer` can do."""
    return max(encoded[0] / resized[0], encoded[1] / resized[1]) > _MAX_REDUCTION


class TorchResizer:
    """Resizes on a device; pictures of equal sizes together.

    Args:
        image_processor: the checkpoint's, whose own pixel limits may ask for a second resize.
        device: where.
    """

    def __init__(self, image_processor: Any, device: torch.device) -> None:
        self._processor = image_processor
        self._device = device
        self._waiting: dict[tuple[Size, Size], list[tuple[Tensor, Future[UInt8Array]]]] = {}
        self._pixels = 0

    def submit(self, decoded: UInt8Array, size: Size) -> Future[UInt8Array]:
        """Resize at the next `flush`.

        Args:
            decoded: uint8 [H, W, 3] as the file has them; not `is_steep`.
            size: where qwen-vl-utils' resize leads.

        Returns:
            uint8 [H, W, 3] after the processor's resize, too; its failure is of any kind.
        """
        pixels = torch.from_numpy(decoded)
        key = ((pixels.shape[0], pixels.shape[1]), size)
        more = max(height * width for height, width in key)
        if self._pixels + more > _MAX_WAITING:
            self.flush()
        result: Future[UInt8Array] = Future()
        self._waiting.setdefault(key, []).append((pixels, result))
        self._pixels += more
        return result

    def flush(self) -> None:
        """Resize what waits. A group that fails is tried one by one."""
        waiting, self._waiting, self._pixels = self._waiting, {}, 0
        for (_, size), group in waiting.items():
            if not self._settle(group, size) and len(group) > 1:
                for one in group:
                    self._settle([one], size)

    def _settle(self, group: Sequence[tuple[Tensor, Future[UInt8Array]]], size: Size) -> bool:
        """Resize pictures together; a failure is the result of a lone one alone."""
        images, results = zip(*group, strict=True)
        try:
            resized = _channels_last(self._resize(images, size).cpu())
        except Exception as error:
            if is_device_fault(error):
                raise DeviceFault(error) from error
            if len(group) == 1:
                memory = is_out_of_memory(error)
                results[0].set_exception(
                    Unavailable("an image exceeds the device's free memory") if memory else error
                )
            return False
        for result, pixels in zip(results, resized, strict=True):
            result.set_result(pixels)
        return True

    def _resize(self, images: Sequence[Tensor], size: Size) -> Tensor:
        batch = torch.stack([image.to(self._device, non_blocking=True) for image in images])
        resized = interpolate(
            batch.permute(0, 3, 1, 2).float(), size, mode="bicubic", antialias=True
        )
        return _limited(self._processor, resized.round_().clamp_(0, 255).to(torch.uint8))


def _limited(processor: Any, batch: Tensor) -> Tensor:
    """Resize uint8 [N, 3, H, W] as the processor does."""
    if not processor.do_resize:
        return batch
    size, factor = SizeDict(**dict(processor.size)), processor.patch_size * processor.merge_size
    resized: Tensor = processor.resize(batch, size, processor.resample, factor=factor)
    return resized


def _channels_first(pixels: UInt8Array) -> Tensor:
    """[H, W, 3] -> the contiguous [1, 3, H, W] that the processor would build."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def _channels_last(batch: Tensor) -> UInt8Array:
    """[N, 3, H, W] -> [N, H, W, 3]."""
    return np.ascontiguousarray(batch.permute(0, 2, 3, 1).numpy())
