"""Images and videos of a request -> files; what the gateway's host holds is never read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from triward.conversation import Messages
from triward.deadline import Deadline
from triward.download import DOWNLOAD_LIMIT, download
from triward.errors import InvalidRequest, MediaError, located
from triward.media import read_media

_KEYS = ("image", "image_url", "video")


class MediaReader:
    """Reads the media of one request; an URL that stands in it twice is read once.

    Args:
        deadline: of the request.
        opener: opens http(s) URLs; None refuses them.
    """

    def __init__(self, deadline: Deadline, opener: Callable[..., Any] | None) -> None:  # noqa: D107
        self._deadline = deadline
        self._opener = opener
        self._left = DOWNLOAD_LIMIT  # of all that is fetched for the request
        self._read: dict[str, bytes] = {}

    def carried(self, messages: Messages) -> Messages:
        """Return the messages with files in place of URLs.

        Raises:
            InvalidRequest: a part names something else than a URL that may be read.
            DeadlineExceeded: a URL did not deliver in time.
        """
        return [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _message(self, message: Any, place: str) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            return message  # what is wrong with it the client says
        parts = [self._part(part, f"{place}.content[{i}]") for i, part in enumerate(content)]
        return {**message, "content": parts}

    def _part(self, part: Any, place: str) -> Any:
        if not isinstance(part, Mapping):
            return part
        held = [key for key in _KEYS if part.get(key) is not None]
        try:
            return {**part, **{key: self._media(part[key]) for key in held}}
        except (InvalidRequest, TimeoutError) as error:
            raise located(error, place) from error  # type: ignore[arg-type]

    def _media(self, value: Any) -> Any:
        if isinstance(value, Mapping):  # OpenAI's form
            value = value.get("url")
        if isinstance(value, list):  # a video's frames
            return [self._media(each) for each in value]
        if not isinstance(value, str):
            raise InvalidRequest(f"media must be a URL, a str, got {type(value).__name__}")
        if value not in self._read:
            self._read[value] = self._file(value)
        return self._read[value]

    def _file(self, url: str) -> bytes:
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            return read_media(url, self._deadline)
        if not scheme.startswith(("http://", "https://")):
            raise MediaError("media must be a data: URL; files are not read")
        if self._opener is None:
            raise MediaError("media must be a data: URL; http(s) ones are not fetched here")
        data = download(url, self._deadline, limit=self._left, opener=self._opener)
        self._left -= len(data)
        return data
