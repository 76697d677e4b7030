"""Reward functions and managers as verl calls them, with stand-ins for its DataProto."""

from __future__ import annotations

import asyncio
import inspect
import io
import pickle
import re
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.client.helpers import AsyncTransport, failure, png, raising, requests
from triward import AsyncRewardClient, InvalidRequest, RewardClient, ServerUnavailable
from triward.integrations import prompts, verl
from triward.rewards import RunningMoments, Shape

PROMPT = [{"role": "user", "content": "What is it?"}]
PAD = ord("#")


@dataclass
class DataProtoItem:
    batch: dict
    non_tensor_batch: dict = field(default_factory=dict)


@dataclass
class DataProto:
    """Rows of verl's DataProto: tensors with a batch dimension, and arrays of objects."""

    batch: dict
    non_tensor_batch: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.batch["responses"])

    def __getitem__(self, index):
        kind = DataProto if isinstance(index, slice) else DataProtoItem
        return kind(
            {key: value[index] for key, value in self.batch.items()},
            {key: value[index] for key, value in self.non_tensor_batch.items()},
        )


class Tokenizer:
    """Characters; 1 is the token that ends a response."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(token) for token in ids if token > 1)


def column(values):
    return np.fromiter(values, dtype=object, count=len(values))


def rollouts(responses, width=12, **columns):
    """Left-padded prompts and right-padded responses, as verl's agent loop makes them."""
    prompts = torch.tensor([[PAD, 65, 66]] * len(responses))
    tokens = [[*map(ord, response), 1] for response in responses]
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in tokens])
    mask = torch.cat([(prompts != PAD).long(), (ids != PAD).long()], dim=1)
    columns.setdefault("raw_prompt", [PROMPT] * len(responses))
    columns = {name: column(values) for name, values in columns.items()}
    return DataProto({"prompts": prompts, "responses": ids, "attention_mask": mask}, columns)


@pytest.fixture
def made(monkeypatch, transport):
    """Settings of the clients that the module made; all of them talk to the fake transport."""
    settings = []

    def make(kind, fake, *arguments, **options):
        settings.append((arguments, options))
        return kind(*arguments, **options, _transport=fake)

    waiting = AsyncTransport(transport)
    for module in (verl, prompts):
        monkeypatch.setattr(module, "RewardClient", partial(make, RewardClient, transport))
        monkeypatch.setattr(module, "AsyncRewardClient", partial(make, AsyncRewardClient, waiting))
    yield settings
    prompts._client.cache_clear()
    prompts._async_client.cache_clear()
    verl._shapes.clear()


@pytest.fixture(params=["blocking", "coroutine"])
def compute(request, made):
    """verl's call of a custom reward function, with its reward_kwargs."""
    blocking = request.param == "blocking"
    function = verl.compute_score if blocking else verl.async_compute_score
    assert inspect.iscoroutinefunction(function) is not blocking

    def call(response, extra_info, **reward_kwargs):
        found = function(
            data_source="mine",
            solution_str=response,
            ground_truth="unused",
            extra_info=extra_info,
            **reward_kwargs,
        )
        return found if blocking else asyncio.run(found)

    return call


@pytest.fixture
def run(made):
    """run_single of the reward loop's manager, for all rows at once as its worker does."""
    config = {"reward": {"reward_kwargs": {"url": "rewards:8001", "timeout": 5}}}
    manager = verl.TriwardRewardManager(
        config=config,
        tokenizer=Tokenizer(),
        compute_score=None,
        reward_router_address=None,
        reward_model_tokenizer=None,
    )

    async def all_of(data):
        rows = [manager.run_single(data[row : row + 1]) for row in range(len(data))]
        return await asyncio.gather(*rows)

    return lambda data: asyncio.run(all_of(data))


@pytest.fixture
def batch_manager(made):
    return verl.TriwardBatchRewardManager(
        tokenizer=Tokenizer(), num_examine=0, compute_score=None, reward_fn_key="data_source",
        url="rewards:8001",
    )  # fmt: skip


def parts(*content):
    return [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]


def test_a_function_scores_the_prompt_of_extra_info(compute, transport, made):
    extra_info = {"prompt": PROMPT, "index": 7, "num_turns": 2, "rollout_reward_scores": {}}
    score = compute("A cat.", extra_info, url=["a:1", "b:1"], timeout=5, sandbox_fusion_url=None)
    assert score == 6.0
    assert requests(transport) == [(PROMPT, ["A cat."], [])]
    assert made == [((("a:1", "b:1"),), {"timeout": 5})]


def test_a_function_asks_through_one_client(compute, made):
    for _ in range(3):
        compute("A cat.", {"prompt": PROMPT}, url="a:1")
    compute("A cat.", {"prompt": PROMPT}, url="b:1")
    assert [arguments for arguments, _ in made] == [("a:1",), ("b:1",)]


def test_a_function_shapes_its_score(compute, made):
    prompt = {"prompt": PROMPT}
    assert compute("A cat.", prompt, shape=Shape(clip=(0, 5), weight=0.5)) == 2.5
    assert compute("A cat.", prompt, shape={"clip": [7, 9]}) == 7.0
    assert all("shape" not in options for _, options in made)


def test_a_function_learns_over_its_calls(compute):
    """verl hands the configuration's mapping over each time, or a copy of it."""
    for response, expected in (("aa", 0.0), ("aaaa", 0.5**0.5), ("aaa", 0.0)):
        found = compute(response, {"prompt": PROMPT}, shape={"running": True})
        assert found == pytest.approx(expected, rel=1e-3)
    assert compute("aa", {"prompt": PROMPT}, shape={"running": True, "weight": 2}) == 0.0
    assert [shape.running.count for shape in verl._shapes.values()] == [3, 1]


def test_images_of_extra_info_take_their_places(compute, transport, tmp_path):
    """In the forms in which verl's datasets hold them."""
    red, green, blue = map(png, ("red", "green", "blue"))
    path = tmp_path / "green.png"
    path.write_bytes(green)
    prompt = [{"role": "user", "content": "<image>One,<image> two <image>three"}]
    images = [{"bytes": red, "path": None}, str(path), {"image": blue, "max_pixels": 50176}]
    compute("Done.", {"prompt": prompt, "images": images})
    limited = {"type": "image", "max_pixels": 50176}
    content = parts({"type": "image"}, "One,", {"type": "image"}, " two ", limited, "three")
    assert requests(transport) == [
        ([{"role": "user", "content": content}], ["Done."], [red, green, blue])
    ]


def test_a_part_keeps_the_image_that_it_holds(compute, transport):
    red, green = png("red"), png("green")
    content = parts({"type": "image", "image": red}, {"type": "image", "image": None}, "Same?")
    extra_info = {"prompt": [{"role": "user", "content": content}], "images": [b"other", green]}
    compute("No.", extra_info)
    assert requests(transport)[0][2] == [red, green]
    assert content[1]["image"] is None


def test_without_images_the_place_holder_is_text(compute, transport):
    prompt = [{"role": "user", "content": "What does <image> mean in HTML?"}]
    compute("A typo.", {"prompt": prompt, "images": None})
    assert requests(transport)[0][0] == prompt


@pytest.mark.parametrize("images", [[b"1"], [b"1", b"2", b"3"]])
def test_a_wrong_number_of_images_is_an_error(compute, images):
    prompt = [{"role": "user", "content": "<image><image>Which?"}]
    with pytest.raises(InvalidRequest, match=f"images: {len(images)} for 2 places"):
        compute("Both.", {"prompt": prompt, "images": images})


@pytest.mark.parametrize("extra_info", [None, {}, {"prompt": None}, {"question": "?"}])
def test_a_function_without_a_prompt_is_an_error(compute, transport, extra_info):
    with pytest.raises(InvalidRequest, match="extra_info: needs 'prompt'"):
        compute("A cat.", extra_info)
    assert transport.calls == []


def test_a_function_raises_what_the_client_raises(compute, transport):
    transport.reply = raising(failure("UNAVAILABLE", "busy"))
    with pytest.raises(ServerUnavailable):
        compute("A cat.", {"prompt": PROMPT})


def test_the_manager_scores_each_rollout(run, transport, made):
    assert run(rollouts(["No.", "Perhaps.", ""])) == [
        {"reward_score": 3.0, "reward_extra_info": {}},
        {"reward_score": 8.0, "reward_extra_info": {}},
        {"reward_score": 0.0, "reward_extra_info": {}},
    ]
    assert made == [((), {"url": "rewards:8001", "timeout": 5})]
    assert all(messages == PROMPT for messages, _, _ in requests(transport))


def test_the_manager_reads_the_configuration_of_older_versions(made):
    config = {"reward_model": {"reward_kwargs": {"url": "rewards:8001"}}}
    verl.TriwardRewardManager(config, Tokenizer(), None, None, None)
    assert made == [((), {"url": "rewards:8001"})]


def right(data_source, solution_str, ground_truth, extra_info, **verl):
    """A rule as verl calls it."""
    assert (data_source, extra_info) == ("mine", {"index": 3})
    return float(solution_str == ground_truth)


async def right_later(**asked):
    return {"score": right(**asked), "acc": 1}


def ruled(rule, **reward_kwargs):
    config = {"reward": {"reward_kwargs": {"url": "rewards:8001", **reward_kwargs}}}
    return verl.TriwardRewardManager(config, Tokenizer(), rule)


def answers(*responses):
    return rollouts(
        list(responses),
        data_source=["mine"] * len(responses),
        reward_model=[{"ground_truth": "No."}] * len(responses),
        extra_info=[{"index": 3}] * len(responses),
    )


@pytest.mark.parametrize("rule", [right, right_later])
def test_the_manager_mixes_a_rule_in(rule, made):
    manager = ruled(rule, rule_weight=10.0, shape={"clip": [0, 5], "weight": 0.5})
    found = [asyncio.run(manager.run_single(answers(text))) for text in ("No.", "Perhaps.")]
    assert found == [
        {"reward_score": 11.5, "reward_extra_info": {"model": 1.5, "rule": 1.0}},
        {"reward_score": 2.5, "reward_extra_info": {"model": 2.5, "rule": 0.0}},
    ]
    assert made == [((), {"url": "rewards:8001"})]


def evicted(metric):
    """The condition by which verl 0.9.1's ReplayBuffer leaves a group out."""
    return len(metric) > 1 and float(np.std(metric)) == 0.0


def test_levels_make_verls_filter_one_with_a_threshold(made):
    """A fake reward is its text's length, times the shape's weight."""
    manager = ruled(None, level_width=1.0, shape={"weight": 0.3})

    def levels(*lengths):
        found = [asyncio.run(manager.run_single(answers("x" * n))) for n in lengths]
        assert [each["reward_score"] for each in found] == pytest.approx([0.3 * n for n in lengths])
        return [each["reward_extra_info"]["level"] for each in found]

    assert levels(4, 6, 7, 20) == [1, 1, 2, 6]
    assert evicted(levels(4, 5, 6))
    for low in range(1, 9):
        assert not evicted(levels(low, low + 4)), "further apart than the width"
    mixed = ruled(right, rule_weight=10.0, level_width=2.0)
    assert asyncio.run(mixed.run_single(answers("No.")))["reward_extra_info"] == {
        "model": 3.0, "rule": 1.0, "level": 6.0
    }  # fmt: skip
    with pytest.raises(InvalidRequest, match="level_width: must be above 0 and finite, got 0"):
        ruled(None, level_width=0)


@pytest.mark.parametrize("wrong", [None, float("nan")])
def test_a_rule_without_a_reward_is_an_error(made, wrong):
    manager = ruled(lambda **asked: wrong, rule_weight=1.0)
    with pytest.raises(InvalidRequest, match=rf"components\['rule'\]\[0\]: {wrong}"):
        asyncio.run(manager.run_single(answers("No.")))


def test_without_a_weight_no_rule_is_asked(made):
    manager = ruled(right, shape={"clip": [0, 2]})
    found = asyncio.run(manager.run_single(rollouts(["No."])))
    assert found == {"reward_score": 2.0, "reward_extra_info": {}}
    with pytest.raises(InvalidRequest, match="rule_weight: there is no custom reward function"):
        ruled(None, rule_weight=1.0)


def test_a_trajectory_is_scored_by_its_last_sequence(made, transport):
    manager = verl.TriwardRewardManager({"reward": {}}, Tokenizer())
    found = asyncio.run(manager.run_single(rollouts(["First.", "The last."])))
    assert found["reward_score"] == 9.0
    assert len(transport.calls) == 1


def test_the_manager_takes_the_images_of_raw_prompt(run, transport):
    """As the dataset of verl 0.7 fills them in, with the array that the agent loop makes of it."""
    image = Image.new("RGB", (8, 8), "red")
    prompt = [{"role": "user", "content": parts({"type": "image", "image": image}, "What?")}]
    data = rollouts(["Red."])
    data.non_tensor_batch["raw_prompt"] = np.array([prompt])
    run(data)
    messages, responses, media = requests(transport)[0]
    assert messages == [{"role": "user", "content": parts({"type": "image"}, "What?")}]
    assert (responses, len(media)) == (["Red."], 1)


def of_dataset(row):
    """The `raw_prompt` that verl's RLHFDataset (0.7 to 0.9) makes of a row of a Parquet file.

    A struct gets its decoded picture beside its file, and all of it goes into the part.
    """
    content, images = [], iter(row["images"])
    for piece in re.split("(<image>)", row["prompt"][0]["content"]):
        if piece == "<image>":
            image = next(images)
            if isinstance(image, dict):
                if "bytes" in image:
                    image["image"] = Image.open(io.BytesIO(image["bytes"]))
                content.append({"type": "image", **image})
            else:
                content.append({"type": "image", "image": image})
        elif piece:
            content.append({"type": "text", "text": piece})
    return [{"role": "user", "content": content}]


def test_the_manager_takes_the_images_of_a_parquet_file(run, transport, tmp_path):
    """Each shape that the dataset lets by: a struct, one with limits, a picture, a path."""
    files = [png(color) for color in ("red", "green", "blue", "white")]
    (tmp_path / "white.png").write_bytes(files[3])
    row = {
        "prompt": [{"role": "user", "content": "<image>One,<image> two<image><image>"}],
        "images": [
            {"bytes": files[0], "path": None},
            {"bytes": files[1], "path": "green.png", "max_pixels": 50176},
            Image.open(io.BytesIO(files[2])).convert("RGB"),
            str(tmp_path / "white.png"),
        ],
    }
    prompt = of_dataset(row)
    before = repr(prompt)
    run(rollouts(["Red."], raw_prompt=[prompt]))
    assert repr(prompt) == before
    messages, _, media = requests(transport)[0]
    limited = {"type": "image", "max_pixels": 50176}
    place = {"type": "image"}
    content = parts(place, "One,", limited, " two", place, place)
    assert messages == [{"role": "user", "content": content}]
    shown = [Image.open(io.BytesIO(sent)).convert("RGB").getpixel((0, 0)) for sent in media]
    assert shown == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]


def test_parts_of_a_table_hold_their_struct(run, transport):
    """A table fills every key in; a struct without a picture beside it is read from its file."""
    empty = {"image": None, "text": None, "bytes": None, "path": None}
    content = [{**empty, "type": "image", "bytes": png()}, {**empty, "type": "text", "text": "?"}]
    run(rollouts(["Red."], raw_prompt=[[{"role": "user", "content": content}]]))
    sent = [{"role": "user", "content": parts({"type": "image"}, "?")}]
    assert requests(transport) == [(sent, ["Red."], [png()])]


def test_the_manager_takes_the_images_beside_raw_prompt(run, transport):
    """As in verl up to 0.6."""
    prompt = [{"role": "user", "content": parts({"type": "image"}, "What?")}]
    images = {"image": [Image.new("RGB", (8, 8), "red")]}
    run(rollouts(["Red."], raw_prompt=[prompt], multi_modal_data=[images]))
    assert len(requests(transport)[0][2]) == 1
    assert "image" not in prompt[0]["content"][0]


def test_an_image_without_pixels_is_an_error(run, transport):
    prompt = [{"role": "user", "content": parts({"type": "image"}, "What?")}]
    with pytest.raises(InvalidRequest, match="needs 'image'"):
        run(rollouts(["Red."], raw_prompt=[prompt]))
    assert transport.calls == []


def test_the_manager_raises_what_the_client_raises(run, transport):
    transport.reply = raising(failure("UNAVAILABLE", "busy"))
    with pytest.raises(ServerUnavailable):
        run(rollouts(["No."]))


def test_rewards_stand_at_the_last_tokens():
    data = rollouts(["No.", "Perhaps."], width=10)
    rewards = verl.TriwardRewardManager.assemble_rm_scores(data, [2.5, -1.0])
    expected = torch.zeros(2, 10)
    expected[0, 3], expected[1, 8] = 2.5, -1.0
    assert rewards.dtype == torch.float32
    assert torch.equal(rewards, expected)


def test_a_response_without_tokens_can_hold_no_reward():
    data = rollouts(["No.", "Perhaps."])
    data.batch["attention_mask"][1, 3:] = 0
    with pytest.raises(InvalidRequest, match=r"data\[1\]"):
        verl.TriwardRewardManager.assemble_rm_scores(data, [1.0, 2.0])


def test_the_batch_manager_asks_for_a_prompt_once(batch_manager, transport):
    """However its rollouts are spread over the batch."""
    other = [{"role": "user", "content": "And that?"}]
    data = rollouts(
        ["a", "bb", "ccc", "dddd"],
        raw_prompt=[PROMPT, other, PROMPT, other],
        uid=["1", "2", "1", "2"],
    )
    rewards = batch_manager(data)
    assert rewards.sum(dim=1).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert rewards[0, 1] == 1.0
    asked = sorted(requests(transport), key=str)
    assert asked == [(other, ["bb", "dddd"], []), (PROMPT, ["a", "ccc"], [])]


def test_the_batch_manager_shapes_its_scores(made, transport):
    moments = RunningMoments()
    shape = Shape(running=moments, center=False, clip=(0, 1.5))
    manager = verl.TriwardBatchRewardManager(Tokenizer(), url="rewards:8001", shape=shape)
    rewards = manager(rollouts(["a", "bbb", "ccccc"], uid=["1", "2", "1"]))
    assert rewards.sum(dim=1).tolist() == pytest.approx([0.5, 1.5, 1.5], rel=1e-3)
    assert (moments.count, moments.std) == (3, 2.0)
    assert made == [((), {"url": "rewards:8001"})]


def test_the_batch_manager_finds_the_prompt_in_extra_info(batch_manager, transport):
    data = rollouts(["a", "bb"], extra_info=[{"prompt": PROMPT}] * 2)
    del data.non_tensor_batch["raw_prompt"]
    found = batch_manager(data, return_dict=True)
    assert found["reward_tensor"].sum(dim=1).tolist() == [1.0, 2.0]
    assert found["reward_extra_info"] == {}
    assert requests(transport) == [(PROMPT, ["a", "bb"], [])]


def test_the_batch_manager_keeps_rewards_that_are_there(batch_manager, transport):
    data = rollouts(["a"])
    data.batch["rm_scores"] = torch.ones(1, 12)
    assert batch_manager(data) is data.batch["rm_scores"]
    assert batch_manager(data, return_dict=True)["reward_tensor"] is data.batch["rm_scores"]
    assert transport.calls == []


def test_the_batch_manager_raises_what_the_client_raises(batch_manager, transport):
    transport.reply = raising(failure("UNAVAILABLE", "busy"))
    with pytest.raises(ServerUnavailable):
        batch_manager(rollouts(["a", "bb"]))


def test_the_batch_manager_goes_to_a_worker():
    manager = verl.TriwardBatchRewardManager(SimpleNamespace(), url="rewards:8001")
    assert "rewards:8001" in repr(pickle.loads(pickle.dumps(manager))._client)
