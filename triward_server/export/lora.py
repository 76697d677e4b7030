"""A PEFT adapter of LoRA (arXiv:2106.09685), merged into its base checkpoint: W + scale * B A.

Strictly: every tensor of the adapter is used, every module that it names has its pair, and what
changes a score in a way that is not merged here (DoRA, biases) is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..engine.naming import canonical_name
from ..engine.weights import INDEX_FILE, open_tensors, weight_files
from ..errors import CheckpointError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter may leave out or turn off, and nothing else.
_OFF: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "exclude_modules": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
}
_LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder has it.

    Attributes:
        fields: of `adapter_config.json`.
        pairs: A [r, in] and B [out, r], by the canonical name of the weight that they change.
        whole: tensors that stand in for the base's, or that it lacks: a head.
    """

    fields: Mapping[str, Any]
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    whole: Mapping[str, Tensor]

    def scale(self, name: str) -> float:
        """Return what the product for a weight is multiplied by."""
        rank = float(self._of(name, "rank_pattern", self.fields["r"]))
        alpha = float(self._of(name, "alpha_pattern", self.fields["lora_alpha"]))
        return alpha / (rank**0.5 if self.fields.get("use_rslora") else rank)

    def rank(self, name: str) -> int:
        """Return the rank that the configuration gives for a weight."""
        return int(self._of(name, "rank_pattern", self.fields["r"]))

    def _of(self, name: str, pattern: str, default: Any) -> Any:
        patterns: Mapping[str, Any] = self.fields.get(pattern) or {}
        module = name.removesuffix(".weight")
        found = (v for key, v in patterns.items() if re.search(rf"(^|\.){key}$", module))
        return next(found, default)

    def asks_for(self, name: str) -> bool:
        """Return True if it has a pair for the same weight of another layer."""
        return _of_any_layer(name) in {_of_any_layer(each) for each in self.pairs}


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter.

    Raises:
        CheckpointError: a file is missing, or asks for what is not merged here.
    """
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file; is {folder} a LoRA adapter?")
    fields: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / _CONFIG}: peft_type {fields.get('peft_type')!r}")
    for name, allowed in _OFF.items():
        if fields.get(name) not in allowed:
            raise CheckpointError(f"{folder / _CONFIG}: {name} {fields[name]!r} is not supported")
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / _WEIGHTS).items():
        name = key.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
        match = re.fullmatch(r"(.+)\.lora_([AB])\.(?:default\.)?weight", name)
        if match:
            halves.setdefault(canonical_name(f"{match[1]}.weight"), {})[match[2]] = tensor
        elif "lora_" in name:
            raise CheckpointError(f"{folder / _WEIGHTS}: tensor {key!r} is not supported")
        else:
            whole[canonical_name(name)] = tensor
    for name, pair in halves.items():
        if len(pair) != 2:
            raise CheckpointError(f"{folder / _WEIGHTS}: {name} has lora_{min(pair)} alone")
    wanted = fields.get("target_modules") or []
    for module in [] if isinstance(wanted, str) else wanted:
        if not any(f".{name}".endswith(f".{module}.weight") for name in halves):
            raise CheckpointError(f"{folder / _WEIGHTS}: nothing for target module {module!r}")
    return Adapter(fields, {name: (p["A"], p["B"]) for name, p in halves.items()}, whole)


def merge(checkpoint: Path, folder: Path, output: Path) -> None:
    """Write a checkpoint's weights and configuration with an adapter merged in.

    Args:
        checkpoint: the adapter's base.
        folder: the adapter's.
        output: gets the same weight files, and `config.json`.

    Raises:
        CheckpointError: see `read_adapter`; or the adapter is another checkpoint's.
    """
    adapter = read_adapter(folder)
    left = {*adapter.pairs, *adapter.whole}
    files = weight_files(checkpoint)
    for file in files:
        merged = dict(_merged(file, adapter, left))
        if file == files[-1]:  # a head that the base does not have
            new = {name for name in left if name.startswith(("score.", "v_head."))}
            merged |= {name: adapter.whole[name] for name in new & adapter.whole.keys()}
            left -= new
        save_file(merged, output / file.name, metadata={"format": "pt"})
        (output / file.name).chmod(0o644)  # safetensors leaves it to its owner
    for name in sorted(left):
        raise CheckpointError(f"{folder}: {name!r} is no weight of {checkpoint}, its base")
    _write_index(checkpoint, output, [name for name in adapter.whole if name not in left])
    _write_config(checkpoint, adapter, output)


def _merged(file: Path, adapter: Adapter, left: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file, those that the adapter changes changed, which are taken from `left`."""
    with open_tensors(file, "cpu") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            name, tensor = canonical_name(key), tensors.get_tensor(key)
            if name in adapter.whole:
                own = adapter.whole[name]
                _same(name, own.shape, tensor.shape)
                left.discard(name)
                yield key, own.to(tensor.dtype)
            elif name in adapter.pairs:
                left.discard(name)
                yield key, _sum(name, tensor, adapter)
            elif adapter.asks_for(name):
                raise CheckpointError(
                    f"the adapter has nothing for {name!r}, but for other layers' weights of that "
                    "name, so its base is another checkpoint"
                )
            else:
                yield key, tensor


def _sum(name: str, weight: Tensor, adapter: Adapter) -> Tensor:
    a, b = (part.float() for part in adapter.pairs[name])
    rank = adapter.rank(name)
    _same(f"{name}: lora_A", a.shape, (rank, weight.shape[1]))
    _same(f"{name}: lora_B", b.shape, (weight.shape[0], rank))
    return (weight.float() + adapter.scale(name) * (b @ a)).to(weight.dtype)


def _of_any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _same(name: str, found: torch.Size, expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"the adapter's {name} has shape {list(found)}, its base asks for {list(expected)}"
        )


def _write_index(checkpoint: Path, output: Path, names: list[str]) -> None:
    """Name the file that holds a new head, where files are listed."""
    file = checkpoint / INDEX_FILE
    if not file.is_file():
        return
    index = json.loads(file.read_text())
    last = weight_files(checkpoint)[-1].name
    new = [name for name in names if name.startswith("score.")]
    index["weight_map"] |= dict.fromkeys(new, last)
    (output / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(checkpoint: Path, adapter: Adapter, output: Path) -> None:
    """Name the class of a base that gets a head of one label."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    classes = config.get("architectures") or []
    head = adapter.whole.get("score.weight")
    if head is not None and classes and classes[0].endswith("ForCausalLM"):
        if len(head) != 1:
            raise CheckpointError(f"{_WEIGHTS}: the head has {len(head)} labels, only 1 works")
        name = f"{classes[0].removesuffix('ForCausalLM')}ForSequenceClassification"
        config |= {"architectures": [name], **_LABELS}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
