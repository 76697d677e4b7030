"""What a server would compute for requests, in FLOPs: predicted by the engine's own plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import features
from benchmarks.workloads import Messages, PromptGroup
from triward_server.config import PreprocessConfig
from triward_server.engine import packing
from triward_server.engine.arena import Arena
from triward_server.engine.checkpoint import load_config, read_blueprint
from triward_server.engine.planning import costs, price
from triward_server.engine.prefix_cache import PrefixCache
from triward_server.intake.preprocess import Preprocessor

_CPU = torch.device("cpu")


class PlannedClient:
    """Takes a client's place: scores nothing, and adds up what each request costs.

    Its prefix cache keeps tokens without what they stand for.

    Args:
        checkpoint: of the model, in float32; no weights are read.
        cache_bytes: of the prefix cache; 0: none.

    Attributes:
        flops: of all requests so far.
    """

    def __init__(self, checkpoint: Path, cache_bytes: int) -> None:
        blueprint = read_blueprint(checkpoint, load_config(checkpoint))
        self._geometry = blueprint.geometry
        self._cost = costs(blueprint.decoder, blueprint.tower, torch.float32.itemsize)
        self._preprocessor = Preprocessor(checkpoint, PreprocessConfig())
        self._prefixes = PrefixCache(cache_bytes, blueprint.decoder, torch.float32, _CPU, False)
        self.flops = 0.0

    def score(self, messages: Messages) -> None:
        """Add a conversation."""
        self.score_responses(messages[:-1], [messages[-1]["content"]])

    def score_many(self, conversations: Sequence[Messages], concurrency: int) -> None:
        """Add conversations, one after another: the workloads' have nothing in common."""
        for messages in conversations:
            self.score(messages)

    def score_responses(self, prompt: Messages, responses: Sequence[str]) -> None:
        """Add a request."""
        item = features(self._preprocessor, PromptGroup(prompt, tuple(responses)))
        numbers = self._prefixes.numbers
        ordered = self._prefixes.begin(
            packing.sort_batch({0: item}, self._geometry, numbers=numbers)
        )
        shown: frozenset[int] = frozenset()
        for index, branch in enumerate(ordered.branches):
            shared = int(ordered.shared[index])
            self.flops += price(ordered, index, shared, shown, self._cost)[2]
            shown |= branch.media
        everything = range(len(ordered.branches))
        batch = packing.pack(ordered, everything, self._prefixes.find(ordered, everything))
        self._prefixes.recall(batch, Arena(_CPU))
