"""What the tabs of files and of comparisons answer, without a browser."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from html import unescape
from uuid import uuid4

import pytest

from tests.commands import BIN, Command
from tests.fakeserver import FakeServer
from tests.rowfiles import write_rows
from triward import RewardClient, ServerUnavailable

pytest.importorskip("gradio")

from triward_tools.playground.asking import Servers
from triward_tools.playground.compare import compared
from triward_tools.playground.files import opened
from triward_tools.playground.form import Draft
from triward_tools.playground.gallery import Gallery

DEAD = "127.0.0.1:9"
TEXTS = ("four", "a", "seven!!")


@pytest.fixture
def page():
    """Address of a playground that knows no server."""
    command = Command(BIN / "triward", "playground", "--url", DEAD)
    try:
        yield command.wait_for(r"^playground at (http://\S+)$")[1]
    finally:
        command.kill()


class TestForgedEvents:
    """A visitor may post any path as a file, whether it was uploaded or not."""

    def test_a_path_that_was_not_uploaded_is_refused(self, page, tmp_path):
        path = write_rows(tmp_path / "secret.jsonl", [{"score": 1}])
        inside = socket.create_server(("127.0.0.1", 0))  # of this machine, which has no public one
        inside.setblocking(False)
        url = f"http://127.0.0.1:{inside.getsockname()[1]}/secret.jsonl"
        config = json.loads(urllib.request.urlopen(f"{page}/config", timeout=30).read())
        kinds = {each["id"]: each["type"] for each in config["components"]}
        values = {"textbox": "a", "dropdown": DEAD}
        found = 0
        for event in config["dependencies"]:
            fields = [kinds[field] for field in event["inputs"]]
            if "file" not in fields:
                continue
            found += 1
            for file, taken in ((forged(path), False), (forged(url), False), (None, True)):
                data = [file if kind == "file" else values.get(kind) for kind in fields]
                answer = self.post(page, event["id"], data)
                assert answer["success"] is taken, (fields, answer)
        assert found >= 5  # the preview of two tabs, the file with scores, Score and Compare
        with inside, pytest.raises(BlockingIOError):
            inside.accept()

    def post(self, page, number, data):
        """The end of an event."""
        session = uuid4().hex
        body = json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{page}/gradio_api/queue/join", body, headers)
        urllib.request.urlopen(asked, timeout=30).close()
        stream = f"{page}/gradio_api/queue/data?session_hash={session}"
        with urllib.request.urlopen(stream, timeout=30) as lines:
            for line in lines:
                if b"process_completed" in line:
                    return json.loads(line.removeprefix(b"data: "))
        raise AssertionError("the stream ended before the event")


def forged(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


class TestFiles:
    def test_no_file_is_an_empty_page(self):
        assert opened(None, "", Gallery()) == ""

    def test_a_file(self, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", [{"score": 1.25}, {"reward": [2.0]}])
        assert "<dt>with scores</dt><dd>1</dd>" in opened(str(path), "", Gallery())
        page = opened(str(path), " reward ", Gallery())
        assert "holds no score: needs reward, has score" in page

    def test_a_file_that_cannot_be_read_is_a_sentence(self, tmp_path):
        path = write_rows(tmp_path / "<b>.jsonl", [])
        assert opened(str(path), "", Gallery()) == (
            '<p class="tw-said" role="alert">&lt;b&gt;.jsonl: holds no row</p>'
        )


class TestCompare:
    @pytest.fixture
    def servers(self):
        """Two servers that live, and an address where nothing listens."""
        with FakeServer() as first, FakeServer() as second:
            servers = Servers(RewardClient([first.url, second.url, DEAD], timeout=20))
            yield servers
            servers.close()

    def scores(self, page, side):
        return [
            float(found)
            for found in re.findall(rf'data-side="{side}">.*?<strong>([\d.]+)</strong>', page)
        ]

    def test_two_servers_and_two_models(self, servers):
        first, second, _ = servers.urls
        page = compared(servers, Draft("q", TEXTS), [(first, ""), (second, " other ")])
        assert f"A, reward at {first}" in page and f"B, other at {second}" in page
        assert self.scores(page, "A") == self.scores(page, "B") == [4, 1, 7]
        assert "Both rank the responses alike." in page
        assert "both order 3 alike and 0 the other way round" in page
        assert "Both were asked at once" in page

    @pytest.mark.parametrize("gone", "AB")
    def test_a_side_that_fails_is_the_clients_sentence(self, servers, gone):
        chosen = {"A": (servers.urls[0], ""), "B": (servers.urls[1], ""), gone: (DEAD, "")}
        page = compared(servers, Draft("q", TEXTS), list(chosen.values()))
        with RewardClient(DEAD) as dead, pytest.raises(ServerUnavailable) as caught:
            dead.score_responses([{"role": "user", "content": "q"}], TEXTS)
        alerts = re.findall('role="alert">(.*?)</p>', unescape(page))
        assert alerts == [f"{gone}, reward at {DEAD}: {caught.value}"]
        left = "B" if gone == "A" else "A"
        assert self.scores(page, left) == [4, 1, 7] and self.scores(page, gone) == []
        assert "Both were asked at once" not in page

    def test_another_server_cannot_be_asked(self, servers):
        page = compared(servers, Draft("q", TEXTS), [("elsewhere:1", ""), ("", "")])
        assert "server: must be one of" in page and self.scores(page, "B") == [4, 1, 7]
