"""The random checkpoints of IXC-2.5-Reward have the published names, shapes and ids."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from triward_server.cli import app
from triward_server.export.random_ixc_checkpoint import IXC_SIZES, _shapes, make_ixc_checkpoint
from triward_server.export.random_ixc_tokenizer import DEFINED, sentencepiece_model


def test_the_real_dimensions_are_the_published_ones() -> None:
    shapes = _shapes(IXC_SIZES["7b"])
    vision = "vit.vision_tower.vision_model"
    for name, shape in {
        "model.tok_embeddings.weight": (92_544, 4096),
        "model.layers.31.attention.wqkv.weight": (6144, 4096),
        "model.layers.31.attention.wqkv.Plora_A.weight": (256, 4096),
        "model.layers.31.attention.wqkv.Plora_B.weight": (6144, 256),
        "model.layers.0.attention.wo.Plora_B.weight": (4096, 256),
        "model.layers.0.feed_forward.w1.Plora_B.weight": (14_336, 256),
        "model.layers.0.feed_forward.w2.Plora_A.weight": (256, 14_336),
        "score.weight": (1, 4096),
        "plora_glb_GN": (1, 1, 4096),
        "plora_sub_GN": (1, 1, 1, 4096),
        "vision_proj.2.bias": (4096,),
        f"{vision}.embeddings.position_embedding.weight": (1601, 1024),
        f"{vision}.pre_layrnorm.weight": (1024,),
        f"{vision}.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    }.items():
        assert shapes[name] == shape, name
    decoder = sum(
        math.prod(s) for n, s in shapes.items() if n.startswith("model.") and "Plora" not in n
    )
    lora = sum(math.prod(s) for n, s in shapes.items() if "Plora" in n)
    total = sum(map(math.prod, shapes.values()))
    assert [round(n / 1e9, 2) for n in (decoder, lora, total)] == [7.36, 0.60, 8.30]


def test_a_checkpoint_has_the_files_of_its_kind(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    arguments = ["make-checkpoint", "--architecture=ixc2_5", "--size=tiny", f"--output={folder}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "internlmxcomposer2"
    assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]
    assert config["image_token_id"] == config["vocab_size"] - 147
    assert config["vision_config"]["image_size"] == 56
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(_shapes(IXC_SIZES["tiny"]))
    shapes = {}
    for file in {*index.values()}:
        with safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                assert tensor.dtype is torch.bfloat16 and bool(tensor.isfinite().all())
                shapes[name] = tuple(tensor.shape)
    assert shapes == _shapes(IXC_SIZES["tiny"])
    assert not (folder / "SimHei.ttf").exists()


def test_seeds_and_fonts(tmp_path: Path) -> None:
    font = tmp_path / "free.ttf"
    font.write_bytes(b"a font")
    for seed, name in ((0, "one"), (0, "same"), (1, "other")):
        make_ixc_checkpoint("tiny", seed, tmp_path / name, font=font)
    one, same, other = (
        [(tmp_path / name / file).read_bytes() for file in ("tokenizer.model", "SimHei.ttf")]
        + [(tmp_path / name / "model-00001-of-00004.safetensors").read_bytes()]
        for name in ("one", "same", "other")
    )
    assert one == same
    assert [a == b for a, b in zip(one, other, strict=True)] == [False, True, False]
    with pytest.raises(FileExistsError):
        make_ixc_checkpoint("tiny", 0, tmp_path / "one")


def test_the_control_tokens_are_the_last_of_the_vocabulary() -> None:
    assert len(DEFINED) == 192
    assert DEFINED[-147] == "[UNUSED_TOKEN_0]"  # 92397 of 92544
    assert DEFINED[-17] == "[UNUSED_TOKEN_130]"  # 92527
    written = sentencepiece_model(4096, 100, 0)
    assert written.count(b"[UNUSED_TOKEN_") == 147
    assert written.index(b"<0xFF>") < written.index("一".encode()) < written.index(b"[UNUSED_")
