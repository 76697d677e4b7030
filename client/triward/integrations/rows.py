"""Rows of a table -> conversations -> a score or an error for each row.

What the integrations for data sets share. A row without a score is one that cannot be scored, and
its error says why. Whatever else goes wrong is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from triward.client import RewardClient
from triward.conversation import Message
from triward.errors import InvalidRequest
from triward.integrations.images import illustrated, image_of
from triward.retries import until_answered

Score = float | list[float]


@dataclass(frozen=True)
class RowScorer:
    """Scores rows. It can be pickled, and used after a fork.

    A row is a whole conversation in the column `messages`, or a prompt and its response in two:

    - `prompt` is a str, which the user says, or a list of messages.
    - `responses` is a str, or a list of messages from the assistant's on: one score. Or a list of
      str: a list of scores in their order.
    - `images` is one image or a list of them: bytes, paths, PIL images, or the struct of `bytes`
      and `path` that Hugging Face datasets write to Parquet. They go into the image parts of the
      messages that hold none; if there is no image part, in front of the first user message.

    Attributes:
        client: whom to ask.
        messages: name of the column; so are the next three.
        prompt: with `responses`, in place of `messages`.
        responses: with `prompt`.
        images: None if the messages hold their images, or there are none.
        score: name of the column of scores; errors stand in `<score>_error`.
        concurrency: how many requests are in flight at once.
        patience: seconds for which servers may answer nothing but UNAVAILABLE.
    """

    client: RewardClient
    messages: str | None = None
    prompt: str | None = None
    responses: str | None = None
    images: str | None = None
    score: str = "score"
    concurrency: int = 32
    patience: float = 600.0

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: they are not one conversation's.
        """
        given = [name is not None for name in (self.messages, self.prompt, self.responses)]
        if given not in ([True, False, False], [False, True, True]):
            raise ValueError("name the column of messages, or those of prompt and responses")

    @property
    def columns(self) -> list[str]:
        """Names of the columns that are read."""
        names = (self.messages, self.prompt, self.responses, self.images)
        return [name for name in names if name is not None]

    @property
    def identity(self) -> dict[str, str | None]:
        """Settings that decide about scores. Servers, concurrency and patience do not."""
        return {
            "model": self.client.model,
            "messages": self.messages,
            "prompt": self.prompt,
            "responses": self.responses,
            "images": self.images,
        }

    @property
    def error(self) -> str:
        """Name of the column of errors."""
        return f"{self.score}_error"

    def score_rows(
        self, table: Mapping[str, Sequence[Any]]
    ) -> tuple[list[Score | None], list[str]]:
        """Score a batch.

        Args:
            table: name of a column -> a value for each row.

        Returns:
            For each row its score or None, and "" or why there is none.

        Raises:
            ServerUnavailable: for `patience` seconds there was no other answer.
            TriwardError: a server failed, or the client's timeout ran out.
        """
        rows = zip(*(table[name] for name in self.columns), strict=True)
        asked = [self._read(dict(zip(self.columns, row, strict=True))) for row in rows]
        answers = until_answered(
            self.client,
            (each for row in asked for each in row.conversations),
            concurrency=self.concurrency,
            patience=self.patience,
        )
        with closing(answers):
            told = [row.tell(list(islice(answers, len(row.conversations)))) for row in asked]
        return [score for score, _ in told], [error for _, error in told]

    def conversations(self, row: Mapping[str, Any]) -> list[list[Message]]:
        """Return a conversation for each of a row's responses, with the row's images.

        Raises:
            InvalidRequest: the row holds none.
        """
        read = self._read({name: row.get(name) for name in self.columns})
        if read.error:
            raise InvalidRequest(read.error)
        return read.conversations

    def _read(self, row: dict[str, Any]) -> _Row:
        try:
            images = _images(row[self.images]) if self.images is not None else []
            if self.messages is not None:
                return _Row(
                    [illustrated(_messages(row[self.messages], "user", self.messages), images)]
                )
            assert self.prompt is not None and self.responses is not None  # __post_init__
            prompt = illustrated(_messages(row[self.prompt], "user", self.prompt), images)
            endings, several = _endings(row[self.responses], self.responses)
            return _Row([[*prompt, *ending] for ending in endings], several)
        except InvalidRequest as error:
            return _Row([], error=str(error))


@dataclass
class _Row:
    """Conversations of a row, and whether its score is a list.

    Attributes:
        conversations: none if there is an error.
        several: whether its score is a list.
        error: why it cannot be sent.
    """

    conversations: list[list[Message]]
    several: bool = False
    error: str = ""

    def tell(self, answers: list[float | InvalidRequest]) -> tuple[Score | None, str]:
        """Return the row's score and error; one response without a score leaves the row without."""
        if self.error:
            return None, self.error
        scores = [answer for answer in answers if isinstance(answer, float)]
        for place, answer in enumerate(answers):
            if isinstance(answer, InvalidRequest):
                reason = answer.reason  # its place in the batch means nothing here
                return None, f"response {place}: {reason}" if self.several else reason
        return (scores if self.several else scores[0]), ""


def _endings(value: object, column: str) -> tuple[list[list[Message]], bool]:
    """Return the messages that end each of a row's conversations; True for a list of scores."""
    if not isinstance(value, (list, tuple)) or any(isinstance(each, Mapping) for each in value):
        return [_messages(value, "assistant", column)], False
    if not value:
        raise InvalidRequest(f"{column}: holds 0 responses, needs at least 1")
    return [[{"role": "assistant", "content": each}] for each in value], True


def _messages(value: object, role: str, column: str) -> list[Message]:
    """Messages, or what `role` says. Keys whose value is None are the table's, not the row's."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, (list, tuple)):
        name = type(value).__name__
        raise InvalidRequest(f"{column}: must be a str or a list of messages, got {name}")
    for message in value:
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{column}: a message must be a dict, got {message!r:.100}")
    return [{key: each for key, each in item.items() if each is not None} for item in value]


def _images(value: object) -> list[object]:
    """Return a row's images as the client takes them: one, some, or None for none."""
    if value is None:
        return []
    return [image_of(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
