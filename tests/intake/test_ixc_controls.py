"""What is wrong before IXC-2.5's network: intake with the mistake is the restatement's no more.

`tests/engine/test_ixc.py` has the network's mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.conversations import Messages, image, picture, says, user
from tests.intake.test_ixc import ids
from triward.conversation import build_request, split_conversation
from triward.deadline import Deadline
from triward_server.config import PreprocessConfig
from triward_server.export.ixc_reference import IxcInputs, IxcOracle
from triward_server.intake.decoding import Reading
from triward_server.intake.preprocess import Preprocessor
from triward_server.intake.tokenization import ConversationTokenizer, Piece
from triward_server.schema import UInt8Array

CONVERSATION: Messages = [user(image(picture(640, 480, 6)), "What is shown?"), says("Bars.")]


def read(folder: Path) -> IxcInputs:
    """What the intake makes of the conversation."""
    prompt, response = split_conversation(CONVERSATION)
    wire = build_request(prompt, [response], Deadline(60))
    found = Preprocessor(folder, PreprocessConfig()).features(
        wire.messages, list(wire.responses), list(wire.media)
    )
    return IxcInputs(ids(found), [*found.media])


def test_bilinear_without_antialias(ixc_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids are the same; the canvas is that of the restatement with the same mistake."""
    right = IxcOracle(ixc_folder).inputs(CONVERSATION)
    np.testing.assert_array_equal(read(ixc_folder).canvases, right.canvases)
    decoded = Reading.image

    def four_neighbours(
        self: Reading, field: str, header: Any, size: Any, *manner: Any
    ) -> UInt8Array:
        pixels = torch.from_numpy(decoded(self, field, header, None, *manner))
        planes = pixels.permute(2, 0, 1)[None].float()
        [planes] = functional.interpolate(planes, size, mode="bilinear")
        shown: UInt8Array = planes.round().to(torch.uint8).permute(1, 2, 0).numpy()
        return shown

    monkeypatch.setattr(Reading, "image", four_neighbours)
    found = read(ixc_folder)
    assert found.ids == right.ids
    wrong = IxcOracle(ixc_folder, "bilinear without antialias").inputs(CONVERSATION)
    np.testing.assert_array_equal(found.canvases, wrong.canvases)
    distance = np.abs(found.canvases[0].astype(int) - right.canvases[0])
    assert distance.mean() > 1, "what the comparison must not overlook"


def test_bos_before_the_text(ixc_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands behind the image then, as the restatement with the same mistake has it."""
    right = IxcOracle(ixc_folder).inputs(CONVERSATION)
    assert read(ixc_folder).ids == right.ids
    first = ConversationTokenizer._with_prefix

    def behind_the_image(self: ConversationTokenizer, rendering: Any) -> Sequence[Piece]:
        bos, placeholder, *text = first(self, rendering)
        return [placeholder, bos, *text]

    monkeypatch.setattr(ConversationTokenizer, "_with_prefix", behind_the_image)
    found = read(ixc_folder)
    assert found.ids != right.ids
    assert found.ids == IxcOracle(ixc_folder, "BOS before the text").inputs(CONVERSATION).ids
    np.testing.assert_array_equal(found.canvases, right.canvases)
