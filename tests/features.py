"""What tests read of the preprocessing's and the Scorer's results."""

from __future__ import annotations

import json
from typing import Any

from tests.conversations import Messages
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Float32Array, Scores


def ids_of(preprocessor: Preprocessor, messages: Messages) -> list[int]:
    """All token ids of a conversation without media."""
    wire = json.dumps(messages[:-1]).encode()
    features = preprocessor.features(wire, [messages[-1]["content"].encode()], [])
    return [*features.prompt_ids.tolist(), *features.response_ids[0].tolist()]


def scores_of(result: Any) -> Float32Array:
    """The scores of a request that did not fail."""
    assert isinstance(result, Scores), result
    return result.scores
