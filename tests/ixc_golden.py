"""Conversations whose scores the published classes of IXC-2.5 have given, once.

`tests/export/ixc_golden.json` has the scores and the recipe. The checkpoint has the sizes that are
constants in that code (tiles of 560 pixels, rank 256) and is small in all others.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from tests.conversations import PROSE, Messages, image, picture, says, user
from tests.videos import frames
from triward_server.export.random_ixc_checkpoint import (
    IXC_SIZES,
    IxcDimensions,
    make_ixc_checkpoint,
)

DIMENSIONS = IxcDimensions(
    merges=512, vocab_size=2048, hidden=128, inner=256, layers=3, heads=8, kv_heads=2, rank=256,
    tile=560, vision_hidden=64, vision_inner=128, vision_layers=2,
)  # fmt: skip


def golden_checkpoint(folder: Path, font: Path) -> None:
    """Write the checkpoint, seed 0."""
    with patch.dict(IXC_SIZES, tiny=DIMENSIONS):
        make_ixc_checkpoint("tiny", 0, folder, font=font)


def golden_cases() -> dict[str, Messages]:
    """Return conversations by name."""
    wide, tall = image(picture(1280, 720, 1)), image(picture(300, 700, 2))
    small = image(picture(40, 30, 3))
    system = {"role": "system", "content": "You are a strict judge."}
    video = {"type": "video", "video": frames(2)}
    place = "<ImageHere>"
    return {
        "text": [user("Is purple the highest value?"), says("It is.")],
        "text, other answer": [user("Is purple the highest value?"), says("No, 图 is the answer.")],
        "text, turns": [system, user(PROSE), says("Yes."), user("Why?\n"), says(PROSE * 4)],
        "wide": [user(wide, "What is shown?"), says("A chart.")],
        "tall": [user(tall, "What is shown?"), says("Bars.")],
        "small": [user("Look."), says("At what?"), user(small, "This."), says("A block.")],
        "four tiles": [user({**wide, "hd_num": 4}, "What is shown?"), says("A chart.")],
        "two": [user(tall, small, f"Image1 {place}; Image2 {place}; same?"), says("No.")],
        "one, in its place": [user(small, f"This {place} is what?"), says("A block.")],
        "video": [user(video, "What moves?"), says("The block.")],
    }
