"""A checkpoint's tensors: which files hold them, by which names, and that each is finite."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError
from .backbone import HEADS
from .float8 import quantise_weight
from .naming import PLAIN, Naming, canonical_name

logger = logging.getLogger(__name__)

VALUE_HEAD_FILE = "value_head.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Matrices that the model reads as one, in the order in which their rows are stacked.
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PART_OF = {part: (whole, parts) for whole, parts in _JOINED.items() for part in parts}
_PART = re.compile(r"\b(" + "|".join(_PART_OF) + r")\b")


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the safetensors files that hold the model, a value head last.

    Raises:
        CheckpointError: a file is missing.
    """
    files = _named_files(checkpoint)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
    return files


def has_tensor(checkpoint: Path, name: str) -> bool:
    """Return True if a file that is there holds a tensor of this name of ours."""
    for file in filter(Path.is_file, _named_files(checkpoint)):
        with open_tensors(file, "cpu") as tensors:
            if name in map(canonical_name, tensors.keys()):
                return True
    return False


def _named_files(checkpoint: Path) -> list[Path]:
    index = checkpoint / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    if (checkpoint / VALUE_HEAD_FILE).is_file():
        names.append(VALUE_HEAD_FILE)
    return [checkpoint / name for name in names]


def check_finite(checkpoint: Path) -> None:
    """Read all weights; raises `CheckpointError` naming the first tensor that is not finite."""
    for _ in _tensors(weight_files(checkpoint), torch.device("cpu"), lambda name: True):
        pass


def open_tensors(file: Path, device: str) -> Any:
    """Open a safetensors file; raises `CheckpointError` if it is none."""
    try:
        return safe_open(file, framework="pt", device=device)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a safetensors file, or cut short: {error}") from None


def read_state(
    checkpoint: Path,
    dtype: torch.dtype,
    device: torch.device,
    wanted: Callable[[str], bool],
    in_float8: Collection[str] = (),
    naming: Naming = PLAIN,
) -> dict[str, Tensor]:
    """Return the wanted tensors by our names, joined; the head is float32 always.

    Those in `in_float8` become e4m3 and a `scale` each, as soon as they are read.
    """
    state: dict[str, Tensor] = {}
    files = weight_files(checkpoint)
    read = _tensors(files, device, lambda name: wanted(_whole(name)), naming)
    for name, tensor in _join(read):
        if name in in_float8:
            scale = f"{name.removesuffix('weight')}scale"
            state[name], state[scale] = quantise_weight(tensor)
        else:
            state[name] = tensor.to(torch.float32 if _is_head(name) else dtype)
    return state


def widen_gated_mlps(state: dict[str, Tensor], prefix: str, inner: int) -> None:
    """Widen gated MLPs of a state in place; what is added is 0 and adds 0 to every result.

    Args:
        state: of `read_state`.
        prefix: of the MLPs' names.
        inner: the width that they get, at least theirs.
    """
    for name, tensor in state.items():
        if not name.startswith(prefix):
            continue
        if ".mlp.gate_up_proj." in name:  # rows of gate, rows of up; a bias has no columns
            halves = tensor.unflatten(0, (2, -1))
            more = inner - halves.shape[1]
            columns = (0, 0) * (tensor.ndim - 1)
            state[name] = F.pad(halves, (*columns, 0, more)).flatten(0, 1) if more else tensor
        elif name.endswith(".mlp.down_proj.weight") and tensor.shape[1] < inner:
            state[name] = F.pad(tensor, (0, inner - tensor.shape[1]))


def read_tensors(
    checkpoint: Path, dtype: torch.dtype, device: torch.device, wanted: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Return the wanted tensors by `canonical_name`, none joined; trl's value head is float32."""
    tensors = _tensors(weight_files(checkpoint), device, wanted)
    return {n: t.to(torch.float32 if n.startswith("v_head.") else dtype) for n, t in tensors}


def _is_head(name: str) -> bool:
    return any(name.startswith(f"{head.prefix}.") for head in HEADS.values())


def _tensors(
    files: Iterable[Path],
    device: torch.device,
    wanted: Callable[[str], bool],
    naming: Naming = PLAIN,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are read, each finite, by our names."""
    checked, seconds = 0, 0.0
    for file in files:
        with open_tensors(file, str(device)) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name = naming.name(key)
                if not naming.is_unread(name) and wanted(name):
                    tensor = tensors.get_tensor(key)
                    begun = time.monotonic()
                    _check_finite(file, key, tensor)
                    seconds += time.monotonic() - begun
                    checked += tensor.nbytes
                    yield name, naming.arrange(name, tensor)
    logger.info("%s bytes of weights are finite; looking took %.2f s", f"{checked:,}", seconds)


def _check_finite(file: Path, key: str, tensor: Tensor) -> None:
    """Raise `CheckpointError` for NaN and infinity; both are extremes, found in one pass."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if tensor.itemsize == 1:  # float8, of which torch knows no extremes
        tensor = tensor.to(torch.bfloat16)
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():
        count = tensor.numel() - int(tensor.isfinite().sum())
        raise CheckpointError(
            f"{file}: tensor {key!r}: {count:,} of {tensor.numel():,} weights are NaN or infinite"
        )


def _whole(name: str) -> str:
    """Return the name of what `_join` makes a tensor a part of; its own, if it is left alone."""
    match = _PART.search(name)
    if match is None:
        return name
    return name[: match.start()] + _PART_OF[match[0]][0] + name[match.end() :]


def _join(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Stack the matrices of `_JOINED` as soon as all parts of one have come by."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        match = _PART.search(name)
        if match is None:
            yield name, tensor
            continue
        joined, parts = _whole(name), _PART_OF[match[0]][1]
        group = waiting.setdefault(joined, {})
        group[match[0]] = tensor
        if len(group) == len(parts):
            yield joined, torch.cat([group[part] for part in parts])
            del waiting[joined]
