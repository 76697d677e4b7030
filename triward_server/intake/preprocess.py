"""Request -> `Features`: parse, decode, resize, tokenize, one request at a time on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.video_utils import VideoMetadata

from .. import model_configs  # noqa: F401 - what it registers
from ..config import PreprocessConfig, token_limit
from ..device import select
from ..errors import CheckpointError, InvalidRequest
from ..schema import FRAMES_PER_GRID, Features, Grid, UInt8Array
from .conversation import Conversation, MediaPlace, VideoPart, parse_conversation
from .decoding import Decoder, Reading
from .media import ImageLoader, Picture
from .resizing import TorchResizer, is_steep, limited
from .tokenization import ConversationTokenizer, TokenizedConversation
from .video import Clip, VideoLoader


@dataclass(frozen=True)
class Opened:
    """A request whose media are decoded and whose images wait to be resized.

    Attributes:
        tokens: of all its conversations.
        pixels: uint8 [H, W, 3] or [T, H, W, 3] each, once the resizer has been flushed.
        videos: how many of the items are videos.
    """

    tokens: TokenizedConversation
    pixels: Sequence[Future[UInt8Array]]
    videos: int


class Preprocessor:
    """The CPU half of the service for one checkpoint.

    Args:
        checkpoint: folder with the checkpoint's configuration and processor files; weights are
            not needed.
        config: limits on one request.
        progress: called while media are decoded, each second.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: PreprocessConfig,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        processor, model = _load(checkpoint)
        self._config = config
        self._decoder = Decoder(config, progress)
        self._media: tuple[ImageLoader, VideoLoader] | None = None
        self._resizer: TorchResizer | None = None
        self.patch_size = self._merge_size = 1
        images = getattr(processor, "image_processor", None)
        if images is not None:
            loader = ImageLoader(images, config.max_image_pixels)
            videos = VideoLoader(processor.video_processor, loader, config.max_video_frames)
            self._media = (loader, videos)
            self._image_processor = images
            self.patch_size = int(images.patch_size)
            self._merge_size = int(images.merge_size)
            if config.resize == "torch":
                self._resizer = TorchResizer(images, select(config.device))
        self._seconds_per_grid = _seconds_per_grid()
        positions = int(model.get_text_config().max_position_embeddings)
        self._max_tokens = token_limit(config.max_tokens, positions)
        self._tokenizer = ConversationTokenizer(
            processor, self._max_tokens, config.max_request_tokens
        )

    @property
    def reads_images(self) -> bool:
        """True if the model is multimodal."""
        return self._media is not None

    @property
    def knows_the_date(self) -> bool:
        """True if the chat template may write the day on which it is rendered."""
        return self._tokenizer.knows_the_date

    @property
    def needs_reference(self) -> bool:
        """True if a request must have a reference answer."""
        return self._tokenizer.needs_reference

    def features(
        self, messages: bytes, responses: Sequence[bytes], media: Sequence[bytes]
    ) -> Features:
        """Turn one request's wire bytes into what the model reads.

        Raises:
            InvalidRequest: naming the field, the value and the limit.
        """
        opened = self.open(messages, responses, media)
        self.flush()
        return self.finish(opened)

    def open(self, messages: bytes, responses: Sequence[bytes], media: Sequence[bytes]) -> Opened:
        """Run the first half of `features`, up to `flush`, which serves many requests."""
        return self._open(parse_conversation(messages, responses, media, self._config))

    def flush(self) -> None:
        """Resize what waits for it."""
        if self._resizer:
            self._resizer.flush()

    def finish(self, opened: Opened) -> Features:
        """Run the second half, after the flush."""
        tokens = opened.tokens
        media = tuple(pixels.result(timeout=0) for pixels in opened.pixels)
        seconds = (self._seconds_per_grid,) * opened.videos
        return Features(tokens.prompt_ids, tokens.response_ids, media, seconds)

    def warm_up(self) -> None:
        """Run one request, so that the first real one does not pay for set-up.

        At export this also shows that the processor's files fit together.
        """
        messages, media = b'[{"role":"user","content":"?"}]', []
        if self.needs_reference:
            messages = b'[{"role":"user","content":"?","reference":"!"}]'
        if self.reads_images:
            picture = BytesIO()
            Image.new("RGB", (1, 1)).save(picture, "PNG")
            messages = b'[{"role":"user","content":[{"type":"image"},{"type":"text","text":"?"}]}]'
            media = [picture.getvalue()]
        # One pixel is within every limit of the loader; the request's own limits do not apply.
        opened = self._open(parse_conversation(messages, [b"yes"], media, PreprocessConfig()))
        self.flush()
        self.finish(opened)

    def _open(self, conversation: Conversation) -> Opened:
        """Headers, then tokens: what is refused for its length is not decoded."""
        with self._decoder.reading() as reading:
            items, placeholders = self._read_headers(reading, conversation)
            tokens = self._tokenizer.tokenize(conversation, placeholders)
            pixels = [self._read(reading, item) for item in items]
        return Opened(tokens, pixels, sum(isinstance(item, Clip) for item in items))

    def _read_headers(
        self, reading: Reading, conversation: Conversation
    ) -> tuple[list[Picture | Clip], list[int]]:
        """Read the media's headers; return them with the tokens that each takes."""
        items: list[Picture | Clip] = []
        tokens: list[int] = []
        shown = 0
        for place in conversation.media_places:
            item = self._open_item(reading, conversation, place)
            items.append(item)
            # Many small files can be very many pixels.
            tokens.append(self._tokens(item))
            self._at_most(item.field, "tokens", sum(tokens), self._max_tokens)
            if isinstance(item, Clip):
                shown += item.frames * item.size[0] * item.size[1]
                self._at_most(item.field, "pixels of video", shown, self._config.max_video_pixels)
        return items, tokens

    def _open_item(
        self, reading: Reading, conversation: Conversation, place: MediaPlace
    ) -> Picture | Clip:
        path, part = place.path, place.part
        fields = [f"media[{i}]" for i in place.entries]
        data = [conversation.media[i] for i in place.entries]
        if self._media is None:
            raise InvalidRequest(path, "this checkpoint's model reads text only")
        images, videos = self._media
        if not isinstance(part, VideoPart):
            return images.open(reading, fields[0], data[0], path, part)
        if part.frames:
            return videos.open_frames(reading, fields, data, path, part)
        return videos.open(reading, fields[0], data[0], path, part)

    def _tokens(self, item: Picture | Clip) -> int:
        frames = (item.frames,) if isinstance(item, Clip) else ()
        grid = Grid.of((*frames, *item.final_size, 3), self.patch_size)
        return grid.tokens(self._merge_size)

    def _at_most(self, field: str, unit: str, value: int, limit: int) -> None:
        if value > limit:
            raise InvalidRequest(
                field, f"the media take {value} {unit} up to here, the limit is {limit}"
            )

    def _read(self, reading: Reading, item: Picture | Clip) -> Future[UInt8Array]:
        if isinstance(item, Picture):
            return self._read_picture(reading, item)
        return _done(item.read())

    def _read_picture(self, reading: Reading, picture: Picture) -> Future[UInt8Array]:
        header, size = picture.header, picture.first_size
        if self._resizer and not is_steep(header.size, size):
            return self._resizer.submit(reading.image(picture.field, header, None), size)
        pixels = reading.image(picture.field, header, size)
        return _done(limited(self._image_processor, pixels))


def _done(pixels: UInt8Array) -> Future[UInt8Array]:
    result: Future[UInt8Array] = Future()
    result.set_result(pixels)
    return result


def _seconds_per_grid() -> float:
    """Return the processor's value for every video: the card's code tells it no frame rate."""
    untold = VideoMetadata(total_num_frames=0)
    return float(FRAMES_PER_GRID / untold.sampled_fps)


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """Return the checkpoint's processor, a text model's tokenizer, and its model configuration.

    Raises:
        CheckpointError: a file is missing or damaged; transformers raises many types for that.
    """
    try:
        model = AutoConfig.from_pretrained(checkpoint)
        multimodal = getattr(model, "vision_config", None) is not None
        processor = (AutoProcessor if multimodal else AutoTokenizer).from_pretrained(checkpoint)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint}: the processor cannot be loaded: {reason}") from error
    if processor.chat_template is None:
        raise CheckpointError(f"{checkpoint}: the processor has no chat template")
    return processor, model
