"""A policy for the notebook on GRPO, so small that it trains in seconds: random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from triward_server.export.random_checkpoint import make_checkpoint

# No text can hold placeholders of media; a policy that never learnt them may write them.
MEDIA = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def tiny_policy(seed: int = 0) -> tuple[Qwen2ForCausalLM, Any, list[int]]:
    """Return a language model, its tokenizer, and the ids of tokens that it must not write."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint("tiny", seed, Path(folder, "checkpoint"))
        tokenizer = AutoTokenizer.from_pretrained(Path(folder, "checkpoint"), padding_side="left")
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), tokenizer, tokenizer.convert_tokens_to_ids([*MEDIA])
