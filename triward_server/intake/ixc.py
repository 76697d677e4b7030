"""IXC-2.5-Reward: images cut into tiles, videos as one sheet, places `<ImageHere>` in the text.

Its own code is written anew here; nothing of a checkpoint is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageFont
from transformers import PreTrainedTokenizerFast

from ..config import PreprocessConfig
from ..errors import CheckpointError, ConfigError, InvalidRequest
from ..model_configs import REWARD_TOKEN
from ..schema import UInt8Array
from .conversation import Conversation, ImagePart, MediaPlace, Message, VideoPart
from .decoding import Header, Reading
from .family import Family, Item, Mark, check_options, done, joined
from .image_codec import Manner, resized
from .media import check_pixels
from .sheet import FONT_SIZE, FRAMES, MOST_FRAMES, Sheet, frame_size
from .tiles import Size, Tiles, frames_shown

PLACE = "<ImageHere>"
FONT = "SimHei.ttf"
HD_NUM, HD_NUM_OF_SEVERAL = 9, 6
_IMAGE = "[UNUSED_TOKEN_0]"  # no text that is scored has it
_PLACEHOLDER = 92_397  # its id, unless config.json says otherwise
_CONTROL = {"image": 0, "scored": REWARD_TOKEN, "end": 145, "start": 146}  # `[UNUSED_TOKEN_n]`
_TEMPLATE = (
    "{{% for message in messages %}}"
    "{{% if message.media_first %}}{image}{{% endif %}}"
    "{start}{{{{ message.role }}}}\n{{{{ message.content }}}}{end}\n"
    "{{% endfor %}}{eos}{scored}"
)

_MANNER = Manner("bilinear", on_white=False, mirrors_tall=True)
_OPTIONS = {ImagePart: frozenset({"hd_num"}), VideoPart: frozenset[str]()}


def load_ixc(checkpoint: Path, config: PreprocessConfig, written: dict[str, Any]) -> Family:
    """Read a checkpoint.

    Args:
        checkpoint: its folder.
        config: limits on one request.
        written: its config.json.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: images are to be resized by another than Pillow.
    """
    if config.resize != "pillow":
        raise ConfigError(
            f"preprocess_device {config.device!r}: this checkpoint's images are resized on the cpu"
        )
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(checkpoint)  # never the remote class
    placeholder = written.get("image_token_id", _PLACEHOLDER)
    control = _control_tokens(checkpoint, tokenizer, placeholder)
    tokenizer.chat_template = _TEMPLATE.format(**control)
    vision = written.get("vision_config") or {}
    tiles = Tiles(vision.get("image_size", 560), vision.get("patch_size", 14))
    positions = min(written.get("max_length", 16_384), written["max_position_embeddings"])
    media = IxcMedia(tiles, checkpoint / FONT, config)
    chat = PlacesChat(control["image"])
    return Family(tokenizer, positions, chat, media, (placeholder,), PLACE)


def _control_tokens(checkpoint: Path, tokenizer: Any, placeholder: int) -> dict[str, str]:
    """Return the names of what the template writes, which a tokenizer's files may have changed."""
    special = {id_: str(t) for id_, t in tokenizer.added_tokens_decoder.items() if t.special}
    found = {role: special.get(placeholder + number) for role, number in _CONTROL.items()}
    found["eos"] = tokenizer.eos_token
    for role, name in found.items():
        if name not in special.values() or (role == "image" and name != _IMAGE):
            raise CheckpointError(
                f"{checkpoint}: the tokenizer's token for {role!r} is {name!r}, of the ids from "
                f"{placeholder} on; the model's has {_IMAGE} there, all of them special"
            )
    return {role: str(name) for role, name in found.items()}


@dataclass(frozen=True)
class PlacesChat:
    """`family.Chat`: one item without a place stands in front of the prompt, others in places.

    Where their parts stand says nothing. What an assistant said holds no places: neither a response
    nor what was one in an earlier turn may move an image.

    Attributes:
        image: the token that stands for one.
    """

    image: str

    def __call__(self, conversation: Conversation, mark: Mark) -> list[dict[str, Any]]:
        """See `family.Chat`."""
        texts = [_between_places(message) for message in conversation.messages]
        places, count = sum(len(pieces) - 1 for pieces in texts), len(conversation.media_places)
        if places != count and (places, count) != (0, 1):
            raise InvalidRequest(
                "messages",
                f"{places} places {PLACE} in the text for {count} images and videos; there must be "
                "one for each, or none for a single one",
            )
        chat: list[dict[str, Any]] = [
            {"role": message.role, "content": self.image.join(map(mark, pieces))}
            for message, pieces in zip(conversation.messages, texts, strict=True)
        ]
        if count > places:
            chat[0]["media_first"] = True
        return chat


def _between_places(message: Message) -> list[str]:
    text = joined(message.content)
    return [text] if message.role == "assistant" else text.split(PLACE)


class IxcMedia:
    """`family.Media` of one checkpoint.

    Args:
        tiles: its rules.
        font: for the labels of a video's frames; without the file videos are refused.
        config: limits on one request, and the tiles of an image.
    """

    def __init__(self, tiles: Tiles, font: Path, config: PreprocessConfig) -> None:
        self._tiles = tiles
        self._config = config
        self._font: Any = None
        if font.is_file():
            try:
                self._font = ImageFont.truetype(font, FONT_SIZE)
            except OSError as error:
                raise CheckpointError(f"{font}: no font: {error}") from None

    @property
    def patch_size(self) -> int:
        """Side of a vision patch in pixels."""
        return self._tiles.patch

    def open(self, reading: Reading, conversation: Conversation) -> Iterator[Item]:
        """Read headers; see `Media`."""
        several = len(conversation.media_places) > 1
        for place in conversation.media_places:
            check_options(place, _OPTIONS[type(place.part)])
            if isinstance(place.part, ImagePart):
                most = self._most(place, place.part.hd_num, several)
                yield self._image(reading, conversation, place, most)
            else:
                yield self._video(reading, conversation, place)

    def flush(self) -> None:
        """Nothing waits."""

    def _most(self, place: MediaPlace, asked: int | None, several: bool) -> int:
        if not several:
            return asked or self._config.hd_num or HD_NUM
        if asked not in (None, HD_NUM_OF_SEVERAL):
            raise InvalidRequest(
                f"{place.path}.hd_num",
                f"{asked} was given; with several media in a conversation it is "
                f"{HD_NUM_OF_SEVERAL}",
            )
        return HD_NUM_OF_SEVERAL

    def _image(
        self, reading: Reading, conversation: Conversation, place: MediaPlace, most: int
    ) -> Item:
        [field], [data] = place.fields, conversation.entries(place)
        header = reading.open(field, "image", data)
        check_pixels(field, header.size, self._config.max_image_pixels)
        try:
            size = self._tiles.picture_size(header.size, most)
        except ValueError as error:
            raise InvalidRequest(field, f"the image cannot be used: {error}") from None

        def read() -> Future[UInt8Array]:
            return done(self._tiles.canvas(reading.image(field, header, size, _MANNER)))

        return Item(field, self._tokens(size), read)

    def _video(self, reading: Reading, conversation: Conversation, place: MediaPlace) -> Item:
        field, part = place.fields[0], place.part
        if self._font is None:
            raise InvalidRequest(
                place.path, f"a video needs the font {FONT}, which is not in the checkpoint"
            )
        assert isinstance(part, VideoPart)
        load = self._frame_list if part.frames else self._frames
        frames = load(reading, conversation, place)
        wide = frames.size[1] > frames.size[0]
        try:
            sheet = Sheet(frames.count, frame_size(frames.size), stacked=wide)
        except ValueError as error:
            raise InvalidRequest(field, f"the video cannot be used: {error}") from None
        final = self._tiles.sheet_size(sheet.size)

        def read() -> Future[UInt8Array]:
            picture = resized(sheet.draw(frames.decoded(), self._font), final, _MANNER)
            return done(self._tiles.canvas(np.asarray(picture)))

        return Item(field, self._tokens(final), read, shown=sheet.size[0] * sheet.size[1])

    def _frames(self, reading: Reading, conversation: Conversation, place: MediaPlace) -> _Frames:
        """Choose frames of a file."""
        [field], [data] = place.fields, conversation.entries(place)
        header = reading.open(field, "video", data)
        check_pixels(field, header.size, self._config.max_image_pixels)
        try:
            numbers = frames_shown(header.frames, header.rate, MOST_FRAMES)
        except ValueError as error:
            raise InvalidRequest(field, f"no frames can be chosen: {error}") from None
        limit = self._config.max_video_frames
        if len(numbers) > limit:  # fewer would be another sheet, and so another score
            raise InvalidRequest(
                field, f"{len(numbers)} of its frames would be shown, the limit is {limit}"
            )
        return _Frames(header.size, len(numbers), lambda: reading.frames(field, header, numbers))

    def _frame_list(
        self, reading: Reading, conversation: Conversation, place: MediaPlace
    ) -> _Frames:
        """Show a list whole."""
        fields, data = place.fields, conversation.entries(place)
        if len(fields) > MOST_FRAMES:
            raise InvalidRequest(
                f"{place.path}.frames", f"{len(fields)} frames, the limit is {MOST_FRAMES}"
            )
        pairs = zip(fields, data, strict=True)
        headers = [reading.open(field, "image", file) for field, file in pairs]
        for field, header in zip(fields, headers, strict=True):
            check_pixels(field, header.size, self._config.max_image_pixels)
            if header.size != headers[0].size:
                raise InvalidRequest(
                    field,
                    f"the frame has {_shown(header)} pixels, the first {_shown(headers[0])}",
                )

        def decoded() -> Iterator[UInt8Array]:
            for field, header in zip(fields, headers, strict=True):
                yield reading.image(field, header, None, FRAMES)

        return _Frames(headers[0].size, len(headers), decoded)

    def _tokens(self, resized_to: Size) -> int:
        return self._tiles.tokens(self._tiles.canvas_size(resized_to))


@dataclass(frozen=True)
class _Frames:
    """Frames of a video that are shown: the size of each, their number, and what decodes them."""

    size: Size
    count: int
    decoded: Callable[[], Iterator[UInt8Array]]


def _shown(header: Header) -> str:
    height, width = header.size
    return f"{width} x {height}"
