"""The plain restatement of IXC-2.5-Reward, by which its scores are judged.

Its published code is remote code that needs an old transformers. This says the same in float32, one
conversation at a time, and shares nothing with the engine or the intake. `ixc_tokens.py` has the
tokenizer, `ixc_pictures.py` the pixels, `ixc_network.py` the networks; here they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..schema import UInt8Array
from .ixc_network import IxcNetwork, Mistake
from .ixc_pictures import at_most, film_frames, image_canvas, sheet, sheet_canvas
from .ixc_tokens import BOS, EOS, SlowTokenizer

PLACE = "<ImageHere>"
FONT = "SimHei.ttf"
SEVERAL = 6  # `hd_num` where there are several pictures, whatever was asked


@dataclass
class IxcInputs:
    """One conversation as the network reads it.

    Attributes:
        ids: of all tokens; a picture's are placeholders.
        canvases: of the pictures, in their order.
    """

    ids: list[int] = field(default_factory=list)
    canvases: list[UInt8Array] = field(default_factory=list)


class IxcOracle:
    """Scores one conversation at a time.

    Args:
        checkpoint: a folder; videos need its font.
        mistake: what to do wrong, for controls that must move a score.
        hd_num: tiles that a single image may have where its part says nothing.
        device: where it runs.
        streamed: with one tensor of the decoder at a time in memory.
    """

    def __init__(
        self,
        checkpoint: Path,
        mistake: Mistake | None = None,
        hd_num: int = 9,
        device: str | torch.device = "cpu",
        streamed: bool = False,
    ) -> None:
        self.network = IxcNetwork(checkpoint, mistake, device, streamed)
        self.tokenizer = SlowTokenizer(checkpoint / "tokenizer.model")
        self.placeholder = self.tokenizer.ids["[UNUSED_TOKEN_0]"]
        self._font = checkpoint / FONT
        self._mistake = mistake
        self._hd_num = hd_num

    def score(self, messages: Sequence[dict[str, Any]]) -> float:
        """Return the number for one conversation whose last message is the assistant's."""
        inputs = self.inputs(messages)
        return self.score_inputs(inputs.ids, inputs.canvases)

    def score_inputs(self, ids: Sequence[int], canvases: Sequence[UInt8Array]) -> float:
        """Return the number for token ids with placeholders and the canvases they stand for.

        Raises:
            ValueError: there are more or fewer placeholders, or more tokens than the model takes.
        """
        network = self.network
        limit = network.config["max_length"]
        if len(ids) > limit:
            raise ValueError(f"{len(ids)} tokens, the limit is {limit}")
        pictured = torch.tensor(ids) == self.placeholder
        embeddings = network.embed_ids(list(ids))
        if canvases:
            seen = torch.cat([network.embed_canvas(canvas) for canvas in canvases])
            if len(seen) != int(pictured.sum()):
                raise ValueError(f"{int(pictured.sum())} placeholders for {len(seen)} vectors")
            embeddings[pictured.to(embeddings.device)] = seen
        return network.score(embeddings, pictured)

    def inputs(self, messages: Sequence[dict[str, Any]]) -> IxcInputs:
        """Return what a conversation is to the network.

        A single picture stands in front of everything, unless `<ImageHere>` in a prompt's text says
        where; several pictures need as many of these. What an assistant says holds none: there it
        is text.

        Raises:
            ValueError: the number of places does not fit, or the role of a message is unknown.
        """
        pictures = list(self._pictures(messages))
        segments = self._segments(messages)
        places = len(segments) - 1
        if len(pictures) == 1 and not places:
            segments, places = [[], *segments], 1
        if places != len(pictures):
            raise ValueError(f"{places} times {PLACE} for {len(pictures)} pictures")
        inputs = IxcInputs(canvases=pictures)
        late = self._mistake == "BOS before the text" and not segments[0]
        for number, segment in enumerate(segments):
            if number:
                inputs.ids += [self.placeholder] * self._tokens(pictures[number - 1])
            inputs.ids += [BOS] if number == late else []
            inputs.ids += segment
        return inputs

    def _segments(self, messages: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Return the ids of the text before, between and behind the places of pictures."""
        named, plain = self.tokenizer.ids, self.tokenizer.plain
        segments: list[list[int]] = [[]]
        for index, message in enumerate(messages):
            said = message["role"] == "assistant"
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"messages[{index}].role is {message['role']!r}")
            segments[-1].append(named["[UNUSED_TOKEN_146]"])
            text = f"{message['role']}\n{_text_of(message)}"
            first, *others = [text] if said else text.split(PLACE)
            segments[-1] += plain(first)
            segments += [plain(part) for part in others]
            segments[-1] += [named["[UNUSED_TOKEN_145]"], *plain("\n")]
        segments[-1] += [EOS, named["[UNUSED_TOKEN_130]"]]
        return segments

    def _tokens(self, canvas: UInt8Array) -> int:
        side = self.network.tile // self.network.patch // 2
        rows, columns = (length // self.network.tile for length in canvas.shape[:2])
        if self._mistake == "separators missing":
            return (rows * columns + 1) * side**2
        return token_count(rows, columns, side)

    def _pictures(self, messages: Sequence[dict[str, Any]]) -> list[UInt8Array]:
        parts = [
            part
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] != "text"
        ]
        return [self._canvas(part, len(parts) > 1) for part in parts]

    def _canvas(self, part: dict[str, Any], several: bool) -> UInt8Array:
        tile = self.network.tile
        if part["type"] == "image":
            antialias = self._mistake != "bilinear without antialias"
            hd_num = SEVERAL if several else part.get("hd_num", self._hd_num)
            return image_canvas(_opened(part["image"]), hd_num, tile, antialias)
        source = part["video"]
        listed = not isinstance(source, str | Path)
        frames = at_most([*map(_opened, source)]) if listed else film_frames(source)
        return sheet_canvas(sheet(frames, self._font), tile)


def token_count(rows: int, columns: int, side: int) -> int:
    """Return the tokens of a canvas of `rows` x `columns` tiles, `side` x `side` tokens each."""
    return (rows * columns + 1) * side**2 + 1 + (rows + 1) * side


def _opened(source: Any) -> Image.Image:
    """Open a file; a picture that is open already is itself."""
    return source if isinstance(source, Image.Image) else Image.open(source)


def _text_of(message: dict[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
