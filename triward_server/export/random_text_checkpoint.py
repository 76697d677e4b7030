"""Text reward models with random weights, in the on-disk layout of their published checkpoints.

One for each text architecture, as small as `random_checkpoint`'s. What tells them apart is real:
templates that add a BOS token, or refuse a role, or look into what a message says; windows that are
shorter than a prompt, capped products, heads that are wider than hidden / heads. Their tokenizer is
Qwen2's kind of byte-pair encoding for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from .random_checkpoint import (
    SIZES,
    Dimensions,
    Size,
    random_tensor,
    save,
    train_tokenizer,
    write_json,
)

# Skywork-Reward-Llama's writes no BOS, which its tokenizer adds.
_LLAMA_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
"""

# Writes the BOS that the tokenizer adds too, and knows neither system prompts nor two turns of one.
_GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ raise_exception('System role not supported') }}
{%- elif (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
"""

_QWEN2_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
"""

# Parts a thought from an answer, and writes an empty thought where there is none.
_QWEN3_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last -%}
{%- set thought = '' -%}
{%- set answer = message.content -%}
{%- if '</think>' in answer -%}
{%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set answer = answer.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + answer }}
{%- else -%}
{{ message.content }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Kind:
    """Properties of an architecture's checkpoints.

    Attributes:
        special: special tokens.
        ordinary: text that happens to be one token.
        bos: which of them the tokenizer puts first; None: none.
        eos: which ends a turn.
        pad: which pads.
        template: the chat template.
        fields: of config.json, beside those that all have.
    """

    special: tuple[str, ...]
    ordinary: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    template: str
    fields: dict[str, Any]


_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>")
KINDS: dict[str, Kind] = {
    "llama": Kind(
        special=(
            "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>",
            "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
        ),
        ordinary=(),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
        template=_LLAMA_TEMPLATE,
        fields={
            "attention_bias": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    ),
    "gemma2": Kind(
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        ordinary=("<table>", "</h1>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        template=_GEMMA_TEMPLATE,
        fields={
            "attention_bias": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 10_000.0,
            "sliding_window": 48,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "qwen2": Kind(
        special=_QWEN, ordinary=("<tool_call>",), bos=None, eos="<|im_end|>", pad="<|endoftext|>",
        template=_QWEN2_TEMPLATE, fields={"rope_theta": 1_000_000.0, "use_sliding_window": False},
    ),
    "qwen3": Kind(
        special=_QWEN, ordinary=("<tool_call>", "<think>", "</think>"), bos=None, eos="<|im_end|>",
        pad="<|endoftext|>", template=_QWEN3_TEMPLATE,
        fields={"attention_bias": False, "rope_theta": 1_000_000.0},
    ),
}  # fmt: skip

# As their publishers have them: Qwen2.5 carries trl's value head, the others transformers' head.
_VALUE_HEAD: tuple[str, ...] = ("qwen2",)
_WIDE_HEADS: tuple[str, ...] = ("gemma2", "qwen3")


def make_text_checkpoint(architecture: str, size: Size, seed: int, output: Path) -> None:
    """Write a checkpoint.

    Args:
        architecture: a key of `KINDS`.
        size: `tiny` or `small`.
        seed: two checkpoints of one architecture, size and seed are equal.
        output: a folder that does not exist yet.

    Raises:
        FileExistsError: the folder exists.
    """
    output.mkdir(parents=True)
    kind, dimensions = KINDS[architecture], SIZES[size]
    tokenizer = train_tokenizer(dimensions.merges, seed, kind.special, kind.ordinary)
    if kind.bos:
        bos = (kind.bos, tokenizer.token_to_id(kind.bos))
        tokenizer.post_processor = TemplateProcessing(single=f"{kind.bos} $A", special_tokens=[bos])
    tokenizer.save(str(output / "tokenizer.json"))
    write_json(output / "tokenizer_config.json", _tokenizer_config(kind, dimensions))
    write_json(output / "config.json", _config(architecture, dimensions, tokenizer))
    _write_weights(architecture, dimensions, seed, output)


def _tokenizer_config(kind: Kind, d: Dimensions) -> dict[str, Any]:
    return {
        "bos_token": kind.bos,
        "eos_token": kind.eos,
        "pad_token": kind.pad,
        "chat_template": kind.template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": d.positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _config(architecture: str, d: Dimensions, tokenizer: Tokenizer) -> dict[str, Any]:
    kind = KINDS[architecture]
    family = {"llama": "Llama", "gemma2": "Gemma2", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    task = "CausalLM" if architecture in _VALUE_HEAD else "SequenceClassification"
    head_dim = d.hidden // d.heads
    ids = {
        f"{role}_token_id": tokenizer.token_to_id(token)
        for role, token in {"bos": kind.bos, "eos": kind.eos, "pad": kind.pad}.items()
        if token
    }
    return {
        "architectures": [f"{family[architecture]}For{task}"],
        "model_type": architecture,
        **ids,
        "head_dim": head_dim * 3 // 2 if architecture in _WIDE_HEADS else head_dim,
        "hidden_act": "silu",
        "hidden_size": d.hidden,
        "id2label": {"0": "LABEL_0"},
        "intermediate_size": d.inner,
        "label2id": {"LABEL_0": 0},
        "max_position_embeddings": d.positions,
        "num_attention_heads": d.heads,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": d.vocab_size,
        **kind.fields,
    }


def _write_weights(architecture: str, d: Dimensions, seed: int, output: Path) -> None:
    config = AutoConfig.from_pretrained(output)
    valued = architecture in _VALUE_HEAD
    auto: Any = AutoModelForCausalLM if valued else AutoModelForSequenceClassification
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in auto.from_config(config).state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = random_tensor(name, shape, seed, "cpu")
        if name == "score.weight":
            tensor = tensor * 10
        elif architecture == "gemma2" and "norm" in name:
            tensor = tensor - 1  # Gemma adds 1 when it reads them
        tensors[name] = tensor
    save(tensors, output / "model.safetensors")
    if valued:
        head = random_tensor("v_head", torch.Size([1, d.hidden]), seed, "cpu") * 10
        bias = torch.full((1,), 0.5, dtype=torch.bfloat16)
        save(
            {"v_head.summary.weight": head, "v_head.summary.bias": bias},
            output / "value_head.safetensors",
        )
