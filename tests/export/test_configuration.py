"""Every field of every configuration: the score stays transformers' own, or it is refused by name.

Each is changed alone, over what transformers' configuration class writes, so that a field which a
later release adds is asked for too. Never may there be another score in silence.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoVideoProcessor

from tests.conversations import picture
from triward_server.config import ForwardConfig
from triward_server.engine.checkpoint import (
    Blueprint,
    head_of,
    load_config,
    read_blueprint,
)
from triward_server.engine.naming import canonical_name
from triward_server.engine.scoring import Scorer
from triward_server.engine.streaming import load_weights
from triward_server.engine.weights import read_tensors
from triward_server.errors import CheckpointError, TriwardError
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.export.random_text_checkpoint import KINDS, make_text_checkpoint
from triward_server.export.reference import fp32_budget, reference_model, score_inputs
from triward_server.schema import Features, Scores

CPU = ForwardConfig(dtype="float32", device="cpu", threads=1)
VISION = "qwen2_5_vl"
ARCHITECTURES = (VISION, *(name for name in KINDS if name != "qwen2-score"))
# What a refusal may name in a field's place: tensors of a wrong shape, or that are missing; or whom
# the field contradicts.
_SHAPES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "depth",
    "num_attention_heads", "num_key_value_heads", "head_dim", "out_hidden_size",
)  # fmt: skip
ALIASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_SHAPES, ("tensor", "attention heads", "mrope_section", "layer_types")),
    "rope_type": ("rope type", "rope_parameters"),
    "spatial_merge_size": ("merge_size",),
    "image_token_id": ("placeholders",),  # the tokenizer writes others than the model looks for
    "video_token_id": ("placeholders",),
    "reward_token_id": ("the head is read at",),
}
# Fields that say of what class something is; another one is another checkpoint.
KINDS_OF = {"model_type", "architectures"}
OTHERS: dict[str, list[Any]] = {
    "hidden_act": ["gelu_pytorch_tanh", "relu"],
    "hidden_activation": ["silu", "relu"],
    "rope_type": ["linear", "dynamic"],
    "type": ["linear"],
    "dtype": ["float32"],
    "problem_type": ["regression"],
    "sliding_window": [30],
    "use_bidirectional_attention": [True],
    "head_dim": [24],
    "architectures": [["SomethingElse"]],
    "transformers_version": ["4.40.0"],
    "pad_token_id": [5, None],
    "layer_types": [["sliding_attention"] * 4, ["full_attention"] * 4, ["chunked_attention"] * 4],
    "fullatt_block_indexes": [[0]],
    "mrope_section": [[6, 4, 6]],
    "tokens_per_second": [25],
}
# No field of any class, or of none here: as checkpoints of others have them.
UNKNOWN: dict[str, Any] = {
    "skip_layer_mlp": [1], "mlp_scalars": {"1": 0.9}, "quantization_config": {"bits": 4},
    "residual_multiplier": 0.5, "use_qk_norm": True, "per_layer_config": {"1": {"head_dim": 8}},
    "auto_map": {"AutoModel": "modeling.Model"}, "partial_rotary_factor": 0.5,
}  # fmt: skip


class Swept:
    """A tiny checkpoint, what is scored with it, and its tensors."""

    def __init__(self, name: str, folder: Path) -> None:
        if name == VISION:
            make_checkpoint("tiny", 0, folder)
        else:
            make_text_checkpoint(name, "tiny", 0, folder)
        self.folder = folder
        self.config = load_config(folder)
        self.head = head_of(folder, self.config).kind
        cpu = torch.device("cpu")
        self.tensors = read_tensors(folder, torch.float32, cpu, lambda name: True)
        rng = np.random.default_rng(0)
        ids = rng.integers(20, 700, 150).astype(np.int32)
        ids[-1] = getattr(self.config, "reward_token_id", ids[-1])
        self.features = Features(ids[:100], (ids[100:],))
        self.inputs: dict[str, Any] = {}
        if name == VISION:
            self._show()

    def _show(self) -> None:
        """An image and a video of six frames in front of the text."""
        image = np.asarray(picture(84, 140, 1))
        video = np.stack([np.asarray(picture(56, 84, seed)) for seed in range(6)])
        pads = [self.config.image_token_id] * 15 + [self.config.video_token_id] * 18
        prompt = np.concatenate([np.array(pads, np.int32), self.features.prompt_ids])
        media = (image, video)
        self.features = Features(prompt, self.features.response_ids, media, (1.0,))
        images = AutoImageProcessor.from_pretrained(self.folder)
        videos = AutoVideoProcessor.from_pretrained(self.folder)
        frames = torch.from_numpy(video).movedim(3, 1).float()
        self.inputs = {
            **images([image], return_tensors="pt"),
            **videos([frames], return_tensors="pt"),
            "second_per_grid_ts": torch.tensor([1.0]),
        }

    def score(self) -> float:
        (result,) = Scorer(self.folder, CPU).score([self.features])
        if isinstance(result, TriwardError):
            raise result
        assert isinstance(result, Scores)
        return float(result.scores[0])

    def reference(self) -> float:
        """Of the class and the configuration that are in the folder now."""
        config = AutoConfig.from_pretrained(self.folder)
        model = reference_model(config, self.head, torch.device("cpu"))
        load_weights(model, lambda wanted: self.tensors, canonical_name, streamed=False)
        ids = np.concatenate([self.features.prompt_ids, self.features.response_ids[0]])
        row = torch.from_numpy(ids.astype(np.int64))[None]
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), **self.inputs}
        if self.inputs:
            kinds = (row == config.image_token_id).int() + 2 * (row == config.video_token_id).int()
            inputs["mm_token_type_ids"] = kinds
        return score_inputs(model, inputs)


def changes(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field's path with the whole configuration that has it changed."""
    whole = json.loads(json.dumps(config.to_dict(), default=str))

    def walk(part: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for name, value in list(part.items()):
            if name in ("text_config", "vision_config", "rope_parameters"):
                yield from walk(value, f"{path}{name}.")
                continue
            for other in OTHERS.get(name) or _others(value):
                part[name] = other
                yield path + name, copy.deepcopy(whole)
            part[name] = value
        for name, value in UNKNOWN.items():
            if name not in part:
                part[name] = value
                yield path + name, copy.deepcopy(whole)
                del part[name]

    yield from walk(whole, "")


def _others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1 if value else 1]
    if isinstance(value, float):
        return [value * 1.5 + 0.01]
    if isinstance(value, str):
        return [f"{value}x"]
    if isinstance(value, list):
        return [value[::-1]]
    return [7] if value is None else [{"0": "other"}]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_field(name: str, tmp_path: Path) -> None:
    swept = Swept(name, tmp_path / name)
    file = swept.folder / "config.json"
    right = swept.reference()
    assert abs(swept.score() - right) <= fp32_budget(right)
    moved, refused, silent = set(), set(), {}
    for path, config in changes(swept.config):
        field = path.rsplit(".", 1)[-1]
        if field in KINDS_OF:
            continue
        file.write_text(json.dumps(config))
        try:
            score = swept.score()
        except TriwardError as error:
            refused.add(path)
            if not any(name in str(error) for name in (field, *ALIASES.get(field, ()))):
                silent[path] = f"refused without its name: {error}"
            continue
        expected = swept.reference()
        if abs(expected - right) > 10 * fp32_budget(right):
            moved.add(path)
        if not abs(score - expected) <= fp32_budget(expected):
            silent[path] = f"{score} for {expected}"
    assert not silent, "\n".join(f"{path}: {what}" for path, what in silent.items())
    # The sweep has teeth: some fields do move the score, and are followed.
    assert "rope_theta" in {path.rsplit(".", 1)[-1] for path in moved} and len(moved) > 1
    known = {"partial_rotary_factor"}
    if name in ("internlm2", "qwen2-reward"):  # whose head stands for remote code
        known.add("auto_map")
    assert {p.rsplit(".", 1)[-1] for p in refused} >= {*UNKNOWN} - known


# Fields of published configurations, with sizes of a tiny model: their authors' own layouts.
_LABELS = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
_TEXT = {
    "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "_name_or_path": "somebody/model",
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "skywork-reward-llama-3.1": (
        "llama",
        {**_TEXT, **_LABELS, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    ),
    "skywork-reward-v2-llama": (
        "llama",
        {**_TEXT, **_LABELS, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
         "head_dim": 32, "problem_type": "regression", "max_length": 4096},
    ),
    "skywork-reward-gemma-2": (
        "gemma2",
        {**_TEXT, **_LABELS, "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh",
         "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 48, "sliding_window_size": 48,
         "final_logit_softcapping": 30.0, "_attn_implementation": "eager"},
    ),
    "skywork-reward-v2-qwen3": (
        "qwen3",
        {**_TEXT, **_LABELS, "max_window_layers": 4, "rope_scaling": None, "sliding_window": None,
         "use_sliding_window": False, "layer_types": ["full_attention"] * 4},
    ),
    "qwen2.5": (
        "qwen2",
        {**_TEXT, "max_window_layers": 28, "sliding_window": 131_072, "use_sliding_window": False},
    ),
    "internlm2-reward": (
        "internlm2",
        {**_TEXT, "attn_implementation": "eager", "tie_word_embeddings": False,
         "pretraining_tp": 1},
    ),
    "skywork-vl-reward": (
        VISION,
        {**_TEXT, "max_window_layers": 4, "sliding_window": 32_768, "use_sliding_window": False,
         "image_token_id": 780, "vision_token_id": 779, "hidden_act": "silu"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def made(name: str) -> Path:
        if name == VISION:
            make_checkpoint("tiny", 0, folder / name)
        else:
            make_text_checkpoint(name, "tiny", 0, folder / name)
        return folder / name

    return made


def read(source: Path, folder: Path, file: str, **fields: Any) -> Blueprint:
    """Of a copy with other fields in one of its files."""
    for each in source.iterdir():
        (folder / each.name).unlink(missing_ok=True)
        (folder / each.name).symlink_to(each)
    changed = json.loads((source / file).read_text()) | fields
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(changed))
    return read_blueprint(folder, load_config(folder))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fields_are_read(
    checkpoints: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    architecture, fields = PUBLISHED[name]
    source = checkpoints(architecture)
    before = read(source, tmp_path, "config.json")
    assert read(source, tmp_path, "config.json", **fields) == before


def test_a_multimodal_configuration_in_parts(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """As transformers 4.5x writes it: `text_config`, with ids of its own, and no flat fields."""
    source = checkpoints(VISION)
    before = read(source, tmp_path, "config.json")
    whole = json.loads(json.dumps(load_config(source).to_dict(), default=str))
    ids = {"image_token_id": None, "video_token_id": None, "vision_token_id": 779}
    whole["text_config"] |= {**ids, "torch_dtype": "bfloat16", "use_cache": False}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [4, 6, 6]}
    whole["text_config"] |= {"rope_scaling": rope, "rope_theta": 1_000_000.0}
    whole["vision_config"] |= {"in_channels": 3, "in_chans": 3, "torch_dtype": "bfloat16"}
    assert read(source, tmp_path, "config.json", **whole) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_rescale", False), ("do_normalize", False), ("rescale_factor", 0.5),
        ("patch_size", 16), ("merge_size", 4), ("temporal_patch_size", 4), ("do_center_crop", True),
        ("do_pad", True), ("image_processor_type", "SiglipImageProcessor"), ("sharpen", 0.5),
    ],
)  # fmt: skip
def test_what_a_processor_does_to_pixels(
    checkpoints: Callable[[str], Path], tmp_path: Path, field: str, value: Any
) -> None:
    """Each would be another image to the card's code, and was the same one here."""
    with pytest.raises(CheckpointError, match=field):
        read(checkpoints(VISION), tmp_path, "preprocessor_config.json", **{field: value})


def test_forms_of_a_processor_pass(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    forms = {
        "do_convert_rgb": False, "crop_size": None, "default_to_square": True, "device": None,
        "data_format": "channels_first", "image_processor_type": "Qwen2VLImageProcessorFast",
        "input_data_format": None, "return_tensors": None, "do_center_crop": None,
        "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},
    }  # fmt: skip
    source = checkpoints(VISION)
    before = read(source, tmp_path, "preprocessor_config.json")
    assert read(source, tmp_path, "preprocessor_config.json", **forms) == before
