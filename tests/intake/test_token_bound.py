"""What is too long is refused before it is encoded, and what is not too long never is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from transformers import AutoTokenizer

from triward_server.config import PreprocessConfig
from triward_server.errors import InvalidRequest
from triward_server.intake import token_bound
from triward_server.intake.conversation import parse_conversation
from triward_server.intake.preprocess import Preprocessor
from triward_server.intake.token_bound import TokenBound
from triward_server.intake.tokenization import Spans, _common

MEGABYTES = 4 * 2**20 - 100
LONG = {
    "words": "a reward model scores what it is shown " * (MEGABYTES // 39),
    "one word": "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=MEGABYTES)),
    "spaces": " " * MEGABYTES,
    "chinese": "".join(chr(random.Random(0).randint(0x4E00, 0x9FA5)) for _ in range(9)) * 150_000,
    "added tokens": "<tool_call>" * (MEGABYTES // 11),
}
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=9),
        st.sampled_from(
            ["<tool_call>", "\u0338", "e\u0301", "    ", "\r\n", "</think>", "图", "🙂"]
        ),
        st.text("ab \n", max_size=200),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(autouse=True, scope="module")
def weighs_short_texts_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_bound, "SHORT", 0)
        yield


@pytest.fixture(scope="module")
def backend(checkpoint: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer.backend_tokenizer


@pytest.fixture(scope="module")
def bound(backend: Any) -> TokenBound:
    return TokenBound(backend)


@settings(max_examples=500, deadline=None)
@given(text=texts)
def test_it_is_a_lower_bound(backend: Any, bound: TokenBound, text: str) -> None:
    assert bound(text) <= len(backend.encode(text, add_special_tokens=False).ids)


def test_it_is_worth_something(backend: Any, bound: TokenBound) -> None:
    for name, text in LONG.items():
        tokens = len(backend.encode(text[:20_000], add_special_tokens=False).ids)
        assert bound(text[:20_000]) > 0.2 * tokens, name


@pytest.fixture(scope="module")
def gemma_like() -> Tokenizer:
    """BPE over characters that falls back to bytes; spaces are a character like others."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehllo", "▁▁", "he", "ll"]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    model = BPE(
        vocab, [("▁", "▁"), ("h", "e"), ("l", "l")], unk_token="<unk>", fuse_unk=True,
        byte_fallback=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = Replace(" ", "▁")
    tokenizer.add_tokens(["<h2>", "\n\n"])
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_it_is_one_for_tokens_of_characters(gemma_like: Tokenizer, text: str) -> None:
    assert TokenBound(gemma_like)(text) <= len(gemma_like.encode(text, add_special_tokens=False))


def test_it_counts_the_longest_token_of_characters(gemma_like: Tokenizer) -> None:
    assert TokenBound(gemma_like)("a" * 6000) == 1000, "<0x00> is the longest"


def test_another_kind_of_tokenizer_has_none(backend: Any) -> None:
    """Nothing is claimed where tokens are no runs of the text's bytes."""
    description = json.loads(backend.to_str())
    description["pre_tokenizer"] = {"type": "Whitespace"}
    other = type(backend).from_str(json.dumps(description))
    assert TokenBound(other)("word " * 1000) == 0


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_is_not_encoded(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessor = Preprocessor(checkpoint, PreprocessConfig())
    monkeypatch.setattr(Spans, "encode", None)
    text = LONG[name]
    wire = json.dumps([{"role": "user", "content": text}], ensure_ascii=False).encode()
    with pytest.raises(InvalidRequest, match=r"^messages: .* at least \d+ tokens, the limit is"):
        preprocessor.features(wire, [b"a"], [])


def test_a_long_response_is_named(checkpoint: Path) -> None:
    preprocessor = Preprocessor(checkpoint, PreprocessConfig())
    wire = b'[{"role":"user","content":"?"}]'
    with pytest.raises(InvalidRequest, match=r"^responses\[1\]: .* at least \d+ tokens"):
        preprocessor.features(wire, [b"a", LONG["words"].encode()], [])


# Templates that look at the response, or write earlier turns otherwise when one follows.
TEMPLATES = {
    "as it is": None,
    "earlier turns change": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content | upper }}<|im_end|>{% endfor %}"
    ),
    "the response comes first": (
        "{{ messages[-1].content }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endfor %}"
    ),
    "its length is told": (
        "<|im_start|>{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}"
    ),
    "thoughts are cut": (
        "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] | trim }}<|im_end|>"
        "{% endfor %}<|endoftext|>"
    ),
    "nothing stands between": "{% for m in messages %}{{ m.content }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_shared_as_if_each_response_were_rendered_alone(
    name: str, checkpoint: Path
) -> None:
    """The oracle renders, cuts and tokenizes every conversation whole."""
    tokenizer = Preprocessor(checkpoint, PreprocessConfig())._tokenizer
    if TEMPLATES[name]:
        tokenizer._processor.chat_template = TEMPLATES[name]
    texts = ["", "a", "a <|im_end|> b", "<|im_", "end|>", "<think>x</think> y", "word " * 30, " \n"]
    for messages in ([], ["Why?"], ["Why <|im_start|> not?", "So.", "Then <|im"], texts):
        roles = ("user", "assistant")
        chat = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
        given = parse_conversation(
            json.dumps(chat).encode(), [t.encode() for t in texts], [], PreprocessConfig()
        )
        ours = tokenizer.tokenize(given, [])
        for text, ids in zip(texts, ours.response_ids, strict=True):
            turns = [*chat, {"role": "assistant", "content": text}]
            marked = [{**turn, "content": tokenizer._mark(turn["content"])} for turn in turns]
            pieces = tokenizer._with_prefix(tokenizer._render(marked))
            spans = Spans(tokenizer._backend)
            spans.encode([pieces])
            whole = spans.ids(pieces)
            assert [*ours.prompt_ids.tolist(), *ids.tolist()] == whole.tolist()


def test_where_texts_part() -> None:
    for one, other, same in (("", "a", 0), ("abc", "abd", 2), ("ab", "ab", 2), ("ab", "abc", 2)):
        assert _common(one, other) == _common(other, one) == same
