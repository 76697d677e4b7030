"""`Conversation` -> token ids, exactly the model card's, with text that can never act as control.

The checkpoint's own chat template is rendered on the real content, with one change: where content
spells a special token, or ends with the beginning of one, an invisible marker breaks it. So no text
of a caller spells `<|im_end|>` while the template runs, not even across two parts; all other text
is there for the template to look at, as Qwen3's looks for `</think>`. Special tokens that are left
in the rendering are the template's. They are split off, the marker is removed from what lies
between them, and each such span is tokenized as one piece, as the card's tokenizer does.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ..errors import CheckpointError, InvalidRequest
from ..schema import Int32Array
from .conversation import Conversation
from .family import Family
from .token_bound import TokenBound

# A rendering cut at special tokens: a token id, or the text between two of them.
Piece = int | str


@dataclass(frozen=True)
class TokenizedConversation:
    """Token ids int32 of the shared prompt [P] and of each response [L_i], L_i >= 1."""

    prompt_ids: Int32Array
    response_ids: tuple[Int32Array, ...]


@dataclass(frozen=True)
class _Rendering:
    """A rendered chat: its text, cut at special tokens, and the pieces that this gives.

    `raw` together is `text`; `pieces` has one for each, markers removed.
    """

    text: str = ""
    raw: Sequence[str] = ()
    pieces: Sequence[Piece] = ()

    def whole_before(self, end: int) -> int:
        """Count the pieces before a place in the text."""
        ends = accumulate(map(len, self.raw))
        return sum(1 for _ in takewhile(lambda each: each <= end, ends))


class Spans:
    """A request's text between control tokens, each distinct span of it tokenized once."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._ids: dict[str, Sequence[int]] = {}

    def encode(self, renderings: Sequence[Sequence[Piece]]) -> None:
        """Tokenize what is new, all together."""
        pieces = (piece for pieces in renderings for piece in pieces)
        new = list({p: None for p in pieces if isinstance(p, str) and p not in self._ids})
        encodings = self._backend.encode_batch(new, add_special_tokens=False)
        self._ids.update(zip(new, (encoding.ids for encoding in encodings), strict=True))

    def length(self, pieces: Sequence[Piece]) -> int:
        """Count the tokens of encoded pieces."""
        return sum(len(self._ids[p]) if isinstance(p, str) else 1 for p in pieces)

    def ids(self, pieces: Sequence[Piece]) -> Int32Array:
        """Return the token ids of encoded pieces."""
        ids = (i for p in pieces for i in (self._ids[p] if isinstance(p, str) else (p,)))
        return np.fromiter(ids, np.int32)


class ConversationTokenizer:
    """Renders and tokenizes conversations for one checkpoint.

    Args:
        family: the checkpoint's. Its tokenizer is changed: special-token strings in text are
            encoded as text from now on.
        max_tokens: what one conversation may have.
        max_request_tokens: what a prompt and all its responses may have together.
    """

    def __init__(self, family: Family, max_tokens: int, max_request_tokens: int) -> None:
        self._processor = processor = family.processor
        self._chat = family.chat
        self._media_ids = family.placeholders
        self._max_tokens = max_tokens
        self._max_request_tokens = max_request_tokens
        tokenizer = getattr(processor, "tokenizer", processor)
        self._prefix, self._suffix = _added_around(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        self._at_least = TokenBound(self._backend)
        added = tokenizer.added_tokens_decoder
        self._special = {str(token): id_ for id_, token in added.items() if token.special}
        if not self._special:
            raise CheckpointError("the tokenizer has no special tokens; templates need some")
        longest_first = sorted(self._special, key=len, reverse=True)
        self._longest = len(longest_first[0])
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._control = _spelled(longest_first)
        # Unguessable, so no content can hold it; a noncharacter, so no normalizer touches it.
        self._marker = f"\ufdd0{secrets.token_hex(8)}\ufdd1"

    @property
    def knows_the_date(self) -> bool:
        """True if the template asks transformers for the time."""
        return "strftime_now" in str(self._processor.chat_template)

    def tokenize(
        self, conversation: Conversation, placeholders: Sequence[int]
    ) -> TokenizedConversation:
        """Tokenize one prompt with all its responses.

        Args:
            conversation: the validated request.
            placeholders: for each media item, how many tokens it takes.

        Raises:
            InvalidRequest: a conversation or the request has too many tokens.
        """
        chat = self._chat(conversation, self._mark)
        self._add_reference(chat, conversation)
        rendering = self._render(chat) if chat else _Rendering()
        prompt = self._with_prefix(rendering) if chat else []
        # Before it is rendered with each response: a prompt that is too long ends here.
        least = self._check_least("messages", prompt, 0)
        spans = Spans(self._backend)
        spans.encode([prompt])
        self._check_length("messages", spans.length(prompt), 0)
        tails = []
        total = least
        for index, text in enumerate(conversation.responses):
            same, rest = self._continued(chat, text, rendering, prompt)
            before = least if same == len(prompt) else 0
            total += self._check_least(f"responses[{index}]", rest, before) - before
            tails.append((same, rest))
        self._check_request(f"at least {total}", total, least)

        shared = min(same for same, _ in tails)
        full = [[*prompt[shared:same], *rest] for same, rest in tails]
        spans.encode(full)
        prompt_ids = self._expand(spans.ids(prompt[:shared]), placeholders)
        response_ids = [spans.ids(pieces) for pieces in full]
        for index, ids in enumerate(response_ids):
            self._check_length(f"responses[{index}]", len(prompt_ids), len(ids))
        total = len(prompt_ids) + sum(map(len, response_ids))
        self._check_request(str(total), total, len(prompt_ids))
        return TokenizedConversation(prompt_ids, tuple(response_ids))

    @property
    def needs_reference(self) -> bool:
        """True if the template writes a reference answer, without which it refuses."""
        return "message.reference" in str(self._processor.chat_template)

    def _add_reference(self, chat: Sequence[dict[str, Any]], conversation: Conversation) -> None:
        """Give the template the reference answer; refuse one too many or too few."""
        given = []
        for index, message in enumerate(conversation.messages):
            if message.reference is not None:
                chat[index]["reference"] = self._mark(message.reference)
                given.append(index)
        if self.needs_reference:
            if len(given) != 1:
                raise InvalidRequest(
                    "messages", f"{len(given)} messages have a reference, this model needs 1"
                )
        elif given:
            raise InvalidRequest(
                f"messages[{given[0]}].reference", "this checkpoint's model reads no reference"
            )

    def _check_length(self, field: str, prompt: int, response: int) -> None:
        if prompt + response > self._max_tokens:
            raise InvalidRequest(
                field,
                f"the conversation has {prompt + response} tokens ({prompt} of them in the "
                f"prompt), the limit is {self._max_tokens}",
            )

    def _check_request(self, shown: str, total: int, prompt: int) -> None:
        if total > self._max_request_tokens:
            raise InvalidRequest(
                "responses",
                f"with its prompt of {prompt} tokens the request has {shown}, the limit "
                f"is {self._max_request_tokens}",
            )

    def _check_least(self, field: str, pieces: Sequence[Piece], before: int) -> int:
        """Refuse what is certainly too long before it is encoded, which takes seconds a megabyte.

        Returns:
            How many tokens there are at least, those before the pieces included.
        """
        sizes = (1 if isinstance(piece, int) else self._at_least(piece) for piece in pieces)
        least = before + sum(sizes)
        if least > self._max_tokens:
            raise InvalidRequest(
                field,
                f"the conversation has at least {least} tokens, the limit is {self._max_tokens}",
            )
        return least

    def _continued(
        self, chat: Sequence[Any], response: str, like: _Rendering, prompt: Sequence[Piece]
    ) -> tuple[int, list[Piece]]:
        """Render a conversation, and keep what differs from its prompt.

        A template may look at the response, and write earlier turns in another way when one more
        follows, so it renders the whole; but only what is new in it is cut up, and kept.

        Returns:
            How many of the prompt's pieces it begins with, and those that follow them.
        """
        turn = {"role": "assistant", "content": self._mark(response)}
        pieces = [*self._with_prefix(self._render([*chat, turn], like)), *self._suffix]
        pairs = zip(prompt, pieces, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return same, pieces[same:]

    def _render(self, chat: Sequence[Any], like: _Rendering | None = None) -> _Rendering:
        """Render a chat whose content is marked; `like` may begin with the same text."""
        try:
            text = self._processor.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=False
            )
        except TemplateError as error:  # some templates refuse roles, or an order of turns
            raise InvalidRequest(
                "messages", f"the checkpoint's chat template says: {error}"
            ) from None
        like = like or _Rendering()
        # Where texts are the same for a whole token longer, the same cuts are made before.
        count = like.whole_before(_common(like.text, text) - self._longest)
        start = sum(map(len, like.raw[:count]))
        raw = [piece for piece in self._splitter.split(text[start:]) if piece]
        pieces: list[Piece] = [
            self._special[piece] if piece in self._special else piece.replace(self._marker, "")
            for piece in raw
        ]
        return _Rendering(text, [*like.raw[:count], *raw], [*like.pieces[:count], *pieces])

    def _with_prefix(self, rendering: _Rendering) -> list[Piece]:
        """Put the first token in front, unless the template has written it."""
        pieces = list(rendering.pieces)
        return pieces if pieces[: len(self._prefix)] == self._prefix else self._prefix + pieces

    def _mark(self, text: str) -> str:
        return self._control.sub(lambda match: match[0] + self._marker, text)

    def _expand(self, ids: Int32Array, placeholders: Sequence[int]) -> Int32Array:
        """Repeat the k-th media placeholder `placeholders[k]` times."""
        repeats = np.ones(len(ids), dtype=np.int64)
        at = np.flatnonzero(np.isin(ids, self._media_ids))
        assert len(at) == len(placeholders), "the template writes one placeholder a media part"
        repeats[at] = placeholders
        return np.repeat(ids, repeats)


def _common(one: str, other: str) -> int:
    """Count the characters that two texts begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _spelled(tokens: Sequence[str]) -> re.Pattern[str]:
    """Match the first character of any of the tokens where a text spells it, overlapping or not.

    And of its beginning, where that ends a text: a template may trim what follows.
    """
    starts = []
    for first in sorted({token[0] for token in tokens}):
        rests = [token[1:] for token in tokens if token[0] == first]
        cut = {rest[:end] for rest in rests for end in range(len(rest))}
        whole, begun = ("|".join(map(re.escape, sorted(each))) for each in (rests, cut))
        starts.append(rf"{re.escape(first)}(?=(?:{whole})|(?:{begun})\s*\Z)")
    return re.compile("|".join(starts))


def _added_around(tokenizer: Any) -> tuple[list[Piece], list[Piece]]:
    """Return what the tokenizer itself puts before and behind a text: BOS, for Llama."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]
