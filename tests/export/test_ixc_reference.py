"""The restatement of IXC-2.5-Reward: its parts against other code, and mistakes that must show."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from tests.conversations import Messages, image, picture, says, user
from triward_server.export.ixc_network import Mistake
from triward_server.export.ixc_pictures import image_canvas, whole_and_tiles
from triward_server.export.ixc_reference import IxcOracle
from triward_server.export.reference import fp32_budget

TILE, SIDE = 56, 2
TOWER = "vit.vision_tower.vision_model."


@pytest.fixture(scope="module")
def oracle(ixc_checkpoint: Path) -> IxcOracle:
    return IxcOracle(ixc_checkpoint)


def show(width: int, height: int, seed: int = 0, **options: int) -> dict[str, Any]:
    return image(picture(width, height, seed), **options)


# Each has something that at least one mistake gets wrong.
CASES: dict[str, Messages] = {
    "text": [user("Is purple the highest value?"), says("It is.")],
    "wide": [user(show(300, 200, 1), "What is shown?"), says("A chart.")],
    "tall": [user(show(100, 400, 2), "What is shown?"), says("Bars.")],
    "24 tiles": [user(show(400, 300, 3, hd_num=24), "What?"), says("A gradient.")],
    "two": [
        user(show(300, 200, 1), show(200, 300, 2), "Image1 <ImageHere>; Image2 <ImageHere>; both?"),
        says("They differ."),
    ],
}
SHOWN_BY: dict[Mistake, set[str]] = {
    "plora on text": {*CASES},
    "plora off": {*CASES} - {"text"},
    "separators missing": {*CASES} - {"text"},
    "tiles in column order": {"wide", "24 tiles", "two"},
    "post_layernorm applied": {*CASES} - {"text"},
    "wqkv as plain blocks": {*CASES},
    "bilinear without antialias": {*CASES} - {"text"},
    "BOS before the text": {"wide", "tall", "24 tiles"},
}


@pytest.mark.parametrize("mistake", get_args(Mistake))
def test_a_mistake_moves_scores(mistake: Mistake, ixc_checkpoint: Path, oracle: IxcOracle) -> None:
    """A hundred budgets away wherever it can; elsewhere the score is the same."""
    wrong = IxcOracle(ixc_checkpoint, mistake)
    for name, messages in CASES.items():
        right, moved = oracle.score(messages), wrong.score(messages)
        if name in SHOWN_BY[mistake]:
            assert abs(moved - right) > 100 * fp32_budget(right), name
        else:
            assert moved == pytest.approx(right, abs=1e-5), name


def test_a_streamed_decoder_is_the_same(ixc_checkpoint: Path, oracle: IxcOracle) -> None:
    assert IxcOracle(ixc_checkpoint, streamed=True).score(CASES["two"]) == oracle.score(
        CASES["two"]
    )


def llama(oracle: IxcOracle, pictured: bool) -> LlamaModel:
    """InternLM2 is Llama once wqkv is cut; for pictures alone, with each LoRA folded in."""
    config, tensors = oracle.network.config, oracle.network._tensors
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "rms_norm_eps", "vocab_size")  # fmt: skip
    model = LlamaModel(
        LlamaConfig(
            **{field: config[field] for field in fields},
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        )
    )

    def weight(name: str) -> Tensor:
        low = tensors[f"{name}.Plora_B.weight"] @ tensors[f"{name}.Plora_A.weight"]
        return tensors[f"{name}.weight"] + low * pictured

    state = {
        "embed_tokens.weight": tensors["model.tok_embeddings.weight"],
        "norm.weight": tensors["model.norm.weight"],
    }
    for number in range(config["num_hidden_layers"]):
        theirs, ours = f"layers.{number}", f"model.layers.{number}"
        groups = weight(f"{ours}.attention.wqkv").unflatten(0, (2, 6, 16))
        attention = groups[:, :4], groups[:, 4:5], groups[:, 5:6]
        for letter, part in zip("qkv", attention, strict=True):
            state[f"{theirs}.self_attn.{letter}_proj.weight"] = part.flatten(0, 2)
        state |= {
            f"{theirs}.self_attn.o_proj.weight": weight(f"{ours}.attention.wo"),
            f"{theirs}.mlp.gate_proj.weight": weight(f"{ours}.feed_forward.w1"),
            f"{theirs}.mlp.up_proj.weight": weight(f"{ours}.feed_forward.w3"),
            f"{theirs}.mlp.down_proj.weight": weight(f"{ours}.feed_forward.w2"),
            f"{theirs}.input_layernorm.weight": tensors[f"{ours}.attention_norm.weight"],
            f"{theirs}.post_attention_layernorm.weight": tensors[f"{ours}.ffn_norm.weight"],
        }
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("pictured", [False, True])
def test_the_decoder_is_llama_without_pictures_and_with_nothing_else(
    pictured: bool, oracle: IxcOracle
) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 128, generator=generator)
    mask = torch.full((50,), pictured)
    with torch.inference_mode():
        states = llama(oracle, pictured)(inputs_embeds=embeddings[None]).last_hidden_state
        expected = float(states[0, -1] @ oracle.network._tensors["score.weight"][0])
    score = oracle.network.score(embeddings, mask)
    assert abs(score - expected) <= fp32_budget(expected)  # folding rounds


def test_the_decoder_reads_what_stands_before_the_last_token(oracle: IxcOracle) -> None:
    """A picture's rows go through their LoRA, the text's do not, in one sequence."""
    embeddings = torch.randn(12, 128, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12) < 5
    scores = {
        oracle.network.score(embeddings, m)
        for m in (mask, ~mask, mask.clone().fill_(False), mask.clone().fill_(True))
    }
    assert len(scores) == 4


def test_a_canvas_becomes_vectors_in_their_order(oracle: IxcOracle, ixc_checkpoint: Path) -> None:
    """Position by position, with loops, from transformers' own tower."""
    canvas = image_canvas(picture(130, 60, 2), 6, TILE)
    rows, columns = canvas.shape[0] // TILE, canvas.shape[1] // TILE
    tensors = oracle.network._tensors
    vision = json.loads((ixc_checkpoint / "config.json").read_text())["vision_config"]
    tower = CLIPVisionModel(CLIPVisionConfig(**vision)).eval()
    tower.load_state_dict({n.removeprefix(TOWER): tensors[n] for n in tensors.names if TOWER in n})
    with torch.inference_mode():
        out = tower(whole_and_tiles(canvas, TILE), output_hidden_states=True)
    features = out.hidden_states[-1][:, 1:].unflatten(1, (4, 4))
    assert not torch.equal(out.hidden_states[-1][:, 0], out.pooler_output)

    def token(image: int, row: int, column: int) -> Tensor:
        cells = product((2 * row, 2 * row + 1), (2 * column, 2 * column + 1))
        return torch.cat([features[image, y, x] for y, x in cells])

    sub, separator = tensors["plora_sub_GN"].flatten(), tensors["plora_glb_GN"].flatten()
    expected = []
    for row in range(SIDE):
        expected += [token(0, row, column) for column in range(SIDE)] + [sub]
    expected.append(separator)
    for row in range(rows * SIDE):
        for column in range(columns * SIDE):
            tile = 1 + row // SIDE * columns + column // SIDE
            expected.append(token(tile, row % SIDE, column % SIDE))
        expected.append(sub)
    hidden = torch.stack(expected) @ tensors["vision_proj.0.weight"].T
    hidden = functional.gelu(hidden + tensors["vision_proj.0.bias"])
    wanted = hidden @ tensors["vision_proj.2.weight"].T + tensors["vision_proj.2.bias"]
    torch.testing.assert_close(oracle.network.embed_canvas(canvas), wanted, rtol=1e-4, atol=1e-4)


def test_where_pictures_stand(oracle: IxcOracle) -> None:
    place, tokens = oracle.placeholder, oracle.tokenizer
    opening = tokens.ids["[UNUSED_TOKEN_146]"]
    one = show(56, 56)
    in_front = oracle.inputs([user("Look.", one, " What?"), says("Bars.")])
    assert in_front.ids[:15] == [1, *[place] * 13, opening]
    inside = oracle.inputs(
        [user(one, "Look: <ImageHere>"), says("A <ImageHere>."), user("?"), says("<ImageHere>")]
    )
    before = [1, opening, *tokens.plain("user\nLook: ")]
    assert inside.ids[: len(before) + 14] == [
        *before,
        *[place] * 13,
        tokens.ids["[UNUSED_TOKEN_145]"],
    ]
    assert inside.ids.count(place) == 13, "what an assistant says holds no place"
    two = oracle.inputs([user(one, one, "<ImageHere><ImageHere>"), says("")])
    assert two.ids.count(place) == 26


def test_several_pictures_have_six_tiles_at_most(oracle: IxcOracle) -> None:
    large = show(1000, 1000, hd_num=24)
    alone = oracle.inputs([user(large), says("")]).canvases[0]
    assert alone.shape == (4 * TILE, 4 * TILE, 3)
    several = oracle.inputs([user(large, large, "<ImageHere><ImageHere>"), says("")]).canvases
    assert {canvas.shape for canvas in several} == {(2 * TILE, 2 * TILE, 3)}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([user(show(9, 9), show(9, 9), "both?")], "0 times <ImageHere> for 2 pictures"),
        ([user("<ImageHere>"), says("")], "1 times <ImageHere> for 0 pictures"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role is 'tool'"),
    ],
)
def test_what_does_not_fit_is_refused(messages: Messages, words: str, oracle: IxcOracle) -> None:
    with pytest.raises(ValueError, match=words):
        oracle.score(messages)


def test_no_more_tokens_than_the_model_takes(oracle: IxcOracle) -> None:
    ids = [1, *[500] * 16_384]
    with pytest.raises(ValueError, match="16385 tokens, the limit is 16384"):
        oracle.score_inputs(ids, [])
    canvas = np.zeros((TILE, TILE, 3), np.uint8)
    with pytest.raises(ValueError, match="12 placeholders for 13 vectors"):
        oracle.score_inputs([1, *[oracle.placeholder] * 12, 5], [canvas])
