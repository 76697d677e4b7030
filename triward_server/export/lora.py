"""A PEFT adapter of LoRA (arXiv:2106.09685), merged into its base checkpoint: W + scale * B A.

Strictly: every tensor of the adapter is used, every module that it names has its pair, and what
changes a score in a way that is not merged here (DoRA, biases) is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..engine.naming import canonical_name
from ..engine.weights import INDEX_FILE, open_tensors, weight_files
from ..errors import CheckpointError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields that are read here, and those that change no product: how and of what it was trained, and
# which tensors are saved whole (those that are there are taken).
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules",
}  # fmt: skip
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "task_type",
}  # fmt: skip
# Fields of which these values change no product either; other initial values change the base.
_ONLY: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian"),
}
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder has it.

    Attributes:
        fields: of `adapter_config.json`.
        pairs: A [r, in] and B [out, r], by the canonical name of the weight that they change.
        modules: the adapter's own name of what has that weight, which its patterns match.
        whole: tensors that stand in for the base's, or that it lacks: a head.
    """

    fields: Mapping[str, Any]
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    modules: Mapping[str, str]
    whole: Mapping[str, Tensor]

    def scale(self, name: str) -> float:
        """Return what the product for a weight is multiplied by."""
        rank = self.rank(name)
        alpha = float(self._of(name, "alpha_pattern", "lora_alpha"))
        return alpha / (rank**0.5 if self.fields.get("use_rslora") else rank)

    def rank(self, name: str) -> int:
        """Return the rank that the configuration gives for a weight."""
        return int(self._of(name, "rank_pattern", "r"))

    def _of(self, name: str, pattern: str, default: str) -> Any:
        patterns: Mapping[str, Any] = self.fields.get(pattern) or {}
        module = self.modules[name]
        found = (value for key, value in patterns.items() if _matches(key, module))
        return next(found, self.fields[default])

    def asks_for(self, name: str) -> bool:
        """Return True if it has a pair for the same weight of another layer."""
        return _of_any_layer(name) in {_of_any_layer(each) for each in self.pairs}


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter.

    Raises:
        CheckpointError: a file is missing or damaged, or asks for what is not merged here.
    """
    config, weights = folder / _CONFIG, folder / _WEIGHTS
    for file in (config, weights):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; is {folder} a LoRA adapter?")
    fields = _read_fields(config)
    halves, whole = _read_tensors(weights)
    for module, pair in halves.items():
        if len(pair) != 2:
            raise CheckpointError(f"{weights}: {module} has lora_{min(pair)} alone")
    _check_modules(fields, halves, folder)
    modules: dict[str, str] = {}
    for module in halves:
        name = canonical_name(f"{module}.weight")
        if name in modules:
            raise CheckpointError(f"{weights}: {modules[name]} and {module} are one weight")
        modules[name] = module
    pairs = {name: (halves[own]["A"], halves[own]["B"]) for name, own in modules.items()}
    return Adapter(fields, pairs, modules, whole)


def _read_fields(file: Path) -> dict[str, Any]:
    """Read the configuration; refuse what nothing here reads."""
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type {fields.get('peft_type')!r}")
    for name, value in fields.items():
        if name in _READ | _HARMLESS:
            continue
        nothing = value is None or value is False or value in ("", [], {})
        if value not in _ONLY[name] if name in _ONLY else not nothing:
            raise CheckpointError(f"{file}: {name} {value!r} is not supported")
    _check_number(file, "r", fields.get("r"), whole=True)
    _check_number(file, "lora_alpha", fields.get("lora_alpha"), whole=False)
    return fields


def _read_tensors(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return halves by the adapter's own names of modules, and whole tensors by canonical names."""
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    with open_tensors(file, "cpu") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            tensor = tensors.get_tensor(key)
            name = key.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
            match = re.fullmatch(r"(.+)\.lora_([AB])\.(?:default\.)?weight", name)
            if match:
                halves.setdefault(match[1], {})[match[2]] = tensor
            elif "lora_" in name:
                raise CheckpointError(f"{file}: tensor {key!r} is not supported")
            else:
                whole[canonical_name(name)] = tensor
    return halves, whole


def _check_modules(fields: Mapping[str, Any], modules: Collection[str], folder: Path) -> None:
    """Refuse a target module without a pair, and a pattern that is wrong or matches no module."""
    wanted = fields.get("target_modules") or []
    for module in [] if isinstance(wanted, str) else wanted:
        if not any(f".{name}".endswith(f".{module}") for name in modules):
            raise CheckpointError(f"{folder / _WEIGHTS}: nothing for target module {module!r}")
    file = folder / _CONFIG
    for field in _PATTERNS:
        patterns = fields.get(field) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{file}: {field} {patterns!r} is no object")
        for key, value in patterns.items():
            _check_number(file, f"{field}[{key!r}]", value, whole=field == "rank_pattern")
            try:
                found = any(_matches(key, module) for module in modules)
            except re.error as error:
                raise CheckpointError(f"{file}: {field}: {key!r}: {error}") from None
            if not found:
                raise CheckpointError(f"{file}: {field}: {key!r} matches no module")


def _check_number(file: Path, field: str, value: Any, whole: bool) -> None:
    """Refuse a rank, which is whole, that is not above 0, and an alpha that is no number."""
    if value is None:
        raise CheckpointError(f"{file}: no {field}")
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or (whole and value < 1):
        raise CheckpointError(
            f"{file}: {field} {value!r} is not {'a whole number above 0' if whole else 'a number'}"
        )


def _matches(pattern: str, module: str) -> bool:
    """Return True if PEFT finds a module by a key of a pattern: all of its name, or its end."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


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
