"""Checkpoints with random weights in the on-disk layout of Skywork-VL-Reward-7B.

For tests and benchmarks: every file that the real checkpoint has, in the same form, so that the
real loading code runs. Random weights give random opinions.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from .options import Size as Size

# Qwen2's tokenizer: how text is cut before byte pairs are merged, and the tokens with a role.
# The first group is special, the second is ordinary text that happens to be one token.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_ORDINARY = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

# Same renderings as Qwen2.5-VL's template: a default system prompt, one placeholder a media part.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' or 'video' in part -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

_TABLES = ("embed_tokens", "tok_embeddings", "position_embedding")  # looked up, not multiplied

_PROCESSOR: dict[str, Any] = {
    "min_pixels": 4 * 28 * 28,
    "max_pixels": 16384 * 28 * 28,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


@dataclass(frozen=True)
class Dimensions:
    """Dimensions of one size; everything else is the real model's."""

    merges: int
    vocab_size: int
    positions: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vision_hidden: int
    vision_inner: int
    vision_depth: int
    vision_heads: int
    whole_image_blocks: tuple[int, ...]


SIZES: dict[Size, Dimensions] = {
    "tiny": Dimensions(512, 1024, 16_384, 128, 256, 4, 4, 2, 64, 128, 4, 2, (1, 3)),
    "small": Dimensions(2048, 4096, 32_768, 512, 1536, 12, 8, 2, 256, 768, 8, 4, (3, 7)),
    "7b": Dimensions(
        2048, 152_064, 128_000, 3584, 18_944, 28, 28, 4, 1280, 3420, 32, 16, (7, 15, 23, 31)
    ),
}


def make_checkpoint(size: Size, seed: int, output: Path, device: str = "cpu") -> None:
    """Write a checkpoint.

    Args:
        size: `tiny` and `small` are for CPUs; `7b` has the real dimensions (16.6 GB).
        seed: two checkpoints of one size and seed are equal; on another device they may differ.
        output: a folder that does not exist yet.
        device: where the random numbers are drawn.

    Raises:
        FileExistsError: the folder exists.
    """
    output.mkdir(parents=True)
    dimensions = SIZES[size]
    tokenizer = train_tokenizer(dimensions.merges, seed, SPECIAL, _ORDINARY)
    _write_tokenizer(tokenizer, dimensions, output)
    write_json(output / "preprocessor_config.json", _PROCESSOR)
    write_json(output / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_json(output / "config.json", _config(dimensions, tokenizer))
    _write_weights(output, dimensions, seed, device)


def _config(d: Dimensions, tokenizer: Tokenizer) -> dict[str, Any]:
    """Flat, as the hub has it."""
    head = d.hidden // d.heads
    ids = {
        f"{role}_token_id": tokenizer.token_to_id(f"<|{token}|>")
        for role, token in {
            "bos": "endoftext", "eos": "im_end", "vision_start": "vision_start",
            "vision_end": "vision_end", "vision": "vision_pad", "image": "image_pad",
            "video": "video_pad",
        }.items()
    }  # fmt: skip
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **ids,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": d.hidden,
        "initializer_range": 0.02,
        "intermediate_size": d.inner,
        "max_position_embeddings": d.positions,
        "max_window_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "rms_norm_eps": 1e-06,
        # Qwen2.5-VL-7B: 16, 24 and 24 of 64 frequencies
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
        },
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": d.vision_depth,
            "fullatt_block_indexes": list(d.whole_image_blocks),
            "hidden_act": "silu",
            "hidden_size": d.vision_hidden,
            "in_chans": 3,
            "intermediate_size": d.vision_inner,
            "model_type": "qwen2_5_vl",
            "num_heads": d.vision_heads,
            "out_hidden_size": d.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
        "vocab_size": d.vocab_size,
    }


def _write_weights(output: Path, d: Dimensions, seed: int, device: str) -> None:
    """Shards, and the value head in a file of its own."""
    config = AutoConfig.from_pretrained(output)
    with torch.device("meta"):
        reference = Qwen2_5_VLForConditionalGeneration(config).state_dict()
    shapes = {_hub_name(name): tensor.shape for name, tensor in reference.items()}
    write_shards(output, shapes, lambda name: random_tensor(name, shapes[name], seed, device))
    head = {
        "v_head.summary.weight": random_tensor("v_head", torch.Size([1, d.hidden]), seed, device)
        * 10,
        "v_head.summary.bias": torch.zeros(1, dtype=torch.bfloat16),
    }
    save(head, output / "value_head.safetensors")


def write_shards(
    output: Path, shapes: Mapping[str, torch.Size], draw: Callable[[str], Tensor]
) -> None:
    """Four files of about equal size with an index; `draw` makes a tensor when it is written."""
    total = sum(shape.numel() for shape in shapes.values())
    shards: list[list[str]] = [[] for _ in range(4)]
    written = 0
    for name, shape in shapes.items():
        shards[4 * written // total].append(name)
        written += shape.numel()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save({name: draw(name) for name in names}, output / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    write_json(output / "model.safetensors.index.json", index)


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that all may read."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors leaves them to their owner


def random_tensor(name: str, shape: torch.Size, seed: int, device: str) -> Tensor:
    """Weights spread so that scores react to every token and pixel.

    transformers' own initialisation (0.02, no biases) makes attention so even that parity between
    two implementations would prove little. Much wider weights make the network chaotic: rounding
    grows from layer to layer until bfloat16 and float32 disagree altogether.
    """
    # torch's CPU generator looks at the low 32 bits only, so seed and name are mixed there.
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    noise = torch.randn(shape, generator=generator, device=device)
    if name.endswith(".bias"):
        noise = 0.2 * noise
    elif "norm" in name or ".ln_q." in name:
        noise = 1 + 0.2 * noise
    elif not any(table in name for table in _TABLES):
        noise = noise / shape[1:].numel() ** 0.5
    return noise.to(torch.bfloat16).cpu()


def _hub_name(name: str) -> str:
    """Return the name that transformers < 4.52 wrote, as the checkpoint on the hub has it."""
    for new, old in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def train_tokenizer(
    merges: int, seed: int, special: Sequence[str], ordinary: Sequence[str]
) -> Tokenizer:
    """Byte-pair encoding of an invented language, with tokens that have a role."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(invented_text(seed), trainer)
    tokenizer.add_special_tokens([_added(token, special=True) for token in special])
    tokenizer.add_tokens([_added(token, special=False) for token in ordinary])
    return tokenizer


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def invented_text(seed: int) -> Iterator[str]:
    """Invented words that follow a Zipf law between a few real ones, in several scripts."""
    rng = random.Random(seed)
    onsets = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "z", "ch", "sh", "st")
    vowels, codas = "aeiou", ("", "n", "r", "s", "t", "l")
    words = ["the", "of", "and", "is", "a", "in", "to", "answer", "question", "image", "value"]
    words += ["图", "答案", "是", "问题", "صورة", "جواب", "ответ", "画像", "그림", "é", "ß", "🙂"]
    words += ["return", "def", "self", "==", "{", "}", "()", "\n", "\n\n", "    ", ":", ",", "."]
    while len(words) < 2000:
        syllables = rng.randint(1, 3)
        parts = (
            rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas) for _ in range(syllables)
        )
        words.append("".join(parts))
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    for _ in range(2000):
        yield " ".join(rng.choices(words, weights, k=20))


def _write_tokenizer(tokenizer: Tokenizer, d: Dimensions, output: Path) -> None:
    tokenizer.save(str(output / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    write_json(output / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (output / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": token in SPECIAL,
        }
        for token in (*SPECIAL, *_ORDINARY)
    }  # fmt: skip
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": d.positions,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(output / "tokenizer_config.json", tokenizer_config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
