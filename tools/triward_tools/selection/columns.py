"""Names of the columns that hold conversations and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from triward.client import RewardClient
from triward.errors import InvalidRequest
from triward.integrations.rows import RowScorer


@dataclass(frozen=True)
class Columns:
    """Names of columns, as for `RowScorer`.

    Without one for messages, prompt or responses they are those of JSONL: `messages` and
    `responses`, or `messages` alone, whose last one is the assistant's.

    Attributes:
        messages: whole conversations.
        prompt: with `responses`, in place of `messages`.
        responses: with `prompt`.
        images: what goes into the messages' places for images.
        scores: numbers that are there already, one for each response; then no server is asked.
    """

    messages: str | None = None
    prompt: str | None = None
    responses: str | None = None
    images: str | None = None
    scores: str | None = None

    def among(self, names: Sequence[str], *, several: bool = False) -> Columns:
        """Return the same with all names, for a table with these columns.

        Args:
            names: of the table's columns.
            several: whether a row must hold several responses.

        Raises:
            InvalidRequest: they do not name a conversation, or one is not there.
        """
        found = self
        if self.messages is None and self.prompt is None and self.responses is None:
            if "responses" in names:
                found = replace(self, prompt="messages", responses="responses")
            else:
                found = replace(self, messages="messages")
        for flag, name in asdict(found).items():
            if name is not None and name not in names:
                raise InvalidRequest(
                    f"{flag}: there is no column {name!r}, there are {', '.join(names)}"
                )
        if several and found.responses is None:
            raise InvalidRequest("responses: name the column of responses to choose from")
        return found

    def scorer(
        self, client: RewardClient | None, *, concurrency: int = 32, patience: float = 600.0
    ) -> RowScorer:
        """Return a scorer of the rows.

        Raises:
            InvalidRequest: the names are not those of a conversation, or nobody can be asked.
        """
        if client is None and self.scores is None:
            raise InvalidRequest("needs a client, or the name of the column that holds scores")
        try:
            return RowScorer(
                client or RewardClient(),  # which is not asked
                messages=self.messages,
                prompt=self.prompt,
                responses=self.responses,
                images=self.images,
                concurrency=concurrency,
                patience=patience,
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
