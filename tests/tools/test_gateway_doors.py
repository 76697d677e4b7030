"""Each door, asked as the project's own client asks it.

The bodies are what these make: verl's `RewardLoopWorker.compute_score_disrm` (vLLM's /classify),
OpenRLHF's `SingleTurnAgentExecutor`, LLaMA-Factory's `get_rewards_from_server`, slime's
`remote_rm`, and the examples of vLLM and SGLang.
"""

from __future__ import annotations

import base64
import json
import struct

import pytest

from tests.client.helpers import png

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.tools.gateways import MESSAGES, PROMPT, data_url, running, says, shows

OTHER = "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n"
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture
def calls(server):
    """What the server is asked: messages, responses and media of each call."""
    seen = []

    def note(call):
        texts = [response.decode() for response in call.responses]
        seen.append((json.loads(call.messages), texts, call.media))

    server.fault = note
    return seen


@pytest.fixture
def door(server):
    with running(server.url) as doorway:
        yield doorway.ask


def test_openrlhf(door, calls):
    body = {
        "query": [PROMPT + "2<|im_end|>", OTHER + "Four", PROMPT + "Two.<|im_end|>"],
        "prompts": [PROMPT, OTHER, PROMPT],
        "labels": ["2", None, "2"],
    }
    assert door("/get_reward", body) == (200, {"rewards": [1.0, 4.0, 4.0]})
    question = [{"role": "user", "content": "And 2+2?"}]
    assert sorted(calls, key=str) == [(MESSAGES, ["2", "Two."], []), (question, ["Four"], [])]
    assert door("/get_reward", {"query": [], "prompts": [], "labels": []}) == (200, {"rewards": []})


def test_openrlhf_with_an_image_in_the_label(door, calls):
    label = json.dumps({"messages": [shows(data_url(png()))]})
    prompt = f"<|im_start|>user\n{PLACE}What is it?<|im_end|>\n<|im_start|>assistant\n"
    query = prompt.replace("<|image_pad|>", "<|image_pad|>" * 4) + "Red.<|im_end|>"
    body = {"query": [query], "prompts": [prompt], "labels": [label]}
    assert door("/get_reward", body) == (200, {"rewards": [4.0]})
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert calls == [([{"role": "user", "content": content}], ["Red."], [png()])]


def test_llamafactory(door, calls):
    """It decodes prompt and response as one text, and sends a name of its own as the model's."""
    messages = [PROMPT + "2<|im_end|>", PROMPT + "Two, as ev"]
    status, answer = door("/v1/score/evaluation", {"model": "model", "messages": messages})
    assert (status, answer["scores"], answer["model"]) == (200, [1.0, 10.0], "model")
    assert calls == [(MESSAGES, ["2", "Two, as ev"], [])]


@pytest.mark.parametrize("name", ["\ud800", float("nan"), ["model"]])
def test_llamafactorys_model_is_a_name(door, calls, name):
    """Others could not be told again."""
    status, answer = door("/v1/score/evaluation", {"model": name, "messages": [PROMPT + "2"]})
    assert (status, answer["error"]["type"]) == (400, "InvalidRequest")
    assert answer["error"]["message"].startswith("model: ")
    assert not calls


@pytest.mark.parametrize("prompt", [PROMPT, MESSAGES])
def test_slime(door, calls, prompt):
    """The answer itself is the reward."""
    body = {"prompt": prompt, "response": "Two.<|im_end|>", "label": "2"}
    assert door("/remote_rm", body) == (200, 4.0)
    assert calls == [(MESSAGES, ["Two."], [])]


def test_slime_with_an_image(door, calls):
    for body in (
        {"prompt": [shows(data_url(png()))], "label": None},
        {"prompt": OTHER, "label": {"messages": [shows(data_url(png()))]}},
    ):
        assert door("/remote_rm", {**body, "response": "Red."}) == (200, 4.0)
    assert calls[0] == calls[1]
    assert calls[0][2] == [png()]


def test_vllm_classify_of_texts(door, calls):
    body = {"model": "reward", "input": [PROMPT + "2<|im_end|>\n"], "use_activation": False}
    status, answer = door("/classify", body)
    assert status == 200
    (item,) = answer["data"]
    assert item == {"index": 0, "label": "LABEL_0", "probs": [1.0], "num_classes": 1}
    assert (answer["object"], answer["model"], "usage" in answer) == ("list", "reward", False)
    assert door("/v1/classify", {"input": PROMPT + "Two."})[1]["data"][0]["probs"] == [4.0]
    assert calls == [(MESSAGES, ["2"], []), (MESSAGES, ["Two."], [])]


@pytest.mark.parametrize(
    ("path", "value"),
    [("/classify", lambda item: item["probs"][0]), ("/pooling", lambda item: item["data"][0])],
)
def test_vllm_conversations_with_images(door, calls, path, value):
    messages = [shows(data_url(png())), says("Red.")]
    status, answer = door(path, {"model": "reward", "messages": messages})
    assert (status, value(answer["data"][0])) == (200, 4.0)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert calls == [([{"role": "user", "content": content}], ["Red."], [png()])]


def test_vllm_pooling_in_base64(door):
    body = {"input": [PROMPT + "2", PROMPT + "Two."], "encoding_format": "base64"}
    data = [item["data"] for item in door("/pooling", body)[1]["data"]]
    assert [struct.unpack("<f", base64.b64decode(each))[0] for each in data] == [1.0, 4.0]


@pytest.mark.parametrize(
    ("first", "second"),
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")],
)
def test_vllm_score(door, calls, first, second):
    status, answer = door("/score", {first: "Why?", second: ["a", "bbb"]})
    assert status == 200
    assert answer["data"] == [
        {"index": 0, "object": "score", "score": 1.0},
        {"index": 1, "object": "score", "score": 3.0},
    ]
    assert calls == [([{"role": "user", "content": "Why?"}], ["a", "bbb"], [])]
    assert door("/v1/score", {first: ["p", "q"], second: ["a", "bb"]})[0] == 200
    assert {messages[0]["content"] for messages, _, _ in calls[1:]} == {"p", "q"}


def test_vllm_score_of_an_image(door, calls):
    content = shows(data_url(png()))["content"]
    body = {
        "text_1": {"content": content},
        "text_2": [{"content": [{"type": "text", "text": "ab"}]}],
    }
    assert door("/score", body)[1]["data"][0]["score"] == 2.0
    assert calls[0][2] == [png()]


def test_sglang_classify(door, calls):
    texts = [PROMPT + "2<|im_end|>\n", PROMPT + "Two.<|im_end|>\n"]
    status, answer = door("/classify", {"model": "some/path", "text": texts})
    assert (status, [item["embedding"] for item in answer]) == (200, [[1.0], [4.0]])
    assert door("/classify", {"text": texts[1]}, method="PUT")[1]["embedding"] == [4.0]
    assert calls == [(MESSAGES, ["2", "Two."], []), (MESSAGES, ["Two."], [])]


def test_sglang_images_take_their_places(door, calls):
    """As data URLs or bare base64, one or several for each text."""
    red, blue = png("red"), png("blue")
    text = f"<|im_start|>user\n{PLACE}One, {PLACE}two?<|im_end|>\n<|im_start|>assistant\nNo."
    images = [[data_url(red), base64.b64encode(blue).decode()]]
    assert door("/classify", {"text": [text], "image_data": images})[0] == 200
    place, words = {"type": "image"}, [{"type": "text", "text": text} for text in ("One, ", "two?")]
    content = [place, words[0], place, words[1]]
    assert calls == [([{"role": "user", "content": content}], ["No."], [red, blue])]
    one = text.replace(f"{PLACE}One, ", "")
    assert door("/classify", {"text": one, "image_data": data_url(red)})[0] == 200
    assert calls[1][2] == [red]
    status, answer = door("/classify", {"text": one, "image_data": [data_url(red)] * 2})
    assert (status, answer["error"]["status"]) == (400, 400)


def test_equal_prompts_are_one_request(door, calls):
    """Wherever they stand in the body."""
    body = {"input": [p + "x" * n for n, p in enumerate([PROMPT, OTHER] * 4, start=1)]}
    scores = [item["probs"][0] for item in door("/classify", body)[1]["data"]]
    assert scores == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert sorted(len(responses) for _, responses, _ in calls) == [4, 4]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/get_reward", {"query": "q", "prompts": ["p"]}, "query: must be a list of str"),
        ("/get_reward", {"query": ["q"], "prompts": ["p"]}, "queries[0]: does not begin"),
        ("/v1/score/evaluation", {"messages": []}, "messages: holds 0 texts"),
        ("/v1/score/evaluation", {"messages": ["hello"]}, "messages[0]: the text is not ChatML"),
        ("/v1/score/evaluation", {"messages": [PROMPT], "max_length": 8}, "nothing is truncated"),
        ("/remote_rm", {"prompt": PROMPT}, "response: must be a str"),
        ("/remote_rm", {"prompt": 3, "response": "a"}, "prompt: must be a str or a list"),
        ("/remote_rm", {"prompt": "plain", "response": "a"}, "the prompt is not ChatML"),
        ("/classify", {}, "input: must be a str or a list of str"),
        ("/classify", {"input": [1, 2]}, "input: must be a str or a list of str"),
        ("/classify", {"input": PROMPT, "use_activation": True}, "no probability"),
        ("/classify", {"input": PROMPT, "truncate_prompt_tokens": 5}, "nothing is truncated"),
        ("/classify", {"input": PROMPT, "chat_template": "x"}, "own template"),
        ("/classify", {"input": PROMPT.replace("1+1", PLACE)}, "places for 1 images, 0 were sent"),
        ("/classify", {"messages": [says("a")] * 2, "add_generation_prompt": True}, "template"),
        ("/classify", {"messages": ["a"]}, "must be a dict"),
        ("/classify", {"messages": [{"role": "user", "content": "a"}]}, "must be 'assistant'"),
        ("/classify", {"text": PROMPT, "input_ids": [1]}, "input_ids: only texts"),
        ("/classify", {"text": PROMPT, "image_data": 5}, "image_data: must hold str"),
        ("/pooling", {"input": PROMPT, "encoding_format": "bytes"}, "encoding_format: must be"),
        ("/pooling", {"input": PROMPT, "task": "token_classify"}, "one reward"),
        ("/pooling", {"input": PROMPT, "dimensions": 3}, "a reward has one"),
        ("/score", {"text_1": ["a"] * 2, "text_2": ["b"] * 3}, "must be 1 and N"),
        ("/score", {"text_1": "a"}, "text_2: must be texts or contents"),
        ("/score", {"text_1": [], "text_2": []}, "text_1: must be texts"),
    ],
)
def test_what_is_refused(door, calls, path, body, message):
    status, answer = door(path, body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert list(answer) == ["error"]
    assert calls == []


@pytest.mark.parametrize("path", ["/classify", "/pooling", "/score"])
def test_another_model_is_not_found(door, path):
    body = {"input": PROMPT + "a", "text_1": "a", "text_2": "b", "model": "gpt"}
    status, answer = door(path, body)
    assert (status, answer["error"]["type"]) == (404, "UnknownModel")
    assert answer["error"]["message"] == "model: 'gpt' is not served, 'reward' is"


def test_served_names(server):
    with running(server.url, models=("skywork", "other")) as doorway:
        assert doorway.send("/v1/models", method="GET")[1]["data"][0]["id"] == "skywork"
        for name in ("skywork", "other"):
            status, answer = doorway.ask("/classify", {"input": PROMPT + "a", "model": name})
            assert (status, answer["model"]) == (200, "skywork")


def test_an_error_names_the_place_that_was_sent(door):
    """Not its place in the order in which prompts are asked for."""
    bad = [{"role": "user", "content": [{"type": "image"}]}]
    labels = [None, None, None, {"messages": bad}, None]
    prompts = [PROMPT, OTHER, PROMPT, OTHER, OTHER]
    body = {"query": [prompt + "a" for prompt in prompts], "prompts": prompts, "labels": labels}
    status, answer = door("/get_reward", body)
    assert status == 400
    assert answer["error"]["message"].startswith("conversations[3]: ")
