"""docs/adding-a-model.md: its example is an architecture that scores right."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, MistralConfig, MistralForSequenceClassification

from tests.conftest import ROOT
from triward_server.config import ForwardConfig
from triward_server.engine import architectures
from triward_server.engine.checkpoint import check_tensors, load_config, read_blueprint
from triward_server.engine.scoring import Scorer
from triward_server.errors import CheckpointError
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.schema import Features, Scores
from triward_server.testing.oracle import TextOracle, fp32_budget

CPU = ForwardConfig(dtype="float32", device="cpu")


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """A tiny random Mistral with a window of 40 tokens, and a tokenizer of Llama's kind."""
    make_text_checkpoint("llama", "tiny", 0, tmp_path / "llama")
    config = MistralConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=40, num_labels=1,
        pad_token_id=AutoConfig.from_pretrained(tmp_path / "llama").pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForSequenceClassification(config)
    for parameter in model.parameters():  # wide enough that every token matters
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "mistral")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "llama" / name, tmp_path / "mistral" / name)
    return tmp_path / "mistral"


@pytest.fixture
def example() -> architectures.Architecture:
    """The file that the page shows."""
    return architectures.ARCHITECTURES["mistral"]


def test_the_page_shows_the_file() -> None:
    page = (ROOT / "docs" / "adding-a-model.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    file = ROOT / "triward_server" / "engine" / "architectures" / "mistral.py"
    assert file.read_text() in blocks
    registered = next(block for block in blocks if '"mistral"' in block)
    assert registered.strip() in (file.parent / "__init__.py").read_text()


def test_the_example(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = TextOracle(mistral)
    rng = np.random.default_rng(0)
    prompt = rng.integers(20, 900, 100).astype(np.int32)
    answers = tuple(rng.integers(20, 900, n).astype(np.int32) for n in (1, 30, 90))
    (result,) = Scorer(mistral, CPU).score([Features(prompt, answers)])
    assert isinstance(result, Scores)
    for score, answer in zip(result.scores, answers, strict=True):
        expected = oracle.score_ids(np.concatenate([prompt, answer]))
        assert abs(score - expected) <= fp32_budget(expected)
    assert np.std(result.scores) > 0.05
    monkeypatch.delitem(architectures.ARCHITECTURES, "mistral")
    with pytest.raises(CheckpointError, match="'mistral' is not supported"):
        check_tensors(mistral)


def test_without_its_windows_it_is_refused(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plain` alone would leave the window unread, Mistral's default one too."""
    plain = architectures.Architecture(architectures.interface.common_decoder)
    monkeypatch.setitem(architectures.ARCHITECTURES, "mistral", plain)
    with pytest.raises(CheckpointError, match="sliding_window = 40: not supported for mistral"):
        check_tensors(mistral)
    config = json.loads((mistral / "config.json").read_text())
    (mistral / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert check_tensors(mistral).decoder.windows == (None,) * 3


def test_with_wrong_windows_it_would_be_another_score(
    mistral: Path, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of `test_the_example`."""

    def everything(config: Any) -> Any:
        return replace(example.decoder(config), windows=(None,) * 3)

    wrong = architectures.Architecture(everything)
    monkeypatch.setitem(architectures.ARCHITECTURES, "mistral", wrong)
    rng = np.random.default_rng(0)
    ids = rng.integers(20, 900, 100).astype(np.int32)
    (result,) = Scorer(mistral, CPU).score([Features(ids[:50], (ids[50:],))])
    assert isinstance(result, Scores)
    assert abs(result.scores[0] - TextOracle(mistral).score_ids(ids)) > 10 * fp32_budget(1)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("sliding_window", 40, "sliding_window = 40"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
        ("skip_layer_mlp", [1], r"skip_layer_mlp = \[1\]"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "quantization_config = "),
    ],
)
def test_phi3_as_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, refused: str
) -> None:
    """Scores were others without a word: 0.037 for -1.194, 0.244 for 0.116."""
    config = {
        "model_type": "phi3", "architectures": ["Phi3ForSequenceClassification"],
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "id2label": {"0": "LABEL_0"},
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.1,
    }  # fmt: skip
    phi3 = architectures.Architecture(architectures.interface.common_decoder)
    monkeypatch.setitem(architectures.ARCHITECTURES, "phi3", phi3)

    def read(**fields: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        return read_blueprint(tmp_path, load_config(tmp_path))

    assert read().decoder.windows == (None, None)
    with pytest.raises(CheckpointError, match=refused):
        read(**{field: value})
