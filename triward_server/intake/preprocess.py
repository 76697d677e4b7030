"""Request -> `Features`: parse, decode, resize, tokenize, one request at a time on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image
from transformers.video_utils import VideoMetadata

from ..config import PreprocessConfig, token_limit
from ..errors import InvalidRequest
from ..schema import FRAMES_PER_GRID, Features, UInt8Array
from .conversation import Conversation, parse_conversation
from .decoding import Decoder, Reading
from .families import load_family
from .family import Item
from .tokenization import ConversationTokenizer, TokenizedConversation


@dataclass(frozen=True)
class Opened:
    """A request whose media are decoded and whose images wait to be resized.

    Attributes:
        tokens: of all its conversations.
        pixels: uint8 [H, W, 3] or [T, H, W, 3] each, once the resizer has been flushed.
        timed: how many of the items are videos whose frames have times.
    """

    tokens: TokenizedConversation
    pixels: Sequence[Future[UInt8Array]]
    timed: int


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
        self._config = config
        family = load_family(checkpoint, config)
        self._media = family.media
        self.place = family.place
        self.patch_size = family.media.patch_size if family.media else 1
        self._max_tokens = token_limit(config.max_tokens, family.positions)
        self._tokenizer = ConversationTokenizer(family, self._max_tokens, config.max_request_tokens)
        self._decoder = Decoder(config, progress)
        self._seconds_per_grid = _seconds_per_grid()

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
        """Complete what waits for it, of all requests."""
        if self._media:
            self._media.flush()

    def finish(self, opened: Opened) -> Features:
        """Run the second half, after the flush."""
        tokens = opened.tokens
        media = tuple(pixels.result(timeout=0) for pixels in opened.pixels)
        seconds = (self._seconds_per_grid,) * opened.timed
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
            items = self._read_headers(reading, conversation)
            tokens = self._tokenizer.tokenize(conversation, [item.tokens for item in items])
            pixels = [item.read() for item in items]
        return Opened(tokens, pixels, sum(item.timed for item in items))

    def _read_headers(self, reading: Reading, conversation: Conversation) -> list[Item]:
        """Read the media's headers, as long as all of them together are within the limits."""
        items: list[Item] = []
        if not conversation.media_places:
            return items
        if self._media is None:
            path = conversation.media_places[0].path
            raise InvalidRequest(path, "this checkpoint's model reads text only")
        for item in self._media.open(reading, conversation):
            items.append(item)
            # Many small files can be very many pixels.
            tokens, shown = sum(each.tokens for each in items), sum(each.shown for each in items)
            self._at_most(item.field, "tokens", tokens, self._max_tokens)
            self._at_most(item.field, "pixels of video", shown, self._config.max_video_pixels)
        return items

    def _at_most(self, field: str, unit: str, value: int, limit: int) -> None:
        if value > limit:
            raise InvalidRequest(
                field, f"the media take {value} {unit} up to here, the limit is {limit}"
            )


def _seconds_per_grid() -> float:
    """Return the processor's value for every video: the card's code tells it no frame rate."""
    untold = VideoMetadata(total_num_frames=0)
    return float(FRAMES_PER_GRID / untold.sampled_fps)
