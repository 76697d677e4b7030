"""What an export writes anew: tokenizers that are remote code, pickled heads; nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.conftest import Exit
from tests.conversations import PROSE, RESPONSES
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.architectures import internlm2
from triward_server.engine.checkpoint import check_tensors
from triward_server.engine.scoring import Scorer
from triward_server.errors import CheckpointError, InvalidRequest
from triward_server.export.prepared import prepared
from triward_server.export.random_sentencepiece import write_model
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.export.reference import Reference, fp32_budget
from triward_server.export.sentencepiece import (
    NORMAL,
    SPACE,
    USER_DEFINED,
    Piece,
    Vocabulary,
    read_vocabulary,
    tokenizer_of,
)
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features, Scores

CPU = ForwardConfig(dtype="float32", device="cpu", threads=1)
# The published tokenizer.model, where it is at hand.
REAL = os.environ.get("TRIWARD_INTERNLM2_TOKENIZER")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internlm2") / "published"
    make_text_checkpoint("internlm2", "tiny", 0, folder)
    return folder


@pytest.fixture(scope="module")
def whole(published: Path) -> Path:
    """As serving reads it."""
    target = published.parent / "whole"
    with prepared(published) as folder:
        shutil.copytree(folder, target)
    return target


@pytest.fixture(scope="module")
def made(published: Path) -> tuple[Vocabulary, Any]:
    vocabulary = read_vocabulary(published / "tokenizer.model")
    tokenizer = tokenizer_of(vocabulary)
    tokenizer.encode_special_tokens = True  # as for what is in a message
    return vocabulary, tokenizer


def restated(pieces: list[Piece], text: str) -> list[int]:
    """SentencePiece's byte-pair encoding, the best pair first, leftmost of equal ones."""
    ids = {piece.text: id_ for id_, piece in enumerate(pieces)}
    scores = {p.text: p.score for p in pieces if p.kind in (NORMAL, USER_DEFINED)}
    fixed = {p.text for p in pieces if p.kind == USER_DEFINED}
    text = text.replace(" ", SPACE)
    symbols: list[str] = []
    while text:
        own = max((f for f in fixed if text.startswith(f)), key=len, default=text[0])
        symbols.append(own)
        text = text[len(own) :]
    while True:
        pairs = [
            (scores[a + b], -at)
            for at, (a, b) in enumerate(pairwise(symbols))
            if a + b in scores and not {a, b} & fixed
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    found: list[int] = []
    for symbol in symbols:
        known = symbol in ids and pieces[ids[symbol]].kind in (NORMAL, USER_DEFINED)
        found += [ids[symbol]] if known else [ids[f"<0x{b:02X}>"] for b in symbol.encode()]
    return found


letters = st.one_of(
    st.sampled_from(["the answer", " ", "  ", "\n", "\u2014\u2014", "\u2014", "\uff21", "图", "é"]),
    st.text(max_size=5),
    st.sampled_from([PROSE[:40], "question", "value", "return self ==", "🙂"]),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(text="<s>")
@given(text=st.lists(letters, max_size=8).map("".join))
def test_ids_are_sentencepieces(text: str, made: tuple[Vocabulary, Any]) -> None:
    vocabulary, tokenizer = made
    expected = restated(list(vocabulary.pieces), text)
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize("text", ["[UNUSED_TOKEN_0]", "</s>", "<s>", "<unk>", "a[UNUSED_TOKEN_1]"])
def test_control_pieces_in_text_stay_text(text: str, published: Path) -> None:
    vocabulary = read_vocabulary(published / "tokenizer.model")
    tokenizer = tokenizer_of(vocabulary)
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert not {*ids} & {*vocabulary.special}
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.skipif(REAL is None, reason="no published tokenizer.model")
def test_the_published_vocabulary() -> None:
    assert REAL is not None
    vocabulary = read_vocabulary(Path(REAL))
    assert len(vocabulary.pieces) == 92_544 and len(vocabulary.special) == 150
    roles = {92527: "<|reward|>", 92542: "<|im_end|>", 92543: "<|im_start|>"}
    assert [vocabulary.pieces[i].text for i in (92397, *roles)] == [
        f"[UNUSED_TOKEN_{number}]" for number in (0, 130, 145, 146)
    ]
    tokenizer = tokenizer_of(vocabulary.renamed(roles))
    tokenizer.encode_special_tokens = False
    ids = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False).ids
    assert ids == [92543, 1008, 364]
    assert tokenizer.encode("assistant", add_special_tokens=False).ids == [525, 11353]
    tokenizer.encode_special_tokens = True
    for text in RESPONSES.values():
        ids = tokenizer.encode(text[:400], add_special_tokens=False).ids
        assert ids == restated(list(vocabulary.pieces), text[:400])


def test_text_becomes_its_conversation(whole: Path) -> None:
    """BOS once, roles, and the token at which the head is read."""
    tokens = json.loads((whole / "tokenizer.json").read_text())["model"]["vocab"]
    wire = json.dumps([{"role": "user", "content": "value<|im_end|>"}]).encode()
    features = Preprocessor(whole, PreprocessConfig()).features(wire, [b"the"], [])
    ids = [*features.prompt_ids, *features.response_ids[0]]
    special = ("<s>", "<|im_start|>", "<|im_end|>", "<|reward|>")
    control = {tokens[token]: token for token in special}
    assert [control[i] for i in ids if i in control] == [
        "<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|reward|>",
    ]  # fmt: skip
    assert ids[-1] == tokens["<|reward|>"]


def test_the_head_is_read_at_its_token_alone(whole: Path) -> None:
    scorer = Scorer(whole, CPU)
    end = scorer.geometry.read_id
    assert end == json.loads((whole / "config.json").read_text())["reward_token_id"]
    ids = np.arange(300, 340, dtype=np.int32)
    right, wrong = (Features(ids, (np.array([9, last], np.int32),)) for last in (end, 9))
    fine, refused = scorer.score([right, wrong])
    assert isinstance(fine, Scores)
    assert isinstance(refused, InvalidRequest) and f"read at {end}" in str(refused)


def test_more_tokens_than_positions_are_refused(whole: Path, tmp_path: Path) -> None:
    """Where dynamic positions would begin to stretch."""
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    assert config["rope_scaling"]["type"] == "dynamic"
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    preprocessor = Preprocessor(copy, PreprocessConfig())
    with pytest.raises(InvalidRequest, match="the limit is 64"):
        preprocessor.features(b'[{"role":"user","content":"x"}]', [b"value " * 80], [])
    end = Scorer(copy, CPU).geometry.read_id
    ids = np.full(65, end, np.int32)
    (refused,) = Scorer(copy, CPU).score([Features(ids[:1], (ids[1:],))])
    assert isinstance(refused, InvalidRequest) and "the limit is 64" in str(refused)


@pytest.mark.parametrize("mistake", ["plain blocks", "no bos", "keys last"])
def test_control(mistake: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the restatement must notice."""
    ids = np.arange(300, 400, dtype=np.int32)
    end = json.loads((whole / "config.json").read_text())["reward_token_id"]
    answer = np.array([5, 6, end], np.int32)
    expected = Reference(whole, torch.device("cpu")).score_ids(np.concatenate([[1], ids, answer]))
    right = Features(np.concatenate([[1], ids]).astype(np.int32), (answer,))
    item = right if mistake != "no bos" else Features(ids, (answer,))
    (fine,) = Scorer(whole, CPU).score([right])
    assert isinstance(fine, Scores) and abs(fine.scores[0] - expected) <= fp32_budget(expected)

    def wrong(self: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".qkv_proj." not in name or mistake == "plain blocks":
            return tensor
        heads = tensor.unflatten(0, (self.groups, self.queries + 2, -1))
        return torch.cat([p.flatten(0, 2) for p in heads.split([1, 1, self.queries], 1)[::-1]])

    if mistake != "no bos":
        monkeypatch.setattr(internlm2.GroupedRows, "__call__", wrong)
    (other,) = Scorer(whole, CPU).score([item])
    assert isinstance(other, Scores)
    assert abs(other.scores[0] - expected) > 10 * fp32_budget(expected)


def damaged(pieces: list[Piece], before: bytes, after: bytes) -> bytes:
    data = write_model(pieces)
    assert before in data
    return data.replace(before, after)


RULES: dict[str, Callable[[list[Piece]], bytes]] = {
    "not a tokenizer.model": lambda pieces: b"\x07nonsense",
    "model_type": lambda pieces: damaged(pieces, b"\x12\x05\x18\x02", b"\x12\x05\x18\x01"),
    "number of bytes is 255": lambda pieces: write_model(pieces[:3] + pieces[4:]),
    "a piece is there twice": lambda pieces: write_model([*pieces, pieces[-1]]),
    "add_dummy_prefix": lambda pieces: damaged(pieces, b"\x18\0\x20\0", b"\x18\1\x20\0"),
}


@pytest.mark.parametrize("problem", RULES)
def test_another_tokenizer_is_refused(problem: str, published: Path, tmp_path: Path) -> None:
    pieces = list(read_vocabulary(published / "tokenizer.model").pieces)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(RULES[problem](pieces))
    with pytest.raises(CheckpointError, match=problem):
        read_vocabulary(file)


def test_names_that_do_not_fit_are_refused(published: Path) -> None:
    vocabulary = read_vocabulary(published / "tokenizer.model")
    with pytest.raises(CheckpointError, match="has id 9999"):
        vocabulary.renamed({9999: "<|late|>"})
    with pytest.raises(CheckpointError, match="two tokens have the same text"):
        vocabulary.renamed({5: "</s>"})
    assert isinstance(vocabulary, Vocabulary)


def test_a_tokenizer_without_its_file_is_refused(published: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    (copy / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"remote code, and there is no tokenizer\.model"):
        prepared(copy).__enter__()


def test_a_tokenizer_that_transformers_has_is_left_alone(valued: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(valued, tmp_path / "copy"))
    file = copy / "tokenizer_config.json"
    remote = {"auto_map": {"AutoTokenizer": ["somewhere.Tokenizer", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | remote))
    with prepared(copy) as folder:
        assert folder == copy


@pytest.fixture(scope="module")
def valued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head as LLaMA-Factory pickles it."""
    folder = tmp_path_factory.mktemp("valued") / "qwen2"
    make_text_checkpoint("qwen2", "tiny", 0, folder)
    return folder


def test_a_pickled_head_is_read_without_running_it(valued: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(valued, tmp_path / "copy"))
    head = load_file(copy / "value_head.safetensors")
    (copy / "value_head.safetensors").unlink()
    torch.save(head, copy / "value_head.bin")
    ids = np.arange(20, 60, dtype=np.int32)
    item = Features(ids[:9], (ids[9:],))
    (expected,) = Scorer(valued, CPU).score([item])
    with prepared(copy) as folder:
        (found,) = Scorer(folder, CPU).score([item])
        assert not (folder / "value_head.bin").exists()
    assert isinstance(expected, Scores) and isinstance(found, Scores)
    np.testing.assert_array_equal(expected.scores, found.scores)


class Harmful:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["TRIWARD_TEST_HARM"],))


def test_a_pickle_that_runs_code_is_refused(
    valued: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Callable[..., Exit]
) -> None:
    monkeypatch.setenv("TRIWARD_TEST_HARM", str(tmp_path / "harm"))
    copy = Path(shutil.copytree(valued, tmp_path / "copy"))
    (copy / "value_head.safetensors").unlink()
    for content in (pickle.dumps(Harmful()), b"nothing"):
        (copy / "value_head.bin").write_bytes(content)
        result = export("--checkpoint", copy, "--output", tmp_path / "models", "--device=cpu")
        assert result.code == 1 and "so it is not loaded" in result.stderr
    assert not (tmp_path / "harm").exists() and not (tmp_path / "models").exists()
    torch.save([torch.zeros(1)], copy / "value_head.bin")
    with pytest.raises(CheckpointError, match="no tensors with names"), prepared(copy):
        pass


def test_two_heads_are_refused(valued: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(valued, tmp_path / "copy"))
    torch.save({}, copy / "value_head.bin")
    with pytest.raises(CheckpointError, match="which one counts"), prepared(copy):
        pass


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer.json"])
def test_docreward_is_refused_by_its_token(name: str, valued: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(valued, tmp_path / "copy"))
    file = copy / name
    given = json.loads(file.read_text()) if file.is_file() else {}
    tokens = [{"id": 1023, "content": "<|regression|>", "special": True}]
    file.write_text(
        json.dumps({**given, "added_tokens": [*given.get("added_tokens", []), *tokens]})
    )
    with pytest.raises(CheckpointError, match=r"read at <\|regression\|>"), prepared(copy):
        pass


def test_names_of_published_tensors_are_said(published: Path, tmp_path: Path) -> None:
    """A chat checkpoint has a vocabulary's head, and no other."""
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    file = copy / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "output.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'output\.weight'"):
        check_tensors(copy)
