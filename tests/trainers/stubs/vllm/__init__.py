"""In vLLM's place: an engine whose n-th answer is the n-th of a file's.

The environment's TRIWARD_ANSWERS names a JSON file: `answers`, texts; `gate`, a file for which all
answers but the first `free` wait, or null.
"""

import asyncio
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoTokenizer

__version__ = "0.29.0"


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int | None
    min_tokens: int
    skip_special_tokens: bool
    logprobs: int | None


class AsyncEngineArgs(SimpleNamespace):
    """Whatever it is given."""


class AsyncLLMEngine:
    def __init__(self, model):
        tokenizer = AutoTokenizer.from_pretrained(model)
        plan = json.loads(Path(os.environ["TRIWARD_ANSWERS"]).read_text())
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._answers = [
            (text, [*tokenizer.encode(text, add_special_tokens=False), end])
            for text in plan["answers"]
        ]
        self._free = plan["free"]
        self._gate = Path(plan["gate"])
        self._count = itertools.count()
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)

    @classmethod
    def from_engine_args(cls, arguments):
        return cls(arguments.model)

    async def is_sleeping(self):
        return False

    async def generate(self, prompt, sampling_params, request_id):
        number = next(self._count)
        while number >= self._free and not self._gate.exists():
            await asyncio.sleep(0.05)
        text, ids = self._answers[number % len(self._answers)]
        yield SimpleNamespace(
            outputs=[SimpleNamespace(text=text, token_ids=ids, finish_reason="stop", logprobs=None)]
        )
