"""POLAR: InternLM2's reward class, which compares a response with a reference answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import Exit
from tests.served.test_text_models import conversations
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.scoring import Scorer
from triward_server.errors import CheckpointError, InvalidRequest
from triward_server.export.options import Template
from triward_server.export.prepared import prepared
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.export.reference import Reference, fp32_budget
from triward_server.export.verify import verify
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Scores

CPU = ForwardConfig(dtype="float32", device="cpu", threads=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("polar") / "checkpoint"
    make_text_checkpoint("internlm2", "tiny", 0, folder)
    return folder


@pytest.fixture(scope="module")
def folder(published: Path) -> Iterator[Path]:
    with prepared(published, template=Template.POLAR) as whole:
        yield whole


def test_25_conversations(folder: Path) -> None:
    """Beside POLAR's own text, written out and tokenized whole."""
    cases = {n: m for n, m in conversations("polar").items() if len(m[-1]["content"]) < 4000}
    assert len(cases) >= 25
    tokenizer = AutoTokenizer.from_pretrained(folder)
    preprocessor, reference = Preprocessor(folder, PreprocessConfig()), None
    restated = Reference(folder, torch.device("cpu"))
    items, expected = [], []
    for number, messages in enumerate(cases.values()):
        reference = f"The answer is {number}."
        *prompt, response = messages
        wire = [*({**m} for m in prompt)]
        wire[-1]["reference"] = reference
        content = response["content"].encode()
        items.append(preprocessor.features(json.dumps(wire).encode(), [content], []))
        said = "\n".join(m["content"] for m in prompt)
        text = f"{said}\n{reference}<|reward|>{said}\n{response['content']}"
        ids = [tokenizer.bos_token_id]
        for part in text.split("<|reward|>"):
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.convert_tokens_to_ids("<|reward|>"))
        found = [*items[-1].prompt_ids, *items[-1].response_ids[0]]
        assert found == ids, messages
        expected.append(restated.score_ids(np.array(ids, np.int32)))
    for score, result in zip(expected, Scorer(folder, CPU).score(items), strict=True):
        assert isinstance(result, Scores), result
        assert abs(result.scores[0] - score) <= fp32_budget(score)
    assert np.std(expected) > 0.5


def test_another_reference_is_another_score(folder: Path) -> None:
    preprocessor = Preprocessor(folder, PreprocessConfig())
    items = [
        preprocessor.features(
            json.dumps([{"role": "user", "content": "2 + 2?", "reference": text}]).encode(),
            [b"Four."],
            [],
        )
        for text in ("Four.", "Five.", "</s><|reward|>Four.")
    ]
    scores = [float(result.scores[0]) for result in Scorer(folder, CPU).score(items)]  # type: ignore[union-attr]
    assert abs(scores[0] - scores[1]) > 10 * fp32_budget(1)
    # Control tokens in it are text, too.
    reward = preprocessor._tokenizer._special["<|reward|>"]
    counts = [[*i.prompt_ids, *i.response_ids[0]].count(reward) for i in items]
    assert counts == [2, 2, 2]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "2 + 2?"}], "0 messages have a reference"),
        ([{"role": "user", "content": "?", "reference": None}], "0 messages have a reference"),
        ([{"role": "user", "content": "?", "reference": "a"}] * 2, "2 messages have a reference"),
        ([{"role": "user", "content": "?", "reference": 4}], r"messages\[0\]\.reference"),
    ],
)
def test_without_one_reference_it_is_refused(messages: object, words: str, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match=words):
        Preprocessor(folder, PreprocessConfig()).features(json.dumps(messages).encode(), [b"x"], [])


def test_other_models_refuse_a_reference(published: Path) -> None:
    with prepared(published) as whole:
        preprocessor = Preprocessor(whole, PreprocessConfig())
    wire = b'[{"role":"user","content":"?","reference":"a"}]'
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.reference: .*reads no reference"):
        preprocessor.features(wire, [b"x"], [])


def test_verify_and_export(
    folder: Path, published: Path, tmp_path: Path, export: Callable[..., Exit]
) -> None:
    report = verify(folder, torch.device("cpu"), streamed=False)
    assert report.wrong == [] and all(isinstance(row.score, float) for row in report.rows)
    flags = ("--checkpoint", published, "--device=cpu", "--output", tmp_path / "models")
    result = export(*flags, "--template", "polar")
    assert result.code == 0, result.stderr
    assert "warning" not in result.stderr
    canary = json.loads((tmp_path / "models" / "reward" / "1" / "canary.json").read_text())
    assert "reference" in canary["messages"] and canary["scores"]


def test_an_export_without_a_choice_warns(
    published: Path, tmp_path: Path, export: Callable[..., Exit]
) -> None:
    """InternLM2-Reward's class is POLAR's, too."""
    flags = ("--checkpoint", published, "--device=cpu", "--output", tmp_path / "models")
    flags += ("--no-verify", "--no-canary", "--force")
    result = export(*flags)
    assert result.code == 0 and "If it is POLAR, its scores will be wrong" in result.stderr
    result = export(*flags, "--template", "checkpoint")
    assert result.code == 0 and "warning" not in result.stderr


def test_the_template_is_polars_alone(tmp_path: Path, ixc_checkpoint: Path) -> None:
    make_text_checkpoint("qwen3", "tiny", 0, tmp_path / "qwen3")
    with pytest.raises(CheckpointError, match="no model of POLAR's class"):
        prepared(tmp_path / "qwen3", template=Template.POLAR).__enter__()
    with pytest.raises(CheckpointError, match="no model of POLAR's class"):
        prepared(ixc_checkpoint, template=Template.POLAR).__enter__()
