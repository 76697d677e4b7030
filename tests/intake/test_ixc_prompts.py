"""IXC-2.5-Reward's ids of 2,000 prompts are those of its slow tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ixc_prompts import prompts, rendered
from triward_server.config import PreprocessConfig
from triward_server.export.ixc_tokens import SlowTokenizer
from triward_server.intake.preprocess import Preprocessor


def test_ids_are_the_slow_tokenizers(ixc_folder: Path) -> None:
    preprocessor = Preprocessor(ixc_folder, PreprocessConfig())
    slow = SlowTokenizer(ixc_folder / "tokenizer.model")
    for turns in prompts():
        *asked, (_, response) = turns
        messages = json.dumps([{"role": role, "content": text} for role, text in asked]).encode()
        found = preprocessor.features(messages, [response.encode()], [])
        ids = [*found.prompt_ids.tolist(), *found.response_ids[0].tolist()]
        assert ids == [1, *slow.published(rendered(turns))], turns
