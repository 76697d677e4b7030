from __future__ import annotations

import io
import json
import pickle
import sys
import time

import datasets
import multiprocess
import pytest
from datasets import Dataset, Features, Image, List, Value
from datasets.fingerprint import Hasher
from PIL import Image as Pil

from tests.client.helpers import png, watched
from tests.commands import Command
from tests.fakeserver import Fault, read_log
from triward import RewardClient, ServerError, ServerUnavailable
from triward.integrations.datasets import DatasetScorer


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def client(server):
    with RewardClient(server.url, timeout=20) as client:
        yield client


@pytest.fixture
def calls(server):
    """What the server is asked."""
    return watched(server)


def said(role, content):
    return {"role": role, "content": content}


def score(client, rows, **settings):
    """The columns of scores and errors."""
    scored = Dataset.from_list(rows).map(DatasetScorer(client, **settings), batched=True)
    return scored["score"][:], scored["score_error"][:]


def test_messages(client):
    rows = [{"messages": [said("user", "q"), said("assistant", "x" * n)]} for n in (3, 1, 2)]
    assert score(client, rows, messages="messages") == ([3.0, 1.0, 2.0], ["", "", ""])


@pytest.mark.parametrize("prompt", ["q", [said("system", "s"), said("user", "q")]])
@pytest.mark.parametrize(
    ("response", "expected"),
    [("four", 4.0), (["a", "", "ccc"], [1.0, 0.0, 3.0]), ([said("assistant", "four")], 4.0)],
    ids=["str", "list of str", "messages"],
)
def test_prompt_and_responses(client, calls, prompt, response, expected):
    rows = [{"prompt": prompt, "chosen": response}]
    scorer = DatasetScorer(client, prompt="prompt", responses="chosen", score="reward")
    scored = Dataset.from_list(rows).map(scorer, batched=True)[0]
    assert (scored["reward"], scored["reward_error"]) == (expected, "")
    (call,) = calls
    messages = [said("user", "q")] if prompt == "q" else prompt
    assert json.loads(call.messages) == messages


def test_candidates_of_a_prompt_travel_together(client, calls):
    rows = [{"q": q, "r": r} for q in "ab" for r in ("x", "xx", "xxx")]
    assert score(client, rows, prompt="q", responses="r")[0] == [1.0, 2.0, 3.0] * 2
    assert [len(call.responses) for call in calls] == [3, 3]


def test_images_lead_the_first_user_message(client, calls):
    features = Features({"q": Value("string"), "r": Value("string"), "images": List(Image())})
    files = [png("red"), png("blue")]
    rows = {"q": ["q"], "r": ["r"], "images": [[{"bytes": file, "path": None} for file in files]]}
    dataset = Dataset.from_dict(rows, features)
    scorer = DatasetScorer(client, prompt="q", responses="r", images="images")
    dataset.map(scorer, batched=True)
    stored = dataset.cast_column("images", List(Image(decode=False)))
    stored.map(scorer, batched=True)
    image, text = {"type": "image"}, {"type": "text", "text": "q"}
    for call in calls:
        assert json.loads(call.messages) == [said("user", [image, image, text])]
    decoded, as_stored = calls
    assert as_stored.media == files
    pixels = [Pil.open(io.BytesIO(file)).getpixel((0, 0)) for file in decoded.media]
    assert pixels == [(255, 0, 0), (0, 0, 255)]


def test_images_fill_the_parts_that_have_none(client, calls, tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, color in zip(files, ("red", "green"), strict=True):
        file.write_bytes(png(color))
    parts = [
        {"type": "image", "image": None, "text": None},
        {"type": "image", "image": {"bytes": png("blue"), "path": None}, "text": None},
        {"type": "text", "image": None, "text": "then"},
        {"type": "image", "image": None, "text": None},
    ]
    messages = [said("user", parts), said("assistant", [{"type": "text", "text": "four"}])]
    rows = [{"messages": messages, "images": [str(file) for file in files]}]
    assert score(client, rows, messages="messages", images="images") == ([4.0], [""])
    (call,) = calls
    assert call.media == [png("red"), png("blue"), png("green")]
    image, text = {"type": "image"}, {"type": "text", "text": "then"}
    assert json.loads(call.messages) == [said("user", [image, image, text, image])]


HOLE = [{"type": "image"}, {"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"p": "q", "r": None}, "r: must be a str or a list of messages, got NoneType"),
        ({"p": None, "r": "a"}, "p: must be a str or a list of messages, got NoneType"),
        ({"p": "q", "r": []}, "r: holds 0 responses, needs at least 1"),
        ({"p": "q", "r": ["a", None]}, "response 1: "),
        ({"p": ["q"], "r": "a"}, "p: a message must be a dict, got 'q'"),
        ({"p": [{"role": "user", "content": None}], "r": "a"}, "messages[0]"),
        ({"p": "q", "r": "a", "i": [None]}, "messages[0].content[0]: "),
        ({"p": "q", "r": "a", "i": [{"bytes": None, "path": None}]}, "an image has neither"),
        ({"p": "q", "r": "a", "i": "gone.png"}, "messages[0].content[0]: cannot read 'gone.png'"),
        ({"p": [said("user", HOLE)], "r": "a", "i": []}, "1 image parts hold no image"),
        ({"p": [said("user", HOLE)], "r": "a", "i": [b"", b""]}, "1 image parts hold no image"),
        ({"p": [said("system", "s")], "r": "a", "i": b"i"}, "the row has 1 images, but no user"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why(client, row, error):
    """Straight to the scorer: a dataset could not hold all of these."""
    scorer = DatasetScorer(client, prompt="p", responses="r", images="i")
    good = {"p": "q", "r": "four", "i": None}
    rows = [good, {"i": None, **row}, good]
    scored = scorer({name: [each[name] for each in rows] for name in good})
    assert scored["score"] == [4.0, None, 4.0]
    before, wrong, after = scored["score_error"]
    assert (before, after) == ("", "")
    assert wrong.startswith(error)


def test_what_the_server_refuses_is_an_error_of_its_row(server, client):
    server.fault = lambda call: Fault.INVALID_ARGUMENT if b"bad" in call.responses else None
    rows = [{"q": str(n), "r": ["good", "bad"] if n == 7 else ["good"]} for n in range(9)]
    scorer = DatasetScorer(client, prompt="q", responses="r")
    # Small batches: the first error comes after batches without one.
    scored = Dataset.from_list(rows).map(scorer, batched=True, batch_size=3)
    assert scored["score"][:] == [[4.0]] * 7 + [None] + [[4.0]]
    assert [bool(error) for error in scored["score_error"]] == [n == 7 for n in range(9)]
    assert scored["score_error"][7].startswith("response 1: call ")


@pytest.mark.parametrize("fault", [Fault.INTERNAL, Fault.NAN, Fault.WRONG_COUNT])
def test_a_failure_of_the_server_ends_the_map(server, client, fault):
    server.fault = lambda call: fault if b"three" in call.responses else None
    rows = [{"q": "q", "r": response} for response in ("one", "two", "three")]
    with pytest.raises(ServerError):
        score(client, rows, prompt="q", responses="r")


def test_an_overloaded_server_is_waited_for(server):
    server.capacity, server.delay = 2, 0.02
    rows = [{"q": str(n), "r": "x" * n} for n in range(60)]
    with RewardClient(server.url, max_attempts=2) as client:
        scores, errors = score(client, rows, prompt="q", responses="r", concurrency=8)
    assert scores == [float(n) for n in range(60)]
    assert set(errors) == {""}
    assert server.peak <= 8
    assert server.calls > 60  # some were refused


def test_patience_ends(server):
    server.fault = lambda call: Fault.UNAVAILABLE
    rows = [{"q": str(n), "r": "r"} for n in range(1000)]
    start = time.monotonic()
    with RewardClient(server.url, max_attempts=1) as client, pytest.raises(ServerUnavailable):
        score(client, rows, prompt="q", responses="r", patience=0.1)
    assert server.calls < 1000
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes(tmp_path, method):
    log = tmp_path / "log"
    server = Command(sys.executable, "-m", "tests.fakeserver", "--log", log)
    try:
        port = server.wait_for(r"port (\d+)")[1]
        rows = [{"q": str(n), "r": "x" * n} for n in range(20)]
        before = multiprocess.get_start_method()
        multiprocess.set_start_method(method, force=True)
        with RewardClient(f"127.0.0.1:{port}", timeout=20) as client:
            assert client.score([said("user", "q"), said("assistant", "before")]) == 6.0
            scorer = DatasetScorer(client, prompt="q", responses="r")
            scored = Dataset.from_list(rows).map(scorer, batched=True, num_proc=2)
        multiprocess.set_start_method(before, force=True)
        assert scored["score"][:] == [float(n) for n in range(20)]
        assert read_log(log) == {"before": 1, **{"x" * n: 1 for n in range(20)}}
    finally:
        server.kill()


def test_a_scorer_can_be_pickled_and_its_results_cached(client):
    """Datasets know by the hash whether they have mapped this function already."""
    scorer = DatasetScorer(client, prompt="q", responses="r", patience=5)
    before = Hasher.hash(scorer)
    scorer({"q": ["q"], "r": ["r"]})
    assert Hasher.hash(scorer) == Hasher.hash(pickle.loads(pickle.dumps(scorer))) == before
    other = DatasetScorer(RewardClient("elsewhere:8001"), prompt="q", responses="r", patience=5)
    assert Hasher.hash(other) != before


@pytest.mark.parametrize(
    "names",
    [{}, {"prompt": "q"}, {"responses": "r"}, {"messages": "m", "prompt": "q", "responses": "r"}],
)
def test_columns_must_name_one_conversation(client, names):
    with pytest.raises(ValueError, match="name the column of messages"):
        DatasetScorer(client, **names)
