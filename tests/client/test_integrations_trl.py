"""What TRL's trainers pass to reward functions, as their `_calculate_rewards` does."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.client.helpers import AsyncTransport, failure, png, raising, requests
from triward import AsyncRewardClient, InvalidRequest, RewardClient, ServerError, ServerUnavailable
from triward.integrations.trl import TriwardReward, async_triward_reward
from triward.rewards import RunningMoments, Shape


@pytest.fixture(params=["blocking", "asyncio"])
def reward(request, client, transport):
    """Calls a reward function with the keyword arguments that TRL passes."""
    trainer = {"trainer_state": SimpleNamespace(global_step=1), "log_extra": print}

    def blocking(given=None, **batch):
        return TriwardReward(client, shape=given)(**batch, completion_ids=[[1]], **trainer)

    def coroutine(given=None, **batch):
        asked = AsyncRewardClient(_transport=AsyncTransport(transport))
        asking = async_triward_reward(asked, shape=given)
        return asyncio.run(asking(**batch, completion_ids=[[1]], **trainer))

    return blocking if request.param == "blocking" else coroutine


def user(content):
    return [{"role": "user", "content": content}]


def says(text):
    return [{"role": "assistant", "content": text}]


def shows(image, text="What is it?"):
    return user([{"type": "image", "image": image}, {"type": "text", "text": text}])


def test_a_group_is_one_request(reward, transport):
    prompts = [user("1+1?")] * 4 + [user("2+2?")] * 4
    completions = [says("x" * n) for n in range(8)]
    assert reward(prompts=prompts, completions=completions, answer=["2"] * 8) == list(range(8))
    assert sorted(requests(transport), key=str) == [
        (user("1+1?"), ["", "x", "xx", "xxx"], []),
        (user("2+2?"), ["xxxx", "xxxxx", "xxxxxx", "xxxxxxx"], []),
    ]


def test_a_shape_makes_rewards_of_scores(reward):
    """Also where the dataset has columns of the arguments' names."""
    moments = RunningMoments()
    batch = {"prompts": ["?"] * 3, "completions": ["a", "aaa", "aaaaa"], "shape": [1, 2, 3]}
    given = Shape(running=moments, clip=(-0.5, 9), weight=3)
    assert reward(given, **batch, client=[1, 2, 3]) == pytest.approx([-1.5, 0, 3], rel=1e-3)
    assert (moments.count, moments.mean, moments.std) == (3, 3.0, 2.0)
    assert reward(given, prompts=["?"], completions=["aaa"]) == [0.0]
    assert moments.count == 4


def test_a_failure_teaches_a_shape_nothing(reward, transport):
    moments = RunningMoments()
    transport.reply = lambda arguments: transport.result([1.0, float("nan")])
    with pytest.raises(ServerError):
        reward(Shape(running=moments), prompts=["?"] * 2, completions=["a", "b"])
    assert moments.count == 0


def test_standard_datasets_are_plain_text(reward, transport):
    rewards = reward(prompts=["The sky is"] * 2, completions=[" blue.", " green."])
    assert rewards == [6.0, 7.0]
    assert requests(transport) == [(user("The sky is"), [" blue.", " green."], [])]


def test_decoded_copies_of_an_image_are_one_image(reward, transport):
    """`datasets` decodes the image anew for each of the group's rows."""
    red, blue = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    prompts = [shows(red), shows(red.copy()), shows(blue), shows(blue.copy())]
    assert reward(prompts=prompts, completions=[says("a"), says("bb")] * 2) == [1.0, 2.0] * 2
    one, other = requests(transport)
    wire = user([{"type": "image"}, {"type": "text", "text": "What is it?"}])
    assert one[:2] == other[:2] == (wire, ["a", "bb"])
    assert len({*one[2], *other[2]}) == len(one[2]) + len(other[2]) == 2


def test_the_columns_with_images_are_in_the_prompt_already(reward, transport):
    image = Image.new("RGB", (32, 32))
    reward(prompts=[shows(image)], completions=[says("a")], images=[[image]])
    assert len(requests(transport)[0][2]) == 1


def online_dpo(batch):
    """What OnlineDPO's `training_step` passes: two completions a prompt, columns repeated."""
    prompts = batch.pop("prompt")
    for message in (message for prompt in prompts for message in prompt):
        if isinstance(message["content"], str) and message["role"] in ("user", "system"):
            place = [{"type": "image"}] if message["role"] == "user" else []
            message["content"] = [*place, {"type": "text", "text": message["content"]}]
    return {"prompts": 2 * prompts, **{key: column * 2 for key, column in batch.items()}}


def test_places_are_filled_from_the_column(reward, transport):
    red, blue = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    system = {"role": "system", "content": "Be brief."}
    prompts = [[system, *user("What is it?")], user("And that?")]
    asked = online_dpo({"prompt": prompts, "image": [red, blue]})
    before = repr(asked)
    rewards = reward(**asked, completions=[says("x" * n) for n in range(4)])
    assert rewards == [0.0, 1.0, 2.0, 3.0]
    assert repr(asked) == before
    found = {sent[1][0]: (sent[0][-1]["content"], len(sent[2])) for sent in requests(transport)}
    places = [
        [{"type": "image"}, {"type": "text", "text": text}] for text in ("What is it?", "And that?")
    ]
    assert [found["x" * n] for n in range(4)] == [(places[n % 2], 1) for n in range(4)]


def test_places_of_several_images(reward, transport):
    """Also from the structs of a dataset that is not decoded; copies are still one request."""
    red, blue = png("red"), png("blue")
    rows = [[{"bytes": red, "path": None}, {"bytes": blue, "path": None}] for _ in range(2)]
    content = [{"type": "image"}, {"type": "image", "image": None}, {"type": "text", "text": "?"}]
    reward(prompts=[user(content)] * 2, completions=[says("a"), says("bb")], images=rows)
    wire = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    assert requests(transport) == [(user(wire), ["a", "bb"], [red, blue])]


def test_images_without_a_place_begin_the_prompt(reward, transport):
    """As TRL's own `prepare_multimodal_messages` puts them."""
    reward(prompts=[user("?"), "?"], completions=[says("a"), "b"], images=[[png()], [png()]])
    wire = user([{"type": "image"}, {"type": "text", "text": "?"}])
    assert requests(transport) == [(wire, ["a", "b"], [png()])]


@pytest.mark.parametrize("column", [{"image": [None, None]}, {"images": [[], None]}])
def test_rows_without_images_are_text(reward, transport, column):
    reward(prompts=[user("?")] * 2, completions=[says("a"), says("b")], **column)
    assert requests(transport) == [(user("?"), ["a", "b"], [])]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"images": [[b"1"]]}, "2 image parts hold no image, the row has 1 for them"),
        ({"images": [[b"1"] * 3]}, "2 image parts hold no image, the row has 3 for them"),
        ({"image": [None]}, "an image part needs 'image'"),
        ({"image": [b"1"] * 2}, "image: 2 rows for 1 prompts"),
        ({}, "an image part needs 'image'"),
    ],
)
def test_places_that_cannot_be_filled_are_an_error(reward, transport, column, message):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    with pytest.raises(InvalidRequest, match=message):
        reward(prompts=[user(content)], completions=[says("a")], **column)
    assert transport.calls == []


def test_prompts_are_left_as_they_are(reward):
    image = Image.new("RGB", (8, 8))
    prompts, completions = [shows(image)] * 2, [says("a"), says("b")]
    before = repr((prompts, completions))
    reward(prompts=prompts, completions=completions)
    assert repr((prompts, completions)) == before


@pytest.mark.parametrize(
    ("code", "expected"), [("UNAVAILABLE", ServerUnavailable), ("INTERNAL", ServerError)]
)
def test_a_failure_is_no_reward(reward, transport, code, expected):
    transport.reply = raising(failure(code))
    with pytest.raises(expected, match=r"conversations\[0\]"):
        reward(prompts=[user("?")] * 2, completions=[says("a"), says("b")])


def test_not_a_number_is_no_reward(reward, transport):
    transport.reply = lambda arguments: transport.result([float("nan")])
    with pytest.raises(ServerError):
        reward(prompts=[user("?")], completions=[says("a")])


def test_a_completion_without_text_is_no_reward(reward):
    """What is left of a rollout that ends in a tool call."""
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    with pytest.raises(InvalidRequest, match=r"conversations\[1\]"):
        reward(prompts=[user("?")] * 2, completions=[says("a"), call])


def test_what_trl_asks_of_a_reward_function():
    """It tells coroutine functions apart and logs names with exactly these."""
    blocking = TriwardReward(RewardClient("rewards:1"))
    assert not inspect.iscoroutinefunction(blocking)
    assert blocking.__name__ == "triward"
    assert TriwardReward(RewardClient("rewards:1"), name="helpful").__name__ == "helpful"
    coroutine = async_triward_reward(AsyncRewardClient("rewards:1"))
    assert inspect.iscoroutinefunction(coroutine)
    assert coroutine.func.__name__ == "async_triward"


def test_reward_functions_can_be_pickled():
    blocking = pickle.loads(pickle.dumps(TriwardReward(RewardClient("rewards:1"), name="helpful")))
    assert (blocking.__name__, "rewards:1" in repr(blocking.client)) == ("helpful", True)
    shape = Shape(clip=(-1, 1))
    shaped = pickle.loads(pickle.dumps(TriwardReward(RewardClient("rewards:1"), shape=shape)))
    assert shaped.shape == shape
    coroutine = pickle.loads(pickle.dumps(async_triward_reward(AsyncRewardClient("rewards:1"))))
    assert inspect.iscoroutinefunction(coroutine)
