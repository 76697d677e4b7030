"""A checkpoint is loaded whole and exact, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from triward_server.config import ForwardConfig
from triward_server.engine.checkpoint import check_tensors, load_model
from triward_server.engine.naming import canonical_name
from triward_server.engine.scoring import Scorer
from triward_server.errors import CheckpointError
from triward_server.export.random_checkpoint import SIZES, make_checkpoint
from triward_server.schema import Features

HEAD = "value_head.safetensors"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def test_a_whole_checkpoint_is_accepted(copy: Path) -> None:
    check_tensors(copy)


LAYER = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize("tensor", [LAYER, "visual.blocks.0.attn.qkv.bias", "model.norm.weight"])
def test_missing(copy: Path, tensor: str) -> None:
    edit(shard_of(copy, tensor), lambda tensors: tensors.pop(tensor))
    with pytest.raises(CheckpointError, match=rf"missing tensor '{canonical_name(tensor)}'"):
        check_tensors(copy)


@pytest.mark.parametrize("tensor", ["v_head.summary.weight", "v_head.summary.bias"])
def test_half_a_value_head(copy: Path, tensor: str) -> None:
    """The card's strict=False would score with random numbers here."""
    edit(copy / HEAD, lambda tensors: tensors.pop(tensor))
    with pytest.raises(CheckpointError, match=rf"missing tensor '{tensor}'"):
        load_model(copy, torch.float32, torch.device("cpu"))


def test_value_head_of_another_name(copy: Path) -> None:
    edit(copy / HEAD, lambda t: t.update({"score.weight": t.pop("v_head.summary.weight")}))
    with pytest.raises(CheckpointError, match=r"missing tensor 'v_head.summary.weight'"):
        check_tensors(copy)


def test_no_value_head(copy: Path) -> None:
    (copy / HEAD).unlink()
    with pytest.raises(CheckpointError, match=HEAD):
        check_tensors(copy)


def test_unexpected(copy: Path) -> None:
    edit(copy / HEAD, lambda tensors: tensors.update({"v_head.extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'v_head.extra'$"):
        check_tensors(copy)


def test_several_unexpected(copy: Path) -> None:
    extra = {f"model.layers.9{i}.mlp.up_proj.weight": torch.zeros(1) for i in range(3)}
    edit(shard_of(copy, LAYER), lambda tensors: tensors.update(extra))
    with pytest.raises(CheckpointError, match=r"unexpected tensor .* and 2 more"):
        check_tensors(copy)


def test_wrong_shape(copy: Path) -> None:
    edit(shard_of(copy, LAYER), lambda t: t.update({LAYER: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=rf"{canonical_name(LAYER)}.*\[3, 5\].*\[256, 128\]"):
        check_tensors(copy)


def test_twice(copy: Path) -> None:
    again = "model.language_model.norm.weight"  # the newer name of a tensor that is there
    edit(copy / HEAD, lambda tensors: tensors.update({again: torch.ones(128)}))
    with pytest.raises(CheckpointError, match="twice"):
        check_tensors(copy)


@pytest.mark.parametrize("size", [0, 7, 5000])
def test_cut_short(copy: Path, size: int) -> None:
    shard = shard_of(copy, LAYER)
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=shard.name):
        check_tensors(copy)


def test_missing_shard(copy: Path) -> None:
    shard_of(copy, LAYER).unlink()
    with pytest.raises(CheckpointError, match=r"no such file"):
        check_tensors(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "phi3"}, "'phi3'.*only qwen2_5_vl, .*, internlmxcomposer2, mistral$"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [4, 6, 6],
                           "original_max_position_embeddings": 4096}}, "yarn"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "sliding"),
    ],
)  # fmt: skip
def test_unsupported(copy: Path, change: dict[str, object], words: str) -> None:
    """What this engine does not compute is refused, not computed differently."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words):
        load_model(copy, torch.float32, torch.device("cpu"))


def test_both_naming_schemes_and_one_file_load_alike(checkpoint: Path, copy: Path) -> None:
    """transformers renamed all tensors in 4.52; a small checkpoint has no index."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(copy.glob("model-*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (copy / "model.safetensors.index.json").unlink()
    renamed = {
        name if name.startswith("lm_head")
        else f"model.{name}" if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors.items()
    }  # fmt: skip
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    config = ForwardConfig(dtype="float32", device="cpu")
    request = Features(np.arange(20, dtype=np.int32), (np.arange(30, dtype=np.int32),))
    old, new = (Scorer(folder, config).score([request])[0] for folder in (checkpoint, copy))
    np.testing.assert_array_equal(old.scores, new.scores)  # type: ignore[union-attr]


def test_seeds(tmp_path: Path, checkpoint: Path) -> None:
    make_checkpoint("tiny", 0, tmp_path / "same")
    make_checkpoint("tiny", 1, tmp_path / "other")
    for file in checkpoint.iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name
    assert (checkpoint / HEAD).read_bytes() != (tmp_path / "other" / HEAD).read_bytes()


def test_layout_is_the_hubs(checkpoint: Path) -> None:
    assert {path.name for path in checkpoint.iterdir()} == {
        "config.json", "preprocessor_config.json", "chat_template.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.json", "merges.txt", "model.safetensors.index.json", HEAD,
        *(f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)),
    }  # fmt: skip
    head = load_file(checkpoint / HEAD)
    assert head["v_head.summary.weight"].shape == (1, 128)
    for shard in checkpoint.glob("model-*"):
        assert {t.dtype for t in load_file(shard).values()} == {torch.bfloat16}


def test_7b_has_the_real_dimensions() -> None:
    """Qwen2.5-VL-7B's published configuration; 16.6 GB are not written here."""
    d = SIZES["7b"]
    assert (d.hidden, d.inner, d.layers, d.heads, d.kv_heads) == (3584, 18944, 28, 28, 4)
    assert (d.vocab_size, d.positions) == (152064, 128000)
    assert (d.vision_hidden, d.vision_inner, d.vision_depth, d.vision_heads) == (1280, 3420, 32, 16)
    assert d.whole_image_blocks == (7, 15, 23, 31)
