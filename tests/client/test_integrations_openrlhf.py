"""Queries, prompts and labels as OpenRLHF's executors pass and send them."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from tests.client.helpers import failure, raising, refused, requests
from tests.fakeserver import FakeServer
from triward import InvalidRequest, ServerError, ServerUnavailable
from triward.integrations import openrlhf
from triward.integrations.openrlhf import RewardServer, chatml, main, plain, rewards, score
from triward.rewards import RunningMoments, Shape

SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
PROMPT = SYSTEM + "<|im_start|>user\nWhat is\n1+1?<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is\n1+1?"},
]
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SHOWN = f"<|im_start|>user\n{PICTURE}{PICTURE}Same?<|im_end|>\n<|im_start|>assistant\n"


def test_what_a_reward_function_returns(client, transport):
    queries = [PROMPT + "2<|im_end|>", PROMPT + "Two.<|im_end|>", PROMPT + "It is, as ev"]
    found = rewards(client, queries, [PROMPT] * 3, ["2"] * 3)
    assert sorted(found) == ["rewards", "scores"]
    assert found["rewards"].dtype == torch.float32
    assert found["rewards"].tolist() == found["scores"].tolist() == [1.0, 4.0, 12.0]
    assert requests(transport) == [(MESSAGES, ["2", "Two.", "It is, as ev"], [])]


QUERIES = [PROMPT + "2", PROMPT + "Two.", PROMPT + "It is, as ev"]  # scored 1, 4 and 12


def test_a_shape_and_rules(client):
    asked = QUERIES, [PROMPT] * 3, [None] * 3
    shape = Shape(clip=(2, 10), weight=0.5)
    found = rewards(client, *asked, shape=shape)
    assert sorted(found) == ["rewards", "scores"]
    assert found["rewards"].tolist() == [1.0, 2.0, 5.0]
    rules = {"format": [1, None, 0], "right": [True, False, None]}
    found = rewards(
        client, *asked, shape=shape, rules=rules, weights={"format": 0.25, "right": 4.0}
    )
    assert found["rewards"].dtype == found["extra_logs"]["model"].dtype == torch.float32
    assert found["rewards"].tolist() == found["scores"].tolist() == [5.25, 2.0, 5.0]
    assert found["extra_logs"]["model"].tolist() == [1.0, 2.0, 5.0]


@pytest.mark.parametrize(
    ("rules", "weights", "message"),
    [
        ({"format": [1, 0, 1]}, None, "must name the same"),
        ({"format": [1, 0]}, {"format": 1.0}, "equally long"),
        ({"format": [1, float("nan"), 0]}, {"format": 1.0}, r"\['format'\]\[1\]: nan"),
        ({"model": [1, 0, 1]}, {"model": 1.0}, "'model' is the name"),
        (None, {"format": 1.0}, "there are no rules"),
    ],
)
def test_rules_that_do_not_fit(client, rules, weights, message):
    with pytest.raises(InvalidRequest, match=message):
        rewards(client, QUERIES, [PROMPT] * 3, [None] * 3, rules=rules, weights=weights)


def test_one_end_is_taken_off(client, transport):
    score(client, [PROMPT + "2<|im_end|><|im_end|>"], [PROMPT])
    score(client, [PROMPT + "2</s>"], [PROMPT], ends=["</s>"])
    assert [responses for _, responses, _ in requests(transport)] == [["2<|im_end|>"], ["2"]]


def test_control_tokens_inside_a_response_are_its_text(client, transport):
    response = "2<|im_end|>\n<|im_start|>user\nGreat!<|im_end|>\n<|im_start|>assistant\nThanks"
    score(client, [PROMPT + response + "<|im_end|>"], [PROMPT])
    assert requests(transport) == [(MESSAGES, [response], [])]


@pytest.mark.parametrize("encode", [json.dumps, lambda label: label])
def test_a_label_holds_messages_and_images(client, transport, tmp_path, encode):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"pixels of " + name.encode())
    images = [{"type": "image", "image": str(tmp_path / name)} for name in ("a", "b")]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": "Same?"}]}]
    # As the processor expands it: 4 tokens for the first image and 6 for the second.
    first, second = (PICTURE.replace("<|image_pad|>", "<|image_pad|>" * n) for n in (4, 6))
    query = SHOWN.replace(PICTURE + PICTURE, first + second) + "No <|image_pad|><|image_pad|>."
    assert score(client, [query], [SHOWN], [encode({"messages": messages})]) == [30.0]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]
    assert requests(transport) == [
        (
            [{"role": "user", "content": content}],
            ["No <|image_pad|><|image_pad|>."],
            [b"pixels of a", b"pixels of b"],
        )
    ]


@pytest.mark.parametrize(
    "label",
    ["2", "{2}", '{"a":' * 100_000, '{"answer": 2}', '["2"]', None, 2, {"answer": 2}],
    ids=lambda label: repr(label)[:20],
)
def test_other_labels_change_nothing(client, transport, label):
    score(client, [PROMPT + "2"], [PROMPT], [label])
    assert requests(transport)[0][0] == MESSAGES


def test_prompts_without_a_template(client, transport):
    score(client, ["1+1=2<|endoftext|>"], ["1+1="], parse=plain)
    assert requests(transport) == [([{"role": "user", "content": "1+1="}], ["2"], [])]


@pytest.mark.parametrize(
    "prompt",
    [
        "1+1=",
        "",
        "<|im_start|>assistant\n",
        PROMPT[:-1],
        "x" + PROMPT,
        "[INST] 1+1? [/INST]",
        PROMPT + "<think>\n",
        SYSTEM + "1+1?<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_what_is_not_chatml_is_an_error(client, transport, prompt):
    with pytest.raises(InvalidRequest, match=r"queries\[1\]: the prompt is not ChatML"):
        score(client, [PROMPT + "2", prompt + "2"], [PROMPT, prompt])
    assert transport.calls == []


def test_a_prompt_with_an_image_needs_its_label(client):
    with pytest.raises(InvalidRequest, match="shows an image"):
        score(client, [SHOWN + "No."], [SHOWN], ["unused"])


@pytest.mark.parametrize("query", ["", PROMPT[5:] + "2", "2"])
def test_a_query_without_its_prompt_is_an_error(client, query):
    with pytest.raises(InvalidRequest, match=r"queries\[0\]: does not begin with its prompt"):
        score(client, [query], [PROMPT])


@pytest.mark.parametrize(
    ("prompts", "labels"), [([], None), ([PROMPT] * 2, None), ([PROMPT], [1, 2])]
)
def test_lists_that_do_not_fit_are_an_error(client, prompts, labels):
    with pytest.raises(InvalidRequest, match="each query needs its prompt and label"):
        score(client, [PROMPT + "2"], prompts, labels)


def test_failures_are_no_rewards(client, transport):
    transport.reply = raising(failure("UNAVAILABLE"))
    with pytest.raises(ServerUnavailable):
        rewards(client, [PROMPT + "2"], [PROMPT], ["2"])
    transport.reply = lambda arguments: transport.result([float("inf")])
    with pytest.raises(ServerError):
        rewards(client, [PROMPT + "2"], [PROMPT], ["2"])


@pytest.fixture
def shape():
    return None


@pytest.fixture
def post(client, shape):
    """Sends a body as OpenRLHF's executor does; returns status and content."""
    with RewardServer(("127.0.0.1", 0), client, shape=shape) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def send(body, path="/get_reward", method="POST", **headers):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            response = connection.getresponse()
            content = json.loads(response.read())
            assert response.headers["Content-Type"] == "application/json"
            connection.close()
            return response.status, content

        send.port = server.server_port
        yield send
        server.shutdown()
        thread.join()


BODY = {"query": [PROMPT + "2", PROMPT + "Two."], "prompts": [PROMPT] * 2, "labels": ["2"] * 2}


def test_http_answers_with_rewards(post, transport):
    assert post(BODY) == (200, {"rewards": [1.0, 4.0]})
    assert requests(transport) == [(MESSAGES, ["2", "Two."], [])]


@pytest.mark.parametrize("shape", [Shape(running=RunningMoments(), clip=(-0.25, 9))])
def test_http_shares_a_shape(post, shape):
    """What is learnt is learnt of all trainers together."""
    deviation = 1.5 / (4.5**0.5 + 1e-4)
    assert post(BODY) == (200, {"rewards": [-0.25, pytest.approx(deviation)]})
    post(BODY)
    assert (shape.running.count, shape.running.mean) == (4, 2.5)


@pytest.mark.parametrize("clip", [["2", "1"], ["nan", "1"]])
def test_the_command_refuses_a_clip(clip, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--clip", *clip])
    assert stop.value.code == 2
    assert "lowest reward must be below the highest" in capsys.readouterr().err


def test_http_without_labels(post):
    assert post({key: BODY[key] for key in ("query", "prompts")}) == (200, {"rewards": [1.0, 4.0]})


def test_http_of_an_empty_shard(post):
    """OpenRLHF cuts a batch into as many as there are servers, and some may be empty."""
    assert post({"query": [], "prompts": [], "labels": []}) == (200, {"rewards": []})


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("INVALID_ARGUMENT", 400),
        ("INTERNAL", 502),
        ("UNAVAILABLE", 503),
        ("DEADLINE_EXCEEDED", 504),
    ],
)
def test_http_codes_of_failures(post, transport, status, code):
    transport.reply = raising(failure(status, "on purpose"))
    got, content = post(BODY)
    assert got == code == content["error"]["status"]
    assert "on purpose" in content["error"]["message"]
    assert "rewards" not in content


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        ([], "must be a JSON object"),
        ({}, "query: must be a list of str"),
        ({"query": "q", "prompts": ["p"]}, "query: must be a list of str"),
        ({"query": ["q"]}, "prompts: must be a list of str"),
        ({"query": ["q"], "prompts": [1]}, "prompts: must be a list of str"),
        ({"query": ["q"], "prompts": ["p"], "labels": "l"}, "labels: must be a list"),
        ({"query": ["q"], "prompts": []}, "1 queries, 0 prompts"),
        ({"query": ["q"], "prompts": ["p"]}, r"queries\[0\]: does not begin"),
    ],
)
def test_http_refuses_wrong_bodies(post, transport, body, message):
    status, content = post(body)
    assert status == 400
    assert re.search(message, content["error"]["message"])
    assert transport.calls == []


def test_http_bounds_the_body(post, monkeypatch):
    monkeypatch.setattr(openrlhf, "MAX_BODY_BYTES", 1000)
    assert post(BODY)[0] == 200
    status, content = post(b" " * 1001)
    assert (status, content["error"]["message"]) == (
        413,
        "the body has 1001 bytes, the limit is 1000",
    )


@pytest.mark.parametrize("length", ["-1", "1e3", "many", ""])
def test_http_needs_a_length(post, length):
    with socket.create_connection(("127.0.0.1", post.port), timeout=30) as connection:
        head = f"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 411 ")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["status"] == 411


def test_http_refuses_other_paths_and_methods(post):
    assert post(BODY, path="/")[0] == 404
    assert post(b"", method="GET") == (
        501, {"error": {"status": 501, "message": "Unsupported method ('GET')"}}
    )  # fmt: skip


def test_http_serves_many_at_once(post, transport):
    """A trainer asks for each rollout by itself."""
    together = threading.Barrier(8, timeout=30)

    def wait(arguments):
        together.wait()
        return transport.lengths(arguments)

    transport.reply = wait
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(post(BODY))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [(200, {"rewards": [1.0, 4.0]})] * 8


@contextmanager
def command(*arguments, program=("-m", "triward.integrations.openrlhf")):
    """The command's process, and its port; it is told to stop at the end, and does."""
    line = [sys.executable, *program, "--port=0", *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            found = re.fullmatch(r"listening on http://127.0.0.1:(\d+)/get_reward\n", said)
            yield process, int(found[1])
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def rewarded(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"query": ["1+1=2</s>"], "prompts": ["1+1="]}
    connection.request("POST", "/get_reward", json.dumps(body))
    try:
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def test_the_command():
    with FakeServer() as server:
        # The first reward is the mean of all so far, which is 0, and 0 is clipped.
        shape = ["--standardise", "--clip", "0.25", "0.5"]
        options = ["--end=</s>", f"--url={server.url}", "--prompts=plain", *shape]
        with command(*options) as (_, port):
            assert rewarded(port) == {"rewards": [0.25]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_what_it_has_begun(number):
    asked, answer = threading.Event(), threading.Event()

    def wait(call):
        asked.set()
        assert answer.wait(60)

    with FakeServer(fault=wait) as server, ThreadPoolExecutor(1) as threads:
        options = ["--end=</s>", f"--url={server.url}", "--prompts=plain"]
        with command(*options) as (process, port):
            reward = threads.submit(rewarded, port)
            assert asked.wait(60)
            process.send_signal(number)
            refused(port)
            answer.set()
            assert reward.result(60) == {"rewards": [1.0]}
            assert process.wait(30) == 0


# Python drops an exception that a finaliser raises; the signal arrives while one runs.
FINALISER = """
import sys, time
from triward.integrations import openrlhf

class Slow:
    def __del__(self):
        print("finalising", flush=True)
        time.sleep(2)

class Server(openrlhf.RewardServer):
    def service_actions(self):
        if not vars(self).setdefault("over", False):
            self.over = True
            Slow()

openrlhf.RewardServer = Server
openrlhf.main(sys.argv[1:])
"""


def test_a_signal_is_not_lost_in_a_finaliser():
    with command(program=("-c", FINALISER)) as (process, _):
        assert process.stdout.readline() == "finalising\n"


def test_chatml_keeps_what_text_holds():
    text = "a\n<|im_start|>\n b<|im_end|>c"
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert chatml(prompt) == [{"role": "user", "content": text}]


PAD = "<|image_pad|>"


def test_many_images_side_by_side_take_no_time(client):
    """A pattern that tried every way to share the placeholders out would not end."""
    prompt = PAD * 60 + "x"
    label = {"messages": [{"role": "user", "content": "q"}]}
    assert score(client, [PAD * 200 + "xfour"], [prompt], [label]) == [4.0]
    with pytest.raises(InvalidRequest, match="does not begin"):
        score(client, [PAD * 200 + "four"], [prompt], [label])


def test_a_label_whose_messages_are_no_list(client):
    with pytest.raises(InvalidRequest, match="must be a list"):
        score(client, ["pr"], ["p"], [{"messages": 5}])
