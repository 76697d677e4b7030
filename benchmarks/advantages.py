"""Share of samples with a gradient in a tiny GRPO run, with and without a choice of samples.

    python -m benchmarks.advantages --output benchmarks/results/DATE-advantages.json

TRL's GRPOTrainer on the CPU, a random policy, and a reward that is soon as high as it gets: the
length of a completion up to a limit, plus a small number that depends on its text, so that no two
rewards are equal, as a reward model's are not. No server.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import typer
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from benchmarks.commands import run_main
from benchmarks.measure import machine, writable
from triward.integrations.trl_selection import Selection, SelectiveSampling
from triward.rewards import SelectiveSampleBuffer
from triward_server.export.random_checkpoint import make_checkpoint

PROMPTS, GENERATIONS, TOKENS = 4, 4, 8
SPREAD = 0.01  # above what the small numbers make, below one character
ENOUGH = 40  # characters; a random token has about seven

KINDS: dict[str, dict[str, Any]] = {
    "GRPO": {},
    "buffer": {"buffer": True},
    "dynamic sampling": {"max_rounds": 4},
    "both": {"buffer": True, "max_rounds": 4},
}


def length(completions: list[str], **columns: object) -> list[float]:
    """Reward 1 for `ENOUGH` characters, less for fewer; and up to 0.001 by the text."""
    small = [sha256(text.encode()).digest()[0] / 255_000 for text in completions]
    return [
        min(len(text), ENOUGH) / ENOUGH + each
        for text, each in zip(completions, small, strict=True)
    ]


def policy(size: int, end: int, pad: int) -> Qwen2ForCausalLM:
    """Return the same random one each time."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=pad, eos_token_id=end,
        )
    )  # fmt: skip


def trained(kind: str, steps: int, checkpoint: Path, folder: Path) -> list[dict[str, float]]:
    """Train, and return TRL's log of each step."""
    trl, datasets = import_module("trl"), import_module("datasets")  # seconds
    choosing: Any = type("ChoosingTrainer", (SelectiveSampling, trl.GRPOTrainer), {})
    settings = dict(KINDS[kind])
    if settings.pop("buffer", False):
        settings["buffer"] = SelectiveSampleBuffer(64, threshold=0.1, max_age=20)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    prompts = [f"What is {n} + {n}?" for n in range(32)]
    trainer = choosing(
        policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id),
        length,
        args=trl.GRPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True, seed=0, max_steps=steps, learning_rate=5e-3,
            lr_scheduler_type="constant", num_generations=GENERATIONS,
            per_device_train_batch_size=PROMPTS * GENERATIONS, max_completion_length=TOKENS,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        selection=Selection(spread=SPREAD, **settings),
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def shares(log: list[dict[str, float]], parts: int = 4) -> dict[str, list[float]]:
    """Mean of each figure in each part of a run."""
    names = {
        "with a gradient": "selection/with_gradient",
        "with a gradient as generated": "selection/fresh",
        "from the buffer": "selection/drawn",
        "rounds": "selection/rounds",
        "reward": "reward",
    }
    cuts = [len(log) * part // parts for part in range(parts + 1)]
    pieces = [log[a:b] for a, b in pairwise(cuts)]
    return {
        title: [round(sum(each[name] for each in piece) / len(piece), 3) for piece in pieces]
        for title, name in names.items()
    }


def main(
    output: Annotated[Path, typer.Option(help="JSON file.")],
    steps: Annotated[int, typer.Option(min=4, help="Updates of each run.")] = 80,
) -> None:
    """Train each way and write the shares in each quarter of a run."""
    writable(output)
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        make_checkpoint("tiny", 0, checkpoint)
        found = {kind: shares(trained(kind, steps, checkpoint, Path(folder))) for kind in KINDS}
    print(json.dumps(found, indent=1))
    settings = {
        "steps": steps, "prompts": PROMPTS, "generations": GENERATIONS, "tokens": TOKENS,
        "spread": SPREAD, "max_rounds": 4, "capacity": 64, "threshold": 0.1, "max_age": 20,
    }  # fmt: skip
    document = {"machine": machine(), "settings": settings, "runs": found}
    output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
