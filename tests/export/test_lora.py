"""Adapters of LoRA, merged at export: as if each ran beside its base, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.conftest import Exit
from triward_server.config import ForwardConfig
from triward_server.engine.scoring import Scorer
from triward_server.errors import CheckpointError
from triward_server.export.prepared import prepared
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.export.reference import fp32_budget
from triward_server.schema import Features, Scores

CPU = ForwardConfig(dtype="float32", device="cpu", threads=1)
TARGETS = ("q_proj", "v_proj", "down_proj")
IDS = np.arange(30, 130, dtype=np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model without a head, in float32: rounding would hide mistakes."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    make_text_checkpoint("llama", "tiny", 0, folder)
    tensors = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
    del tensors["score.weight"]
    tensors["lm_head.weight"] = torch.zeros(1024, 128)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for name in ("id2label", "label2id"):
        del config[name]
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(base: Path, rank: int = 4) -> dict[str, torch.Tensor]:
    """An adapter's, by PEFT's names."""
    generator = torch.Generator().manual_seed(0)
    found = {"base_model.model.score.weight": torch.randn(1, 128, generator=generator)}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in TARGETS:
            for half, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                value = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                found[f"base_model.model.{module}.lora_{half}.weight"] = value
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": list(TARGETS), "modules_to_save": ["score"], "lora_dropout": 0.05,
        "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "base_model_name_or_path": "somebody/base", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


def beside(base: Path, tensors: dict[str, torch.Tensor], scale: Callable[[str], float]) -> float:
    """The score with each pair run beside its matrix, as PEFT does before a merge."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    prefix = "base_model.model."
    for name, module in model.named_modules():
        a, b = (tensors.get(f"{prefix}{name}.lora_{half}.weight") for half in "AB")
        if a is not None and b is not None:
            module.register_forward_hook(partial(_add, scale(name) * (a.t() @ b.t())))
    model.score.weight.data = tensors[f"{prefix}score.weight"].clone()
    with torch.inference_mode():
        return float(model.eval()(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0, 0])


def _add(product: torch.Tensor, module: Any, inputs: Any, out: Any) -> Any:
    return out + inputs[0] @ product


def served(base: Path, adapter: Path) -> float:
    with prepared(base, adapter) as folder:
        (result,) = Scorer(folder, CPU).score([Features(IDS[:60], (IDS[60:],))])
    assert isinstance(result, Scores), result
    return float(result.scores[0])


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, lambda name: 8 / 4),
        ({"use_rslora": True}, lambda name: 8 / 4**0.5),
        ({"alpha_pattern": {"down_proj": 2}}, lambda name: 0.5 if "down_proj" in name else 2.0),
        (
            {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 32, "^model.layers.1.*": 2}},
            lambda name: (
                8.0 if name.endswith("s.0.self_attn.q_proj") else 0.5 if ".1." in name else 2.0
            ),
        ),
        (
            {"alpha_pattern": {"v_proj|proj": 2}},
            lambda name: 0.5 if "v_proj" in name else 2.0,
        ),
        (
            {"r": 8, "rank_pattern": {r"model\.layers\.\d+\..*_proj": 4}},
            lambda name: 2.0,
        ),
        (
            {"target_modules": "model.*(q_proj|v_proj|down_proj)", "init_lora_weights": "gaussian"},
            lambda name: 2.0,
        ),
        ({"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]}, lambda name: 2.0),
    ],
    ids=[
        "alpha / r",
        "rslora",
        "patterns",
        "whole names",
        "either of two",
        "ranks",
        "a pattern of modules",
        "a module's whole name",
    ],
)
def test_a_merged_adapter_scores_as_one_beside_its_base(
    fields: dict[str, Any], scale: Callable[[str], float], base: Path, tmp_path: Path
) -> None:
    tensors = tensors_of(base)
    score = served(base, write(tmp_path / "adapter", tensors, **fields))
    expected = beside(base, tensors, scale)
    assert abs(score - expected) <= fp32_budget(expected)
    for wrong in (lambda name: 2 * scale(name), lambda name: 0.0):  # the control
        assert abs(score - beside(base, tensors, wrong)) > 10 * fp32_budget(expected)


def test_it_is_exported(base: Path, tmp_path: Path, export: Callable[..., Exit]) -> None:
    adapter = write(tmp_path / "adapter", tensors_of(base))
    output = tmp_path / "models"
    flags = ("--checkpoint", base, "--output", output, "--device=cpu", "--dtype=float32")
    result = export(*flags, "--lora", adapter)
    assert result.code == 0, result.stderr
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "models"}
    manifest = json.loads((output / "reward" / "1" / "manifest.json").read_text())
    assert manifest["lora"] == str(adapter)
    files = (output / "reward_forward" / "1" / "checkpoint").glob("*.safetensors")
    assert [(file.is_symlink(), file.stat().st_mode & 0o777) for file in files] == [(False, 0o644)]
    result = export(*flags, "--force")  # without the adapter there is no head
    assert result.code == 1 and "this is neither" in result.stderr


def without(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], dict[str, Any]]]
BAD = {
    "use_dora True": (dict, {"use_dora": True}),
    "bias 'all'": (dict, {"bias": "all"}),
    "peft_type 'IA3'": (dict, {"peft_type": "IA3"}),
    "layers_to_transform .1": (dict, {"layers_to_transform": [1]}),
    "layers_to_transform 0": (dict, {"layers_to_transform": 0}),
    "layer_replication": (dict, {"layer_replication": [[0, 2], [1, 4]]}),
    "init_lora_weights 'pissa'": (dict, {"init_lora_weights": "pissa"}),
    "some_new_kind True": (dict, {"some_new_kind": True}),
    "alpha_pattern: 'layers.9.*' matches no module": (dict, {"alpha_pattern": {"layers.9.*": 2}}),
    "rank_pattern: 'proj' matches no module": (dict, {"rank_pattern": {"proj": 4}}),
    r"alpha_pattern: '\(q_proj': ": (dict, {"alpha_pattern": {"(q_proj": 4}}),
    "rank_pattern .4. is no object": (dict, {"rank_pattern": [4]}),
    "adapter_config.json: no r$": (dict, {"r": None}),
    "adapter_config.json: no lora_alpha$": (dict, {"lora_alpha": None}),
    "r 0 is not a whole number above 0": (dict, {"r": 0}),
    "lora_alpha 'much' is not a number": (dict, {"lora_alpha": "much"}),
    r"rank_pattern\['q_proj'\] 2.5 is not a whole number": (
        dict, {"rank_pattern": {"q_proj": 2.5}},
    ),
    "are one weight": (
        lambda t: t | {
            n.replace("model.layers", "model.language_model.layers"): v.clone()
            for n, v in t.items() if "layers.0.self_attn.q_proj" in n
        },
        {},
    ),
    "lora_A has shape .4, 256., its base asks for .8, 256": (dict, {"r": 8}),
    "nothing for target module 'o_proj'": (dict, {"target_modules": [*TARGETS, "o_proj"]}),
    "has lora_B alone": (lambda t: without(t, "layers.1.self_attn.q_proj.lora_A"), {}),
    "nothing for 'language_model.layers.3.mlp.down_proj": (
        lambda t: without(t, "layers.3.mlp.down_proj"), {},
    ),
    "'more' is no weight of": (lambda t: t | {"base_model.model.more": torch.zeros(2)}, {}),
    "layers.4.self_attn.q_proj.weight' is no weight of": (
        lambda t: t | {
            "base_model.model.model.layers.4.self_attn.q_proj.lora_A.weight": torch.zeros(4, 128),
            "base_model.model.model.layers.4.self_attn.q_proj.lora_B.weight": torch.zeros(128, 4),
        },
        {},
    ),
    "lora_embedding_A": (
        lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 4)},
        {},
    ),
    "the head has 2 labels": (
        lambda t: t | {"base_model.model.score.weight": torch.zeros(2, 128)}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_what_is_not_merged_is_refused(words: str, base: Path, tmp_path: Path) -> None:
    change, fields = BAD[words]
    adapter = write(tmp_path / "adapter", change(tensors_of(base)), **fields)
    with pytest.raises(CheckpointError, match=words):
        prepared(base, adapter, tmp_path).__enter__()
    assert {each.name for each in tmp_path.iterdir()} == {"adapter"}


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    """With another width, or more layers than the adapter was trained on."""
    adapter = write(tmp_path / "adapter", tensors_of(base))
    deeper = Path(shutil.copytree(base, tmp_path / "deeper"))
    tensors = load_file(deeper / "model.safetensors")
    more = {n.replace("layers.3", "layers.4"): t.clone() for n, t in tensors.items() if ".3." in n}
    save_file(tensors | more, deeper / "model.safetensors")
    with pytest.raises(CheckpointError, match="its base is another checkpoint"):
        prepared(deeper, adapter, tmp_path).__enter__()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter(name: str, base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", tensors_of(base))
    (adapter / name).unlink()
    with pytest.raises(CheckpointError, match=r"is .* a LoRA adapter"):
        prepared(base, adapter).__enter__()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b"\xff", "not JSON"),
        ("adapter_config.json", b"[]", "not a JSON object"),
        ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 8}', "no r$"),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": 8}', "no lora_alpha$"),
        ("adapter_model.safetensors", b"", "not a safetensors file"),
        ("adapter_model.safetensors", b"\xff" * 100, "not a safetensors file"),
    ],
)
def test_a_damaged_file_is_named(
    name: str, content: bytes, words: str, base: Path, tmp_path: Path
) -> None:
    adapter = write(tmp_path / "adapter", tensors_of(base))
    (adapter / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: {words}"):
        prepared(base, adapter, tmp_path).__enter__()


def test_fields_of_todays_peft_pass(base: Path, tmp_path: Path) -> None:
    """All that PEFT writes for an adapter of plain LoRA."""
    off = dict.fromkeys(
        (
            "alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config",
            "exclude_modules", "layer_replication", "layers_pattern", "layers_to_transform",
            "megatron_config", "revision", "target_parameters", "trainable_token_indices",
        )
    )  # fmt: skip
    said = {
        "ensure_weight_tying": False, "fan_in_fan_out": False, "init_lora_weights": True,
        "loftq_config": {}, "lora_bias": False, "megatron_core": "megatron.core",
        "peft_version": "0.18.0", "qalora_group_size": 16, "use_qalora": False,
    }  # fmt: skip
    adapter = write(tmp_path / "adapter", tensors_of(base), **off, **said)
    with prepared(base, adapter) as folder:
        assert (folder / "model.safetensors").is_file()
