"""The whole forward pass at 7B's real shapes on fake CUDA tensors: which kernels, which shapes.

Fake tensors have a device, a dtype and a shape but no numbers: nothing is computed, and reading a
value, which would wait for a real GPU, raises.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import ROOT
from triward_server.engine import attention, backbone, layers, packing
from triward_server.engine.arena import Arena
from triward_server.engine.backbone import RewardModel
from triward_server.engine.checkpoint import Blueprint, empty_model, load_config, read_blueprint
from triward_server.engine.float8 import weights_of
from triward_server.engine.geometry import Geometry
from triward_server.export import random_checkpoint, random_ixc_checkpoint
from triward_server.schema import Features

CUDA = torch.device("cuda:0")
# What waits for the device: a value that Python reads, a shape that depends on values.
WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item")
VARLEN = "torch_attn._varlen_attn.default"


@dataclass
class Calls(TorchDispatchMode):
    """Counts the operators that run, and keeps the shapes of attention's queries and keys."""

    names: Counter[str] = field(default_factory=Counter)
    shapes: set[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        if str(func) == VARLEN:
            self.shapes.add((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def blueprint(tmp_path_factory: pytest.TempPathFactory) -> Blueprint:
    """7B's, from a checkpoint without weights."""
    folder = tmp_path_factory.mktemp("7b") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            random_checkpoint, "_write_weights",
            lambda output, *_: (output / "value_head.safetensors").touch(),
        )  # fmt: skip
        random_checkpoint.make_checkpoint("7b", 0, folder)
    return read_blueprint(folder, load_config(folder)).aligned()


@pytest.fixture(scope="module")
def composer(tmp_path_factory: pytest.TempPathFactory) -> Blueprint:
    """IXC-2.5-Reward's, likewise."""
    folder = tmp_path_factory.mktemp("ixc") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_ixc_checkpoint, "write_shards", lambda *_: None)
        random_ixc_checkpoint.make_ixc_checkpoint("7b", 0, folder)
    return read_blueprint(folder, load_config(folder)).aligned()


def uploaded(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def on_the_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make and read where an image's rows are as no fake, which has no values."""

    def run(*args: Any) -> Any:
        with unset_fake_temporarily():
            found = function(*args)
            return found if isinstance(found, list) else [*found]

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Fake tensors, and in place of pinned memory and events what needs no GPU."""
    monkeypatch.setattr(backbone, "upload", uploaded)
    monkeypatch.setattr(layers, "read_runs", on_the_host(layers.read_runs))
    monkeypatch.setattr(attention, "_runs_of_media", on_the_host(attention._runs_of_media))
    monkeypatch.setattr(attention, "takes_pages", lambda device: False)
    monkeypatch.setattr(Arena, "add", lambda arena, array: uploaded(torch.from_numpy(array), CUDA))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def model_of(
    blueprint: Blueprint, deterministic: bool = False, float8: bool = False
) -> RewardModel:
    model = empty_model(blueprint, torch.bfloat16, deterministic, float8=float8)
    held = {"v_head": torch.float32, "score.": torch.float32, "scale": torch.float32}
    in_float8 = dict.fromkeys(weights_of(model), torch.float8_e4m3fn)
    state = {
        name: torch.empty(
            tensor.shape,
            dtype=in_float8.get(name)
            or next((d for part, d in held.items() if part in name), torch.bfloat16),
            device=CUDA,
        )
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def conversations(geometry: Geometry, *responses: int) -> Features:
    """An image of 37 x 27 tokens, 60 of text, and responses."""
    image = np.zeros((27 * 28, 37 * 28, 3), np.uint8)
    ids = np.arange(60, dtype=np.int32)
    assert geometry.image_token_id is not None
    prompt = np.concatenate([ids, np.full(27 * 37, geometry.image_token_id, np.int32)])
    answers = tuple(np.arange(n, dtype=np.int32) + i for i, n in enumerate(responses))
    return Features(prompt, answers, (image,))


class Marks(backbone.Clock):
    """A clock whose marks need no event."""

    def mark(self) -> None:
        self._marks.append(time.perf_counter())


def run(model: RewardModel, features: Features) -> tuple[Calls, torch.Tensor]:
    ordered = packing.sort_batch({0: features}, model.geometry, model.deterministic)
    batch = packing.pack(ordered, range(len(ordered.branches)))
    with Calls() as calls:
        scores = model(batch, Marks(CUDA))
    return calls, scores


@pytest.mark.parametrize(
    ("responses", "deterministic"),
    [((250,), False), ((250,) * 8 + (120, 31) * 28, False), ((250, 120), True)],
    ids=["single", "group of 64", "deterministic"],
)
def test_a_pass_at_real_shapes(
    responses: tuple[int, ...], deterministic: bool, blueprint: Blueprint, fake: FakeTensorMode
) -> None:
    model = model_of(blueprint, deterministic)
    calls, scores = run(model, conversations(model.geometry, *responses))
    assert scores.shape == (len(responses),)
    assert scores.dtype == torch.float32 and scores.device == CUDA
    waits = {n: c for n, c in calls.names.items() if n.split(".")[1] in WAITS}
    assert not waits, "the pass waits for the device"
    assert calls.names[VARLEN] == 32 + 28, "one call of the fused kernel a layer"
    assert not [n for n in calls.names if "scaled_dot_product" in n or "softmax" in n]
    patches, prefix = 4 * 27 * 37, 60 + 27 * 37
    rows = prefix + sum(responses)
    keys = rows if len(responses) == 1 else rows + prefix * len(responses)
    queries = {q for q, _ in calls.shapes}
    assert queries == {(patches, 16, 80), (rows, 28, 128), (len(responses), 28, 128)}, calls.shapes
    assert ((patches, 16, 80), (patches, 16, 80)) in calls.shapes
    assert ((rows, 28, 128), (keys, 4, 128)) in calls.shapes


def test_a_pass_by_pages(
    blueprint: Blueprint, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gather of the pages' rows for keys and one for values, and nothing waits."""
    monkeypatch.setattr(attention, "takes_pages", lambda device: True)
    model = model_of(blueprint)
    responses = (250,) * 8 + (120, 31) * 28
    calls, scores = run(model, conversations(model.geometry, *responses))
    assert scores.shape == (64,) and scores.device == CUDA
    assert not [n for n in calls.names if n.split(".")[1] in WAITS]
    assert calls.names[VARLEN] == 32 + 28
    # Four pages of the prompt's are full. It has a fifth; a response has one or two of its own.
    rows, own = 60 + 27 * 37 + sum(responses), 8 * 2 + 56
    assert calls.shapes == {
        ((4 * 27 * 37, 16, 80), (4 * 27 * 37, 16, 80)),
        ((rows, 28, 128), (5 + own, 256, 4, 128)),
        ((64, 28, 128), (4 + own, 256, 4, 128)),
    }


def test_a_pass_in_float8(blueprint: Blueprint, fake: FakeTensorMode) -> None:
    """The scaled kernel takes these shapes, strides and dtypes; nothing waits for it."""
    model = model_of(blueprint, float8=True)
    calls, scores = run(model, conversations(model.geometry, 250, 120))
    assert scores.shape == (2,) and scores.device == CUDA
    assert not [n for n in calls.names if n.split(".")[1] in WAITS]
    # The last layer's queries are another product than its keys and values.
    assert calls.names["aten._scaled_mm.default"] == 28 * 4 + 1
    assert calls.names[VARLEN] == 32 + 28
    plain, _ = run(model_of(blueprint), conversations(model.geometry, 250, 120))
    linear = "aten.linear.default"
    assert plain.names[linear] - calls.names[linear] == 28 * 4 + 1


@pytest.mark.parametrize("float8", [False, True])
def test_a_pass_with_tiles(float8: bool, composer: Blueprint, fake: FakeTensorMode) -> None:
    """Two images of 6 tiles and one: the updates are added to three runs, and nothing waits."""
    model = model_of(composer, float8=float8)
    images = [np.full((1120, 1680, 3), value, np.uint8) for value in (0, 0, 1)]
    sizes = [model.geometry.tokens(model.geometry.grid(image)) for image in images]
    assert sizes == [2861] * 3
    text = np.arange(40, dtype=np.int32)
    shown = np.full(2861, model.geometry.image_token_id, np.int32)
    prompt = np.concatenate([text[:1], shown, text, shown, text, shown, text])
    features = Features(prompt, (text, text[:7]), tuple(images))
    calls, scores = run(model, features)
    assert scores.shape == (2,) and scores.device == CUDA
    waits = {n: c for n, c in calls.names.items() if n.split(".")[1] in WAITS}
    assert not waits, "the pass waits for the device"
    assert calls.names[VARLEN] == 24 + 32, "one call of the fused kernel a layer"
    assert not [n for n in calls.names if "scaled_dot_product" in n]
    # Gate and up have an update each; in the last layer keys and values alone have one.
    assert calls.names["aten.addmm_.default"] == 3 * (31 * 5 + 1)
    tiles = 1601 * 7 * 2  # two distinct images
    rows = len(prompt) + len(text)  # the shorter response begins the longer one
    assert {q for q, _ in calls.shapes} == {(tiles, 16, 64), (rows, 32, 128), (2, 32, 128)}


def test_a_value_that_is_read_would_raise(fake: FakeTensorMode) -> None:
    """The check itself."""
    with pytest.raises(DataDependentOutputException), Calls() as calls:
        torch.ones(2, device=CUDA).sum().item()
    assert calls.names["aten._local_scalar_dense.default"] == 1


@pytest.mark.slow
def test_compiled_halves_are_a_few_kernels() -> None:
    """Inductor fuses what is between matrix products: 3 elementwise kernels a half at most."""
    command = [sys.executable, "-m", "tests.fakecuda"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    before, after = {"kernels": 3, "products": 1}, {"kernels": 3, "products": 3}
    for layer in ("DecoderLayer", "VisionBlock"):
        assert counts.pop(f"{layer}.before") == before
        assert counts.pop(f"{layer}.after_") == after
    assert {half: count["products"] for half, count in counts.items()} == {
        "DecoderLayer.queries": 1, "DecoderLayer.keys_and_values": 1,
    }  # fmt: skip
