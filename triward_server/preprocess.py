"""Request -> `Features`: parse, decode, resize, tokenize, one request at a time on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoProcessor

from .config import PreprocessConfig
from .conversation import Conversation, parse_conversation
from .errors import CheckpointError, InvalidRequest
from .media import ImageLoader
from .schema import Features, UInt8Array
from .tokenization import ConversationTokenizer


class Preprocessor:
    """The CPU half of the service for one checkpoint.

    Args:
        checkpoint: folder with the checkpoint's configuration and processor files; weights are
            not needed.
        config: limits on one request.
    """

    def __init__(self, checkpoint: Path, config: PreprocessConfig) -> None:
        processor, model = _load(checkpoint)
        self._config = config
        self.patch_size = int(processor.image_processor.patch_size)
        self._merged_patch = self.patch_size * int(processor.image_processor.merge_size)
        self._images = ImageLoader(processor.image_processor, config.max_image_pixels)
        self._max_tokens = int(model.text_config.max_position_embeddings)
        self._tokenizer = ConversationTokenizer(processor, self._max_tokens)

    def features(
        self, messages: bytes, responses: Sequence[bytes], media: Sequence[bytes]
    ) -> Features:
        """Turn one request's wire bytes into what the model reads.

        Raises:
            InvalidRequest: naming the field, the value and the limit.
        """
        return self._features(parse_conversation(messages, responses, media, self._config))

    def warm_up(self) -> None:
        """Run one request with an image, so that the first real one does not pay for set-up.

        At export this also shows that the processor's files fit together.
        """
        picture = BytesIO()
        Image.new("RGB", (1, 1)).save(picture, "PNG")
        messages = b'[{"role":"user","content":[{"type":"image"},{"type":"text","text":"?"}]}]'
        # One pixel is within every limit of the loader; the request's own limits do not apply.
        self._features(
            parse_conversation(messages, [b"yes"], [picture.getvalue()], PreprocessConfig())
        )

    def _features(self, conversation: Conversation) -> Features:
        images: list[UInt8Array] = []
        placeholders: list[int] = []
        for i, (path, part) in enumerate(conversation.media_parts()):
            image = self._images.load(f"media[{i}]", conversation.media[i], path, part)
            images.append(image)
            placeholders.append(image.size // 3 // self._merged_patch**2)
            if sum(placeholders) > self._max_tokens:  # many small files can be very many pixels
                raise InvalidRequest(
                    f"media[{i}]",
                    f"the images take {sum(placeholders)} tokens up to here, "
                    f"the limit is {self._max_tokens}",
                )
        tokens = self._tokenizer.tokenize(conversation, placeholders)
        return Features(tokens.prompt_ids, tokens.response_ids, tuple(images))


def _load(checkpoint: Path) -> tuple[Any, Any]:
    """The checkpoint's processor and model configuration.

    Raises:
        CheckpointError: a file is missing or damaged; transformers raises many types for that.
    """
    try:
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoConfig.from_pretrained(checkpoint)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint}: the processor cannot be loaded: {reason}") from error
    if processor.chat_template is None:
        raise CheckpointError(f"{checkpoint}: the processor has no chat template")
    return processor, model
