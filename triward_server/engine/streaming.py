"""Runs a model that is larger than memory: a layer's weights are there while the layer runs.

The elements of a module's lists (decoder layers, vision blocks) are layers. What is outside of
them, embeddings, norms and heads, is loaded once and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

# Which tensors are wanted, by our names -> these tensors.
Load = Callable[[Callable[[str], bool]], dict[str, Tensor]]

# What runs a layer: every module's own way, and `decoder.DecoderLayer`'s other one.
_ENTRIES = ("forward", "at")
_CGROUP = Path("/sys/fs/cgroup")


def load_weights(
    model: nn.Module, tensors: Load, name_of: Callable[[str], str], streamed: bool
) -> None:
    """Give a model without weights its own, at once or layer by layer.

    Args:
        model: its parameters are on the meta device.
        tensors: reads a checkpoint.
        name_of: a name in the model's state -> our name for it.
        streamed: leave layers without weights until they run, and again after it.
    """
    layers = _layers(model) if streamed else {}
    prefixes = tuple(f"{name_of(name)}." for name in layers)
    resident = {key: name_of(key) for key in model.state_dict()}
    resident = {k: name for k, name in resident.items() if not name.startswith(prefixes)}
    _fill(model, resident, tensors)
    for name, layer in layers.items():
        names = {key: name_of(f"{name}.{key}") for key in layer.state_dict()}
        for entry in _ENTRIES:
            if hasattr(layer, entry):
                run = partial(_run, layer, getattr(layer, entry), names, tensors)
                setattr(layer, entry, run)
    model.requires_grad_(False).eval()


def fits(weights: int, device: torch.device) -> bool:
    """Return True if float32 weights leave a quarter of the device's free memory to the work.

    Args:
        weights: how many numbers.
        device: where they would be.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = min(psutil.virtual_memory().available, _cgroup_free())
    return 4 * weights <= 0.75 * free


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made in the block have no weights, but have their buffers.

    `torch.device("meta")` would leave frequencies that are in no checkpoint without values too.
    """
    register = nn.Module.register_parameter

    def without_values(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register(module, name, None if value is None else nn.Parameter(value.to("meta"), False))

    nn.Module.register_parameter = without_values  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{name}.{index}": layer
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, layer in enumerate(module)
    }


def _run(
    layer: nn.Module,
    entry: Callable[..., Any],
    names: dict[str, str],
    tensors: Load,
    *args: Any,
    **kwargs: Any,
) -> Any:
    empty = layer.state_dict()
    _fill(layer, names, tensors)
    try:
        return entry(*args, **kwargs)
    finally:
        layer.load_state_dict(empty, assign=True)


def _fill(module: nn.Module, names: dict[str, str], tensors: Load) -> None:
    """Load exactly the named part of a module's state: {its name: our name}."""
    wanted = set(names.values())
    found = tensors(wanted.__contains__)
    missing = wanted - found.keys()
    assert not missing, f"checkpoint.check_tensors has found all, now there is no {missing}"
    state = {key: found[name] for key, name in names.items()}
    module.load_state_dict(state, strict=False, assign=True)


def _cgroup_free() -> float:
    """Return the bytes left of a container's memory limit; infinity where there is none."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        return float(limit) - float((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup of version 2, or "max"
        return float("inf")
