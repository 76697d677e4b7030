"""What the tabs of files and of comparisons answer, without a browser."""

from __future__ import annotations

import re
from html import unescape

import pytest

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

    @pytest.mark.parametrize("gone", "AB")
    def test_a_side_that_fails_is_the_clients_sentence(self, servers, gone):
        chosen = {"A": (servers.urls[0], ""), "B": (servers.urls[1], ""), gone: (DEAD, "")}
        page = compared(servers, Draft("q", TEXTS), list(chosen.values()))
        with RewardClient(DEAD) as dead, pytest.raises(ServerUnavailable) as caught:
            dead.score_responses([{"role": "user", "content": "q"}], TEXTS)
        assert f'role="alert">{gone}, reward at {DEAD}: {caught.value}</p>' in unescape(page)
        left = "B" if gone == "A" else "A"
        assert self.scores(page, left) == [4, 1, 7] and self.scores(page, gone) == []

    def test_another_server_cannot_be_asked(self, servers):
        page = compared(servers, Draft("q", TEXTS), [("elsewhere:1", ""), ("", "")])
        assert "server: must be one of" in page and self.scores(page, "B") == [4, 1, 7]
