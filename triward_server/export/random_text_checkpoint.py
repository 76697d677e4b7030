"""Text reward models with random weights, in the on-disk layout of their published checkpoints.

One for each text architecture, as small as `random_checkpoint`'s. What tells them apart is real:
templates that add a BOS token, or refuse a role, or look into what a message says; windows that are
shorter than a prompt, capped products, heads that are wider than hidden / heads. Their tokenizer is
Qwen2's kind of byte-pair encoding, and InternLM2's a `tokenizer.model` of SentencePiece.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from .random_checkpoint import (
    SIZES,
    Dimensions,
    Size,
    invented_text,
    random_tensor,
    save,
    train_tokenizer,
    write_json,
)
from .random_sentencepiece import train_pieces, write_model
from .reference import reference_model

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

# Roles alternate, and there is no system prompt; brackets are text.
_MISTRAL_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- elif message.role == 'user' -%}
{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else -%}
{{ message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
"""

_INTERNLM2_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Kind:
    """Properties of an architecture's checkpoints.

    Attributes:
        model: the published class.
        special: special tokens.
        ordinary: text that happens to be one token.
        bos: which of them the tokenizer puts first; None: none.
        eos: which ends a turn.
        pad: which pads.
        template: the chat template.
        fields: of config.json, beside those that all have; None: not this one.
        roles: tokens of a `tokenizer.model`, by the names of its pieces; None: it has no such file.
        head: a key of `backbone.HEADS`.
        spread: of the head's weights. Scores spread as far, and so do their rounding errors, of
            which a score near 0 may have as little as one near 1.
    """

    model: str
    special: tuple[str, ...]
    ordinary: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    template: str
    fields: dict[str, Any]
    roles: dict[str, str] | None = None
    head: str = "score"
    spread: int = 10


_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>")
KINDS: dict[str, Kind] = {
    "llama": Kind(
        model="LlamaForSequenceClassification",
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
        model="Gemma2ForSequenceClassification",
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
        model="Qwen2ForCausalLM",
        head="v_head",
        special=_QWEN, ordinary=("<tool_call>",), bos=None, eos="<|im_end|>", pad="<|endoftext|>",
        template=_QWEN2_TEMPLATE, fields={"rope_theta": 1_000_000.0, "use_sliding_window": False},
    ),
    "qwen3": Kind(
        model="Qwen3ForSequenceClassification",
        special=_QWEN, ordinary=("<tool_call>", "<think>", "</think>"), bos=None, eos="<|im_end|>",
        pad="<|endoftext|>", template=_QWEN3_TEMPLATE,
        fields={"attention_bias": False, "rope_theta": 1_000_000.0},
    ),
    "qwen2-score": Kind(  # as ms-swift saves them
        model="Qwen2ForSequenceClassification",
        special=_QWEN, ordinary=("<tool_call>",), bos=None, eos="<|im_end|>", pad="<|endoftext|>",
        template=_QWEN2_TEMPLATE, fields={"model_type": "qwen2", "rope_theta": 1_000_000.0},
        head="biased_score", spread=4,
    ),
    "qwen2-reward": Kind(  # Qwen2.5-Math-RM, WorldPM
        model="Qwen2ForRewardModel",
        special=_QWEN, ordinary=("<tool_call>",), bos=None, eos="<|im_end|>", pad="<|endoftext|>",
        template=_QWEN2_TEMPLATE,
        fields={
            "model_type": "qwen2", "rope_theta": 1_000_000.0, "id2label": None, "label2id": None,
            "auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"},
        },
        head="two_layers",
    ),
    "mistral": Kind(
        model="MistralForSequenceClassification",
        special=("<unk>", "<s>", "</s>"), ordinary=(), bos="<s>", eos="</s>", pad="<unk>",
        template=_MISTRAL_TEMPLATE,
        fields={"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "sliding_window": 48},
        spread=4,
    ),
    "internlm2": Kind(
        model="InternLM2ForRewardModel",
        special=("<unk>", "<s>", "</s>", "<|reward|>", "<|im_end|>", "<|im_start|>"),
        ordinary=("\uff21", "\u2014\u2014"),
        bos="<s>",
        eos="</s>",
        pad="</s>",
        template=_INTERNLM2_TEMPLATE,
        fields={
            "auto_map": {
                "AutoConfig": "configuration_internlm2.InternLM2Config",
                "AutoModel": "modeling_internlm2.InternLM2ForRewardModel",
            },
            "bias": False,
            "head_dim": None,
            "id2label": None,
            "label2id": None,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        roles={
            "[UNUSED_TOKEN_130]": "<|reward|>",
            "[UNUSED_TOKEN_145]": "<|im_end|>",
            "[UNUSED_TOKEN_146]": "<|im_start|>",
        },
    ),
}  # fmt: skip

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
    if kind.roles is None:
        ids = _write_tokenizer(kind, dimensions, seed, output)
    else:
        ids = _write_sentencepiece(kind, kind.roles, dimensions, seed, output)
    write_json(output / "config.json", _config(architecture, dimensions, ids))
    _write_weights(architecture, dimensions, seed, output)


def _write_tokenizer(kind: Kind, d: Dimensions, seed: int, output: Path) -> dict[str, int]:
    """Write `tokenizer.json`; the ids of tokens with a role."""
    tokenizer = train_tokenizer(d.merges, seed, kind.special, kind.ordinary)
    if kind.bos:
        bos = (kind.bos, tokenizer.token_to_id(kind.bos))
        tokenizer.post_processor = TemplateProcessing(single=f"{kind.bos} $A", special_tokens=[bos])
    tokenizer.save(str(output / "tokenizer.json"))
    write_json(output / "tokenizer_config.json", _tokenizer_config(kind, d))
    roles = {"bos": kind.bos, "eos": kind.eos, "pad": kind.pad}
    ids = ((role, tokenizer.token_to_id(token)) for role, token in roles.items() if token)
    return {f"{role}_token_id": id_ for role, id_ in ids if id_ is not None}


def _write_sentencepiece(
    kind: Kind, roles: dict[str, str], d: Dimensions, seed: int, output: Path
) -> dict[str, int]:
    """Write `tokenizer.model`, whose class is remote code; the ids of tokens with a role."""
    pieces = train_pieces(
        invented_text(seed), d.merges, kind.ordinary, ["[UNUSED_TOKEN_0]", *roles]
    )
    (output / "tokenizer.model").write_bytes(write_model(pieces))
    ids = {roles.get(piece.text, piece.text): id_ for id_, piece in enumerate(pieces)}
    added = {str(ids[token]): {"content": token, "special": True} for token in kind.special}
    config = _tokenizer_config(kind, d) | {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    write_json(output / "tokenizer_config.json", config)
    named = {"bos": kind.bos, "eos": kind.eos, "pad": kind.pad, "reward": "<|reward|>"}
    return {f"{role}_token_id": ids[token] for role, token in named.items() if token}


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


def _config(architecture: str, d: Dimensions, ids: dict[str, int]) -> dict[str, Any]:
    kind = KINDS[architecture]
    head_dim = d.hidden // d.heads
    fields = {
        "architectures": [kind.model],
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
    return {name: value for name, value in fields.items() if value is not None}


def _causal(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _write_weights(architecture: str, d: Dimensions, seed: int, output: Path) -> None:
    config = AutoConfig.from_pretrained(output)
    # As their publishers have them: Qwen2.5 carries trl's value head.
    kind = KINDS[architecture]
    valued = kind.head == "v_head"
    model = _causal(config) if valued else reference_model(config, kind.head, torch.device("cpu"))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = random_tensor(name, shape, seed, "cpu")
        if name in ("score.weight", "score.2.weight", "v_head.weight"):
            tensor = tensor * kind.spread
        elif architecture == "gemma2" and "norm" in name:
            tensor = tensor - 1  # Gemma adds 1 when it reads them
        tensors[name] = tensor
    save(tensors, output / "model.safetensors")
    if valued:
        head = random_tensor("v_head", torch.Size([1, d.hidden]), seed, "cpu") * kind.spread
        bias = torch.full((1,), 0.5, dtype=torch.bfloat16)
        save(
            {"v_head.summary.weight": head, "v_head.summary.bias": bias},
            output / "value_head.safetensors",
        )
