"""Heads and windows beside those that have a server of their own in test_text_models.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.test_engine import features
from tests.served.test_text_models import conversations
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.backbone import TwoLayerHead
from triward_server.engine.checkpoint import check_tensors, load_vision
from triward_server.engine.scoring import Scorer
from triward_server.errors import CheckpointError
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.export.verify import verify
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features, Scores
from triward_server.testing.oracle import Oracle, TextOracle, fp32_budget

CPU = ForwardConfig(dtype="float32", device="cpu", threads=1)
NAMES = ("mistral", "qwen2-score", "qwen2-reward")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    torch.set_num_threads(1)
    for name in NAMES:
        make_text_checkpoint(name, "tiny", 0, folder / name)
    return {name: folder / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_25_conversations(name: str, folders: dict[str, Path]) -> None:
    """All in one batch; 4,000 tokens take the reference too long here."""
    cases = {n: m for n, m in conversations(name).items() if len(m[-1]["content"]) < 4000}
    assert len(cases) >= 25
    folder = folders[name]
    preprocessor, oracle = Preprocessor(folder, PreprocessConfig()), TextOracle(folder)
    items = [
        preprocessor.features(json.dumps(m[:-1]).encode(), [m[-1]["content"].encode()], [])
        for m in cases.values()
    ]
    expected = []
    results = Scorer(folder, CPU).score(items)
    for messages, result in zip(cases.values(), results, strict=True):
        assert isinstance(result, Scores), result
        expected.append(oracle.score(messages))
        assert abs(result.scores[0] - expected[-1]) <= fp32_budget(expected[-1]), messages
    assert np.std(expected) > 0.5


@pytest.mark.parametrize("name", ["qwen2-score", "qwen2-reward"])
def test_where_padding_is(name: str, folders: dict[str, Path]) -> None:
    """One class reads in front of the last paddings, the other in front of the first."""
    scorer, oracle = Scorer(folders[name], CPU), TextOracle(folders[name])
    pad = scorer.geometry.padding_id
    assert pad is not None
    prompt = np.arange(20, 50, dtype=np.int32)
    answers = [[5, 6, 7], [5, 6, 7, pad], [5, pad, 7], [5, pad, 7, pad, pad], [pad, 6]]
    item = Features(prompt, tuple(np.array(ids, np.int32) for ids in answers))
    first = Features(np.array([pad, 9], np.int32), (np.array([8], np.int32),))
    results = scorer.score([item, first])
    found = []
    for each, result in zip((item, first), results, strict=True):
        assert isinstance(result, Scores), result
        for score, answer in zip(result.scores, each.response_ids, strict=True):
            expected = oracle.score_ids(np.concatenate([each.prompt_ids, answer]))
            assert abs(score - expected) <= fp32_budget(expected)
            found.append(float(score))
    # The control: what stands behind a padding moves one of them and not the other.
    assert abs(found[2] - found[0]) > 10 * fp32_budget(1)
    assert abs(found[3] - found[2]) <= fp32_budget(found[2])
    whole = float(TextOracle(folders[name]).score_ids(np.append(prompt, 5).astype(np.int32)))
    assert (abs(found[2] - whole) <= fp32_budget(whole)) == (name == "qwen2-reward")


def test_a_head_of_two_layers_computes_each_row_for_itself() -> None:
    torch.manual_seed(0)
    head = TwoLayerHead(96)
    rows = torch.randn(33, 96)
    assert torch.equal(head(rows), torch.cat([head(row[None]) for row in rows]))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("qwen2-reward", "score.2.bias", r"missing tensor 'score\.2\.bias'"),
        ("qwen2-score", "score.weight", r"missing tensor 'score\.weight'"),
    ],
)
def test_a_head_that_is_not_whole(
    name: str, tensor: str, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folders[name], tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        check_tensors(copy)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biased"])
def multimodal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-VL with one label, as ms-swift saves it."""
    folder = tmp_path_factory.mktemp("vl") / "checkpoint"
    make_checkpoint("tiny", 0, folder)
    head = load_file(folder / "value_head.safetensors")
    (folder / "value_head.safetensors").unlink()
    score = {"score.weight": head["v_head.summary.weight"]}
    if request.param:
        score["score.bias"] = torch.full((1,), 0.25, dtype=torch.bfloat16)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["lm_head.weight"]
    tensors = load_file(folder / file)
    del tensors["lm_head.weight"], index["weight_map"]["lm_head.weight"]
    save_file(tensors | score, folder / file)
    index["weight_map"] |= dict.fromkeys(score, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["Qwen2_5_VLForSequenceClassification"], "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "pad_token_id": 3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_multimodal_model_with_one_label(multimodal: Path) -> None:
    report = verify(multimodal, torch.device("cpu"), streamed=False)
    assert report.wrong == [] and report.largest < 1e-4
    assert {"image odd", "several images", "video", "long"} <= {row.name for row in report.rows}
    assert len({row.score for row in report.rows}) == len(report.rows)
    biased = check_tensors(multimodal).head == "biased_score"
    _, head = load_vision(multimodal)
    assert ("bias" in head.state_dict()) == biased


def test_a_multimodal_label_is_the_value_heads_number(
    multimodal: Path, checkpoint: Path, oracle: Oracle
) -> None:
    """30 conversations without images and with up to three: the model card's, but for the bias."""
    rng = np.random.default_rng(0)
    scorer, head = Scorer(multimodal, CPU), load_file(checkpoint / "value_head.safetensors")
    bias = 0.25 if check_tensors(multimodal).head == "biased_score" else 0.0
    drawn = [
        [*(("image", int(index)) for index in rng.integers(0, 4, count % 4)), tuple(ids)]
        for count, ids in enumerate(rng.integers(10, 900, (10, 30)).tolist())
    ]
    answers = [[tuple(ids)] for ids in rng.integers(10, 900, (3, 8)).tolist()]
    items = [features(prompt, answers, scorer.geometry.image_token_id) for prompt in drawn]
    expected = []
    for item, result in zip(items, scorer.score(items), strict=True):
        assert isinstance(result, Scores), result
        for score, card in zip(result.scores, oracle.score_features(item), strict=True):
            expected.append(card - head["v_head.summary.bias"].item() + bias)
            assert abs(score - expected[-1]) <= fp32_budget(expected[-1])
    assert len(expected) == 30 and np.std(expected) > 0.5


def test_a_multimodal_models_labels_are_counted(multimodal: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(multimodal, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (copy / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(CheckpointError, match="2 labels"):
        check_tensors(copy)
