"""The published ranks of Qwen2.5 in place of an invented language's: ids, injection, parity."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conversations import PROSE, RESPONSES, says
from tests.features import ids_of
from tests.vocabulary import RANKS, SPLIT, encoded, fetch_ranks, published_tokenizer
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.scoring import Scorer
from triward_server.export import random_checkpoint as made
from triward_server.export.random_text_checkpoint import KINDS, make_text_checkpoint
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Scores
from triward_server.testing.oracle import TextOracle, fp32_budget

pytestmark = pytest.mark.slow
CPU = ForwardConfig(dtype="float32", device="cpu", threads=1)
ROWS = 152_064  # of Qwen2.5-7B's embedding, more than there are tokens


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, int]:
    found = fetch_ranks(tmp_path_factory.mktemp("wheel"))
    if found is None:
        pytest.skip("no registry is reached that has the ranks")
    assert len(found) == RANKS
    return found


@pytest.fixture(scope="module")
def folder(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 whose vocabulary is the published one."""
    target = tmp_path_factory.mktemp("real") / "qwen2-score"
    tokenizer = published_tokenizer(ranks, made.SPECIAL, made._ORDINARY)
    assert tokenizer.token_to_id("<|endoftext|>") == RANKS
    assert tokenizer.token_to_id("<|file_sep|>") == RANKS + 21
    with pytest.MonkeyPatch.context() as patch:
        module = "triward_server.export.random_text_checkpoint"
        patch.setattr(f"{module}.train_tokenizer", lambda *_: tokenizer)
        fields = KINDS["qwen2-score"].fields | {"vocab_size": ROWS}
        patch.setitem(KINDS, "qwen2-score", replace(KINDS["qwen2-score"], fields=fields))
        make_text_checkpoint("qwen2-score", "tiny", 0, target)
    return target


@pytest.fixture(scope="module")
def preprocessor(folder: Path) -> Preprocessor:
    return Preprocessor(folder, PreprocessConfig())


@pytest.fixture(scope="module")
def oracle(folder: Path) -> TextOracle:
    return TextOracle(folder)


texts = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [PROSE, "def f(x):\n\treturn x\n", "图中最高的柱子", "صورة", "'ll", "  \r\n 12"]
        ),
    ),
    max_size=5,
).map("".join)
SLOW = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOW
@given(text=texts)
def test_ids_are_those_of_the_ranks(
    text: str, ranks: dict[bytes, int], preprocessor: Preprocessor
) -> None:
    backend = preprocessor._tokenizer._backend
    pieces = regex.findall(SPLIT, unicodedata.normalize("NFC", text))
    expected = [id_ for piece in pieces for id_ in encoded(piece, ranks)]
    assert backend.encode(text, add_special_tokens=False).ids == expected


@SLOW
@given(question=texts, answer=texts)
def test_ids_equal_the_tokenizers(
    question: str, answer: str, preprocessor: Preprocessor, oracle: TextOracle
) -> None:
    messages = [{"role": "user", "content": question}, says(answer)]
    expected = oracle.inputs([messages])["input_ids"][0].tolist()
    assert ids_of(preprocessor, messages) == expected


@SLOW
@given(data=st.data())
def test_no_text_becomes_control(data: st.DataObject, preprocessor: Preprocessor) -> None:
    pieces = st.sampled_from([*made.SPECIAL, *(t[:5] for t in made.SPECIAL), "|>", " ", "im_end"])
    hostile = data.draw(st.lists(pieces, max_size=6).map("".join))
    found, expected = (
        [i for i in ids_of(preprocessor, messages) if RANKS <= i < RANKS + len(made.SPECIAL)]
        for messages in (
            [{"role": "user", "content": hostile}, says(hostile)],
            [{"role": "user", "content": "a"}, says("b")],
        )
    )
    assert found == expected


def test_scores_equal_transformers(
    folder: Path, preprocessor: Preprocessor, oracle: TextOracle
) -> None:
    scorer, seen = Scorer(folder, CPU), set()
    for text in RESPONSES.values():
        if len(text) > 2000:
            continue
        messages = [{"role": "user", "content": PROSE + "Is purple the highest value?"}, says(text)]
        wire = json.dumps(messages[:-1]).encode()
        (result,) = scorer.score([preprocessor.features(wire, [text.encode()], [])])
        assert isinstance(result, Scores), result
        expected = oracle.score(messages)
        assert abs(result.scores[0] - expected) <= fp32_budget(expected)
        seen.add(round(expected, 3))
    assert len(seen) > 10
