"""A checkpoint of IXC-2.5-Reward is read whole and exact; no code of it is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from triward_server.engine.checkpoint import check_tensors, load_config, load_model, read_blueprint
from triward_server.engine.clip_tower import TiledTower
from triward_server.errors import CheckpointError
from triward_server.export.random_ixc_checkpoint import make_ixc_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ixc") / "checkpoint"
    make_ixc_checkpoint("tiny", 0, folder)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def edit(folder: Path, tensor: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the file that holds a tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][tensor]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LAYER, OURS = "model.layers.1.", "language_model.layers.1."
TOWER = "vit.vision_tower.vision_model."


@pytest.mark.parametrize(
    ("tensor", "ours"),
    [
        ("score.weight", "score.weight"),
        ("plora_glb_GN", "visual.plora_glb_GN"),
        (f"{LAYER}attention.wqkv.Plora_A.weight", f"{OURS}self_attn.qkv_proj.plora.A"),
        (f"{LAYER}feed_forward.w3.Plora_B.weight", f"{OURS}mlp.up_proj.plora.B"),
        (f"{TOWER}encoder.layers.2.self_attn.k_proj.bias", "visual.layers.2.self_attn.k_proj.bias"),
        (f"{TOWER}embeddings.class_embedding", "visual.embeddings.class_embedding"),
        ("vision_proj.2.bias", "visual.proj.2.bias"),
    ],
)  # fmt: skip
def test_missing(tensor: str, ours: str, copy: Path) -> None:
    edit(copy, tensor, lambda tensors: tensors.pop(tensor))
    with pytest.raises(CheckpointError, match=f"missing tensor '{ours}'"):
        check_tensors(copy)


@pytest.mark.parametrize("name", ["output.weight", f"{LAYER}attention.wq.weight", "score.bias"])
def test_unexpected(name: str, copy: Path) -> None:
    """The first is a chat model's vocabulary."""
    edit(copy, "score.weight", lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="unexpected tensor"):
        check_tensors(copy)


def test_what_is_unread_may_be_there_or_not(copy: Path) -> None:
    names = [f"{TOWER}post_layernorm.{part}" for part in ("weight", "bias")]
    for name in names:
        edit(copy, name, lambda tensors, name=name: tensors.pop(name))
    check_tensors(copy)
    more = [f"{TOWER}embeddings.position_ids", f"{LAYER}attention.rotary_emb.inv_freq"]
    edit(copy, "score.weight", lambda t: t.update({name: torch.zeros(1) for name in more}))
    check_tensors(copy)
    load_model(copy, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "tensor",
    [f"{LAYER}attention.wo.Plora_A.weight", f"{TOWER}embeddings.position_embedding.weight"],
)
def test_wrong_shape(tensor: str, copy: Path) -> None:
    edit(copy, tensor, lambda t: t.update({tensor: t[tensor][:-1].clone()}))
    with pytest.raises(CheckpointError, match=r"has shape .* asks for"):
        check_tensors(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": True}, "bias True is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"rope_scaling": {"type": "linear_of_mine", "factor": 2.0}}, "rope type"),
        ({"reward_token_id": 7}, "reward_token_id 7 is not supported"),
        ({"window_size": 40}, "window_size = 40"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu'"),
        ({"vision_config": {"projection_dim": 8}}, r"vision_config\.projection_dim = 8"),
        ({"vision_config": {"image_size": 42}}, "image_size"),
        ({"architectures": ["InternLMForCausalLM"]}, "neither"),
    ],
)
def test_refused(changes: dict[str, Any], words: str, copy: Path) -> None:
    configure(copy, **changes)
    with pytest.raises(CheckpointError, match=words):
        read_blueprint(copy, load_config(copy))


@pytest.mark.parametrize("model_type", ["internlm2", "internlmxcomposer2"])
def test_both_model_types(model_type: str, copy: Path) -> None:
    """The class decides; and code that a checkpoint brings is neither run nor asked about."""
    configure(copy, model_type=model_type)
    (copy / "modeling_internlm_xcomposer2.py").write_text("raise SystemExit(1)")
    (copy / "configuration_internlm_xcomposer2.py").write_text("raise SystemExit(1)")
    assert load_config(copy).model_type == "internlmxcomposer2"
    blueprint = check_tensors(copy)
    assert (blueprint.decoder.media_rank, blueprint.geometry.tile) == (8, 4)


def test_what_the_published_configuration_leaves_out(copy: Path) -> None:
    """Then it is the published model's: ranks of 256, and CLIP's tower for 560 pixels."""
    path = copy / "config.json"
    written = json.loads(path.read_text())
    for name in ("vision_config", "plora_rank", "image_token_id", "max_length"):
        written.pop(name, None)
    path.write_text(json.dumps(written))
    blueprint = read_blueprint(copy, load_config(copy))
    assert blueprint.decoder.media_rank == 256
    assert blueprint.tower == TiledTower(24, 1024, 4096, 16, 560, 14, 1e-5, 128)
    geometry = blueprint.geometry
    assert (geometry.image_token_id, geometry.tile, geometry.max_tokens) == (92_397, 40, 16_384)


def test_positions_that_stretch_are_the_same_below_their_limit(copy: Path) -> None:
    configure(copy, rope_scaling={"type": "dynamic", "factor": 2.0})
    stretched = read_blueprint(copy, load_config(copy)).decoder
    configure(copy, rope_scaling=None)
    assert stretched == read_blueprint(copy, load_config(copy)).decoder
