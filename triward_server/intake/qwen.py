"""Media of Qwen2.5-VL: resized by the rules of qwen-vl-utils and of the checkpoint's processor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..config import PreprocessConfig
from ..device import select
from ..schema import Grid, UInt8Array
from .conversation import Conversation, ImagePart, MediaPart, MediaPlace, VideoPart
from .decoding import Reading
from .family import Item, check_options, done
from .media import ImageLoader, Picture
from .resizing import TorchResizer, is_steep, limited
from .video import Clip, VideoLoader

_OPTIONS = {
    ImagePart: frozenset(MediaPart.model_fields),
    VideoPart: frozenset(VideoPart.model_fields),
}


class QwenMedia:
    """`family.Media` of one checkpoint.

    Args:
        processor: the checkpoint's.
        config: limits on one request, and who resizes.
    """

    def __init__(self, processor: Any, config: PreprocessConfig) -> None:
        self._processor = images = processor.image_processor
        self._images = ImageLoader(images, config.max_image_pixels)
        self._videos = VideoLoader(processor.video_processor, self._images, config.max_video_frames)
        self._resizer: TorchResizer | None = None
        if config.resize == "torch":
            self._resizer = TorchResizer(images, select(config.device))
        self._patch_size, self._merge_size = int(images.patch_size), int(images.merge_size)

    @property
    def patch_size(self) -> int:
        """Side of a vision patch in pixels."""
        return self._patch_size

    def open(self, reading: Reading, conversation: Conversation) -> Iterator[Item]:
        """Read headers; see `Media`."""
        for place in conversation.media_places:
            check_options(place, _OPTIONS[type(place.part)])
            yield self._open(reading, conversation, place)

    def flush(self) -> None:
        """Resize what waits for it."""
        if self._resizer:
            self._resizer.flush()

    def _open(self, reading: Reading, conversation: Conversation, place: MediaPlace) -> Item:
        path, part = place.path, place.part
        fields, data = place.fields, conversation.entries(place)
        if not isinstance(part, VideoPart):
            picture = self._images.open(reading, fields[0], data[0], path, part)
            read = partial(self._read_picture, reading, picture)
            return Item(picture.field, self._tokens(picture.final_size), read)
        if part.frames:
            clip = self._videos.open_frames(reading, fields, data, path, part)
        else:
            clip = self._videos.open(reading, fields[0], data[0], path, part)
        shown = clip.frames * clip.size[0] * clip.size[1]
        tokens = self._tokens(clip.final_size, clip.frames)
        return Item(clip.field, tokens, partial(_read_clip, clip), shown, timed=True)

    def _tokens(self, size: tuple[int, int], *frames: int) -> int:
        return Grid.of((*frames, *size, 3), self._patch_size).tokens(self._merge_size)

    def _read_picture(self, reading: Reading, picture: Picture) -> Future[UInt8Array]:
        header, size = picture.header, picture.first_size
        if self._resizer and not is_steep(header.size, size):
            return self._resizer.submit(reading.image(picture.field, header, None), size)
        pixels = reading.image(picture.field, header, size)
        return done(limited(self._processor, pixels))


def _read_clip(clip: Clip) -> Future[UInt8Array]:
    return done(clip.read())
