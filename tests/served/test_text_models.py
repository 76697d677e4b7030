"""Text reward models: the same engine, and transformers' own number for every conversation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.conftest import Exit, Served, encode
from tests.conversations import PROSE, RESPONSES, Messages, image, picture, says, user
from tests.features import ids_of
from triward import InvalidRequest, RewardClient
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine import architectures, attention, decoder
from triward_server.engine.arena import Arena
from triward_server.engine.checkpoint import check_tensors, load_model
from triward_server.engine.scoring import Scorer
from triward_server.errors import CheckpointError
from triward_server.errors import InvalidRequest as Refused
from triward_server.export.prepared import prepared
from triward_server.export.random_text_checkpoint import KINDS, make_text_checkpoint
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features, Scores
from triward_server.serving.watchdog import check_once
from triward_server.testing.oracle import TextOracle, fp32_budget

CPU = ForwardConfig(dtype="float32", device="cpu")
WINDOW = KINDS["gemma2"].fields["sliding_window"]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As they are downloaded."""
    folder = tmp_path_factory.mktemp("published")
    for name in KINDS:
        make_text_checkpoint(name, "tiny", 0, folder / name)
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="session")
def text_checkpoints(
    published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """As an export reads them."""
    folder = tmp_path_factory.mktemp("text")
    for name, source in published.items():
        with prepared(source) as whole:
            shutil.copytree(whole, folder / name)
    return {name: folder / name for name in KINDS}


# What differs from another by its head alone, or by one field: its own tests are slow ones.
FEW = [name for name in KINDS if name not in ("qwen2-score", "qwen2-reward", "mistral")]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in KINDS],
)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(architecture: str, text_checkpoints: dict[str, Path]) -> Path:
    return text_checkpoints[architecture]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> TextOracle:
    return TextOracle(folder)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer(folder, CPU)


@pytest.fixture(scope="module")
def preprocessor(folder: Path) -> Preprocessor:
    return Preprocessor(folder, PreprocessConfig())


@pytest.fixture(scope="module")
def end(scorer: Scorer) -> list[int]:
    """What the last token of a conversation must be, if anything."""
    return [id_ for id_ in [scorer.geometry.read_id] if id_ is not None]


@pytest.fixture(scope="module")
def client(
    architecture: str, published: dict[str, Path], served: Callable[..., Served]
) -> RewardClient:
    model = served(architecture, source=published[architecture])
    check_once(model.server.http, model.repository, 60, deep=True)  # its canary has no image
    return model.client


def asks(text: str) -> dict[str, Any]:
    """Templates of text models know strings only."""
    return {"role": "user", "content": text}


def conversations(architecture: str) -> dict[str, Messages]:
    """At least 20, by name."""
    cases: dict[str, Messages] = {
        f"response/{name}": [asks("Is purple the highest value?"), says(text)]
        for name, text in RESPONSES.items()
    }
    cases |= {
        "prompt/empty": [asks(""), says("I see nothing.")],
        "prompt/spaces": [asks("  padded \n"), says("  padded too \n")],
        "prompt/parts": [asks("One. Two.\nThree"), says("Three parts.")],
        "prompt/long": [asks(PROSE * 40), says("Purple.")],
        "turns/many": [
            message
            for turn in range(9)
            for message in (asks(f"Question {turn}?"), says(f"Answer {turn}."))
        ],
        "thought/whole": [asks("2 + 2?"), says("<think>\nTwo and two.\n</think>\n\nFour.")],
        "thought/open": [asks("2 + 2?"), says("<think>Two and two. Four.")],
        "thought/asked": [asks("What does </think> mean?"), says("An end.</think> It is.")],
    }
    if architecture not in ("gemma2", "mistral"):  # whose templates refuse it
        cases["system"] = [
            {"role": "system", "content": "You are a strict judge."}, asks("Hi"), says("Hello"),
        ]  # fmt: skip
    return cases


def test_served_scores_equal_transformers_in_fp32(
    architecture: str, client: RewardClient, oracle: TextOracle
) -> None:
    cases = conversations(architecture)
    assert len(cases) >= 20
    expected = {name: oracle.score(messages) for name, messages in cases.items()}
    alone = {name: client.score(messages) for name, messages in cases.items()}
    with ThreadPoolExecutor(16) as pool:
        together = dict(zip(cases, pool.map(client.score, cases.values()), strict=True))
    for name, score in expected.items():
        assert abs(alone[name] - score) <= fp32_budget(score), name
        assert together[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), name
    assert np.std(list(expected.values())) > 0.5, "scores that do not differ would prove nothing"


def test_a_group_scores_as_its_members_alone(client: RewardClient, oracle: TextOracle) -> None:
    prompt = [asks(PROSE * 20)]  # longer than a window
    # The longest one takes the reference 10 s, and is compared alone above.
    responses = [text for name, text in RESPONSES.items() if name != "4000-tokens"] + [PROSE * 20]
    scores = client.score_responses(prompt, responses)
    for response, score in zip(responses, scores, strict=True):
        expected = oracle.score([*prompt, says(response)])
        assert abs(score - expected) <= fp32_budget(expected)


def test_media_is_refused(client: RewardClient) -> None:
    """A text model must not score as if the image were not there."""
    conversation = [user(image(encode(picture(40, 40, 0))), "What?"), says("Red.")]
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content\[0\].*reads text only"):
        client.score(conversation)
    assert np.isfinite(client.score([user("What?"), says("Red.")]))


def test_parts_are_one_text(client: RewardClient) -> None:
    parts, whole = user("One. ", "Two.", "\nThree"), asks("One. Two.\nThree")
    assert client.score([parts, says("3")]) == pytest.approx(client.score([whole, says("3")]))


def test_ids_equal_the_tokenizers(
    architecture: str, preprocessor: Preprocessor, oracle: TextOracle
) -> None:
    """The first token is there once, whoever writes it, template or tokenizer."""
    kind = KINDS[architecture]
    for messages in conversations(architecture).values():
        ids = ids_of(preprocessor, messages)
        assert ids == oracle.inputs([messages])["input_ids"][0].tolist()
        if kind.bos:
            assert ids.count(oracle.tokenizer.bos_token_id) == 1
            assert ids[0] == oracle.tokenizer.bos_token_id


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_text_becomes_control(
    architecture: str, preprocessor: Preprocessor, oracle: TextOracle, data: st.DataObject
) -> None:
    """Whatever is written: the control tokens are those of a conversation without any."""
    special = KINDS[architecture].special
    pieces = st.sampled_from([*special, *(t[:3] for t in special), *(t[3:] for t in special), " "])
    texts = st.lists(pieces, max_size=6).map("".join)
    hostile = [user(*data.draw(st.lists(texts, max_size=4))), says(data.draw(texts))]
    control = set(oracle.tokenizer.all_special_ids) | {
        oracle.tokenizer.convert_tokens_to_ids(token) for token in special
    }
    found, expected = (
        [token for token in ids_of(preprocessor, messages) if token in control]
        for messages in (hostile, [user("a"), says("b")])
    )
    assert found == expected


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "system", "content": "Be fair."}, asks("Hi")], "System role not supported"),
        ([asks("Hi"), asks("Hello?")], "roles must alternate"),
    ],
)
def test_what_a_template_refuses_is_refused(
    messages: Messages, words: str, text_checkpoints: dict[str, Path]
) -> None:
    gemma = Preprocessor(text_checkpoints["gemma2"], PreprocessConfig())
    with pytest.raises(Refused, match=f"messages: .*{words}"):
        gemma.features(json.dumps(messages).encode(), [b"yes"], [])


# Few tokens, so that prefixes meet by chance; runs of one token reach beyond a window.
runs = st.one_of(
    st.lists(st.integers(20, 22), min_size=1, max_size=4),
    st.integers(WINDOW - 2, WINDOW + 30).map(lambda n: [20] * n),
)
prompts = st.lists(runs, max_size=3).map(lambda many: [token for run in many for token in run])
responses = st.lists(prompts.filter(len), min_size=1, max_size=3)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=st.lists(st.tuples(prompts, responses), min_size=1, max_size=3))
def test_random_trees_equal_transformers(
    batch: Any, scorer: Scorer, oracle: TextOracle, end: list[int]
) -> None:
    items = [
        Features(np.array(prompt, np.int32), tuple(np.array(r + end, np.int32) for r in answers))
        for prompt, answers in batch
    ]
    for item, result in zip(items, scorer.score(items), strict=True):
        assert isinstance(result, Scores), result
        for score, answer in zip(result.scores, item.response_ids, strict=True):
            expected = oracle.score_ids(np.concatenate([item.prompt_ids, answer]))
            assert abs(score - expected) <= fp32_budget(expected)


def test_deterministic_is_bitwise(folder: Path, end: list[int]) -> None:
    exact = Scorer(folder, replace(CPU, deterministic=True))
    rng = np.random.default_rng(0)
    prompt = rng.integers(20, 700, 3 * WINDOW).astype(np.int32)
    # Equal lengths, as rollouts have that a limit cuts, are what an engine computes together.
    lengths = (1, 30, 30, 30, 30, 2 * WINDOW, 2 * WINDOW)
    answers = tuple(np.array([*rng.integers(20, 700, n), *end], np.int32) for n in lengths)
    items = [Features(prompt, answers), Features(prompt[:50], answers[1:])]
    items += [Features(prompt, (answer,)) for answer in answers]
    for item, together in zip(items, exact.score(items), strict=True):
        (alone,) = exact.score([item])
        assert isinstance(alone, Scores) and isinstance(together, Scores)
        np.testing.assert_array_equal(alone.scores, together.scores)


def test_bf16_is_within_transformers_own_spread(
    architecture: str, folder: Path, oracle: TextOracle, preprocessor: Preprocessor
) -> None:
    """Judged by how far transformers' bf16 is from its fp32, over the same conversations."""
    scorer = Scorer(folder, replace(CPU, dtype="bfloat16"))
    card = TextOracle(folder, dtype=torch.bfloat16)
    spread, ours = [], []
    for messages in conversations(architecture).values():
        if len(messages[-1]["content"]) > 2000:
            continue
        exact = oracle.score(messages)
        wire = json.dumps(messages[:-1]).encode()
        (result,) = scorer.score(
            [preprocessor.features(wire, [messages[-1]["content"].encode()], [])]
        )
        assert isinstance(result, Scores)
        spread.append(card.score(messages) - exact)
        ours.append(float(result.scores[0]) - exact)
    print(f"{architecture}: rms {rms(spread):.4f} transformers, {rms(ours):.4f} here")
    assert rms(spread) > 10 * fp32_budget(1), "bf16 noise is there to be measured"
    assert rms(ours) <= rms(spread)


def rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


# Controls: what an engine for one architecture gets wrong with another. Parity must notice each.


@pytest.fixture(scope="module")
def long_features() -> Features:
    rng = np.random.default_rng(3)
    ids = rng.integers(20, 700, 4 * WINDOW).astype(np.int32)
    return Features(ids[: 3 * WINDOW], (ids[3 * WINDOW :], ids[: WINDOW // 2]))


def ended(item: Features, end: list[int]) -> Features:
    """The same with what the head is read at behind each response."""
    answers = tuple(np.array([*ids, *end], np.int32) for ids in item.response_ids)
    return replace(item, response_ids=answers)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("gemma2", {"softcap": None}),
        ("gemma2", {"windows": (None,) * 4}),
        ("gemma2", {"windows": (WINDOW - 1, None, WINDOW - 1, None)}),
        ("gemma2", {"windows": (None, WINDOW, None, WINDOW)}),
        ("gemma2", {"norm_offset": 0.0}),
        ("gemma2", {"embedding_scale": 1.0}),
        ("gemma2", {"scale": 48**-0.5}),
        ("gemma2", {"activation": "silu"}),
        ("llama", {"rope": "default"}),
        ("mistral", {"windows": (None,) * 4}),
        ("mistral", {"windows": (WINDOW + 1,) * 4}),
    ],
    ids=str,
)
def test_control(
    name: str,
    mistake: dict[str, Any],
    text_checkpoints: dict[str, Path],
    long_features: Features,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = score_of(Scorer(text_checkpoints[name], CPU), long_features)
    known = architectures.ARCHITECTURES[name]

    def wrong(config: Any) -> decoder.DecoderConfig:
        described = known.decoder(config)
        if mistake == {"rope": "default"}:
            steps = torch.arange(0, described.head_dim, 2) / described.head_dim
            plain = tuple((1 / config.rope_parameters["rope_theta"] ** steps).tolist())
            return replace(described, rope=replace(described.rope, inverse=plain))
        return replace(described, **mistake)

    monkeypatch.setitem(architectures.ARCHITECTURES, name, replace(known, decoder=wrong))
    other = score_of(Scorer(text_checkpoints[name], CPU), long_features)
    assert (np.abs(other - right) > 10 * fp32_budget(1)).all()


def test_control_queries_that_are_not_normalised(
    text_checkpoints: dict[str, Path], long_features: Features
) -> None:
    scorer = Scorer(text_checkpoints["qwen3"], CPU)
    right = score_of(scorer, long_features)
    for layer in scorer._model.language_model.layers:
        layer.self_attn.q_norm.weight.fill_(1)
    assert (np.abs(score_of(scorer, long_features) - right) > 10 * fp32_budget(1)).all()


def score_of(scorer: Scorer, item: Features) -> np.ndarray:
    (result,) = scorer.score([item])
    assert isinstance(result, Scores), result
    return result.scores


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_stretched_positions(
    scaling: dict[str, Any],
    text_checkpoints: dict[str, Path],
    tmp_path: Path,
    long_features: Features,
) -> None:
    other = changed(text_checkpoints["qwen3"], tmp_path, rope_scaling=scaling)
    oracle = TextOracle(other)
    expected = [
        oracle.score_ids(np.concatenate([long_features.prompt_ids, answer]))
        for answer in long_features.response_ids
    ]
    scores = score_of(Scorer(other, CPU), long_features)
    assert (np.abs(scores - expected) <= list(map(fp32_budget, expected))).all()
    unstretched = score_of(Scorer(text_checkpoints["qwen3"], CPU), long_features)
    assert (np.abs(scores - unstretched) > 10 * fp32_budget(1)).all()


def test_windows_of_qwen(
    text_checkpoints: dict[str, Path], tmp_path: Path, long_features: Features
) -> None:
    """Where Qwen's configuration turns them on, in the layers above `max_window_layers`."""
    fields = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
    other = changed(text_checkpoints["qwen2"], tmp_path, **fields)
    oracle = TextOracle(other)
    scores = score_of(Scorer(other, CPU), long_features)
    for score, answer in zip(scores, long_features.response_ids, strict=True):
        expected = oracle.score_ids(np.concatenate([long_features.prompt_ids, answer]))
        assert abs(score - expected) <= fp32_budget(expected)


def test_trailing_padding_is_not_scored(text_checkpoints: dict[str, Path]) -> None:
    """transformers reads its head at the last token that is not padding; so do we."""
    scorer, oracle = (make(text_checkpoints["llama"]) for make in (cpu_scorer, TextOracle))
    pad = scorer.geometry.padding_id
    assert pad is not None
    rng = np.random.default_rng(1)
    prompt = rng.integers(20, 700, 30).astype(np.int32)
    answers = [
        np.array(ids, np.int32)
        for ids in ([5, 6, 7], [5, 6, 7, pad], [5, pad, 7, pad, pad], [pad], [pad, pad])
    ]
    (result,) = scorer.score([Features(prompt, tuple(answers))])
    assert isinstance(result, Scores)
    for score, answer in zip(result.scores, answers, strict=True):
        expected = oracle.score_ids(np.concatenate([prompt, answer]))
        assert abs(score - expected) <= fp32_budget(expected)
    assert result.token_counts.tolist() == [33, 34, 35, 31, 32]
    nothing = Features(np.full(3, pad, np.int32), (np.full(2, pad, np.int32),))
    refused, fine = scorer.score([nothing, Features(prompt, tuple(answers))])
    assert isinstance(refused, Refused) and "nothing but padding" in str(refused)
    assert isinstance(fine, Scores)


def cpu_scorer(folder: Path) -> Scorer:
    return Scorer(folder, CPU)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama", {"model_type": "phi3"}, "'phi3' is not supported, only qwen2_5_vl, llama"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("qwen3", {"id2label": {"0": "a", "1": "b"}}, "2 labels"),
        ("qwen3", {"architectures": ["Qwen3ForCausalLM"]}, "this is neither.*Qwen3ForCausalLM"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "this is both"),
        ("qwen3", {"hidden_size": "64"}, "config.json: StrictDataclass.*hidden_size"),
        ("gemma2", {"pad_token_id": 1024}, "describes no model.*[Pp]adding_idx"),
        ("internlm2", {"bias": True}, "bias True"),
        ("internlm2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("internlm2", {"num_key_value_heads": 3}, "num_attention_heads modulo"),
        ("internlm2", {"num_key_value_heads": 4}, "'language_model.layers.0.self_attn.qkv_proj"),
        ("internlm2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ("internlm2", {"architectures": ["InternLM2ForCausalLM"]}, "this is neither.*CausalLM"),
        ("internlm2", {"plora_rank": 256}, "plora_rank = 256: not supported for internlm2"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    name: str,
    fields: dict[str, Any],
    words: str,
    text_checkpoints: dict[str, Path],
    tmp_path: Path,
    export: Callable[..., Exit],
) -> None:
    other = changed(text_checkpoints[name], tmp_path, **fields)
    with pytest.raises(CheckpointError, match=words):
        check_tensors(other)
    result = export("--checkpoint", other, "--output", tmp_path / "models", "--device=cpu")
    assert result.code == 1 and not (tmp_path / "models").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_configuration_is_named(
    text: str, text_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    other = changed(text_checkpoints["llama"], tmp_path)
    (other / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: no model_type"):
        check_tensors(other)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("written", [False, True])
def test_tied_embeddings(
    name: str, written: bool, text_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Small models tie the vocabulary head to the embedding; some savers write it all the same."""
    other = changed(text_checkpoints[name], tmp_path, tie_word_embeddings=True)
    file = other / "model.safetensors"
    tensors = load_file(file)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if written else {}
    tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"} | head
    save_file(tensors, file, metadata={"format": "pt"})
    ids = np.arange(20, 60, dtype=np.int32)
    expected = TextOracle(other).score_ids(ids)
    (score,) = score_of(Scorer(other, CPU), Features(ids[:9], (ids[9:],)))
    assert abs(score - expected) <= fp32_budget(expected)


def test_a_template_that_knows_the_date(
    text_checkpoints: dict[str, Path], tmp_path: Path, export: Callable[..., Exit]
) -> None:
    """Tomorrow its scores are others: the canary must not end the server then."""
    other = changed(text_checkpoints["llama"], tmp_path)
    file = other / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    fields["chat_template"] = "{{ strftime_now('%d %b %Y') }}" + fields["chat_template"]
    file.write_text(json.dumps(fields))
    result = export("--checkpoint", other, "--output", tmp_path / "models", "--device=cpu")
    assert result.code == 0 and "date" in result.stderr
    canary = json.loads((tmp_path / "models" / "reward" / "1" / "canary.json").read_text())
    assert canary["scores"] is None


def test_capped_products_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries at once where a conversation is long; the same numbers."""
    lengths = [300, 300]
    layout = attention.make_layout(lengths, True, Arena(torch.device("cpu")), torch.float32)
    q = torch.randn(600, 4, 8)
    scoring = attention.LogitRules(softcap=3.0, window=100)
    whole = attention.varlen(q, q[:, :2], q[:, :2], layout, scoring)
    shapes: list[tuple[int, ...]] = []
    capped = attention._capped

    def watch(block: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        shapes.append((*block.shape[:3], key.shape[2]))
        return capped(block, key, *rest, **options)

    monkeypatch.setattr(attention, "_capped", watch)
    monkeypatch.setattr(attention, "CAPPED_BYTES", 16 * 4 * 300 * 37)
    parts = attention.varlen(q, q[:, :2], q[:, :2], layout, scoring)
    torch.testing.assert_close(parts, whole)
    assert len(shapes) == 2 * -(-300 // 37)
    assert max(np.prod(shape) for shape in shapes) * 16 <= attention.CAPPED_BYTES


def test_every_tensor_is_accounted_for(folder: Path, tmp_path: Path) -> None:
    """A head that is missing would be random in transformers; one tensor too many is another
    model's."""
    other = changed(folder, tmp_path)
    head = "value_head.safetensors" if (other / "value_head.safetensors").exists() else ""
    file = other / (head or "model.safetensors")
    tensors = load_file(file)
    heads = {"v_head.summary.weight", "score.weight", "score.0.weight", "v_head.weight"}
    (name,) = heads & tensors.keys()
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"missing tensor '(v_head\.summary|score|score\.0)\.weight'"
    ):
        load_model(other, torch.float32, torch.device("cpu"))
    save_file(tensors | {"more.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'more.weight'"):
        check_tensors(other)


def test_compiled_layers_score_the_same(
    folder: Path, long_features: Features, end: list[int]
) -> None:
    """Norms of heads, and layers that normalise their results, are row-wise too."""
    torch.compiler.reset()
    plain, compiled = Scorer(folder, CPU), Scorer(folder, replace(CPU, compile=True))
    item = ended(long_features, end)
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled._model.compile_layers(backend=count)
    np.testing.assert_allclose(
        score_of(compiled, item), score_of(plain, item), rtol=1e-5, atol=1e-5
    )
    assert graphs
    torch.compiler.reset()


def test_the_fused_kernel_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's varlen kernel needs CUDA; that it gets window and scale is seen here."""
    seen: dict[str, Any] = {}

    def kernel(query: Any, key: Any, *_: Any, **options: Any) -> Any:
        seen.update(options, key_heads=key.shape[1])
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    lengths = [5, 3]
    layout = attention.make_layout(lengths, True, Arena(torch.device("cpu")), torch.float32)
    layout = replace(layout, kernel="varlen")
    q = torch.zeros(8, 2, 4)
    attention.varlen(q, q, q, layout, attention.LogitRules(scale=0.3, window=4))
    assert seen["scale"] == 0.3 and seen["window_size"] == (3, 0)
    attention.varlen(q, q[:, :1], q[:, :1], layout, attention.LogitRules())
    assert seen["key_heads"] == 2, "a kernel without enable_gqa needs a key head per query head"
    seen.clear()
    attention.varlen(q, q, q, layout, attention.LogitRules(softcap=9.0))
    assert seen == {}, "capped products are written out"


def changed(checkpoint: Path, folder: Path, **fields: Any) -> Path:
    """A copy with other fields in its config.json."""
    copy = Path(shutil.copytree(checkpoint, folder / "changed"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    return copy
