"""Request -> `Features`: parse, decode, resize, tokenize, one request at a time on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from transformers import AutoConfig, AutoProcessor

from .config import PreprocessConfig
from .conversation import parse_conversation
from .media import ImageLoader
from .schema import Features
from .tokenization import ConversationTokenizer


class Preprocessor:
    """The CPU half of the service for one checkpoint.

    Args:
        checkpoint: folder with the checkpoint's configuration and processor files; weights are
            not needed.
        config: limits on one request.
    """

    def __init__(self, checkpoint: Path, config: PreprocessConfig) -> None:
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoConfig.from_pretrained(checkpoint)
        self._config = config
        self.patch_size = int(processor.image_processor.patch_size)
        self._merged_patch = self.patch_size * int(processor.image_processor.merge_size)
        self._images = ImageLoader(processor.image_processor, config.max_image_pixels)
        self._tokenizer = ConversationTokenizer(
            processor, max_tokens=model.text_config.max_position_embeddings
        )

    def features(
        self, messages: bytes, responses: Sequence[bytes], media: Sequence[bytes]
    ) -> Features:
        """Turn one request's wire bytes into what the model reads.

        Raises:
            InvalidRequest: naming the field, the value and the limit.
        """
        conversation = parse_conversation(messages, responses, media, self._config)
        parts = conversation.media_parts()
        images = tuple(
            self._images.load(f"media[{i}]", data, path, part)
            for i, (data, (path, part)) in enumerate(zip(conversation.media, parts, strict=True))
        )
        placeholders = [
            (image.shape[0] // self._merged_patch) * (image.shape[1] // self._merged_patch)
            for image in images
        ]
        tokens = self._tokenizer.tokenize(conversation, placeholders)
        return Features(tokens.prompt_ids, tokens.response_ids, images)

    def warm_up(self) -> None:
        """Run one request with an image, so that the first real one does not pay for set-up."""
        picture = BytesIO()
        Image.new("RGB", (64, 64)).save(picture, "JPEG")
        messages = b'[{"role":"user","content":[{"type":"image"},{"type":"text","text":"?"}]}]'
        self.features(messages, [b"yes"], [picture.getvalue()])
