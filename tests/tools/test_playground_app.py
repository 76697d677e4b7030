"""The playground's server, asked without a browser: other sites, and files that were uploaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.asking import wait_until
from triward import RewardClient

pytest.importorskip("gradio")

from starlette.testclient import TestClient

from triward_tools.playground import app, form
from triward_tools.playground.app import make_page, mounted
from triward_tools.playground.asking import Reply, Servers
from triward_tools.playground.form import Draft
from triward_tools.playground.origin import is_own
from triward_tools.playground.score import recalled
from triward_tools.playground.snippets import Exchange

DEAD = "127.0.0.1:9"


@pytest.fixture
def visit(tmp_path, monkeypatch):
    """Makes a page for a host, which asks a server that is not there."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))

    def run(host, base_url):
        web, _ = mounted(Servers(RewardClient(DEAD)), host)
        return TestClient(web, base_url=base_url)

    return run


def upload(visitor, **headers):
    files = {"files": ("a.png", b"picture")}
    return visitor.post("/gradio_api/upload", files=files, headers=headers)


class TestOtherSites:
    @pytest.mark.parametrize(
        ("host", "address"),
        [("127.0.0.1", "http://127.0.0.1:7860"), ("0.0.0.0", "http://rewards.example:7860")],
    )
    @pytest.mark.parametrize(
        "origin",
        ["https://evil.example", "null", "http://127.0.0.1:1", "http://rewards.example", ""],
    )
    def test_they_can_upload_and_ask_nothing(self, visit, tmp_path, host, address, origin):
        visitor = visit(host, address)
        headers = {"Origin": origin}
        event = {"data": [], "fn_index": 0, "session_hash": "s"}
        for answer in (
            upload(visitor, **headers),
            visitor.post("/gradio_api/queue/join", json=event, headers=headers),
            visitor.get("/config", headers=headers),
            visitor.options(
                "/gradio_api/upload", headers={**headers, "Access-Control-Request-Method": "POST"}
            ),
        ):
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        assert list(tmp_path.rglob("*.png")) == []

    @pytest.mark.parametrize(
        ("host", "address"),
        [("localhost", "http://localhost:7860"), ("0.0.0.0", "http://rewards.example")],
    )
    def test_the_page_itself_can(self, visit, host, address):
        visitor = visit(host, address)
        assert upload(visitor, Origin=address).status_code == 200
        assert upload(visitor).status_code == 200

    def test_behind_a_proxy_that_encrypts(self):
        assert is_own("https://Rewards.example:8443", "rewards.example:8443")
        assert not is_own("https://rewards.example:8443", "rewards.example")
        assert not is_own("null", "")


def test_visitors_do_not_wait_for_each_others_servers():
    limits = {
        event.fn.__name__: event.concurrency_limit
        for event in make_page(Servers(RewardClient(DEAD))).fns.values()
        if event.fn
    }
    assert (limits["score"], limits["ask"]) == (8, 8)


class TestUploadedFiles:
    def test_they_are_kept_for_hours(self):
        assert make_page(Servers(RewardClient(DEAD))).delete_cache == (600, 6 * 3600)

    def test_they_are_deleted_while_the_page_runs(self, visit, monkeypatch):
        monkeypatch.setattr(app, "SWEEP", 0.05)
        monkeypatch.setattr(form, "HOURS", 0.05 / 3600)
        with visit("0.0.0.0", "http://rewards.example") as visitor:
            (path,) = upload(visitor).json()
            wait_until(lambda: not Path(path).exists(), "the file is kept", timeout=20)

    def test_a_past_run_whose_file_is_gone(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(b"picture")
        asked = Exchange(Draft("Why?", ("a", "b"), path), Reply((1.0, 2.0), (3, 4), 5.0), DEAD, "m")
        servers = Servers(RewardClient(DEAD))
        shown = recalled(servers, asked)
        assert "2 responses in 5.0 ms" in shown[0] and str(path) in shown
        path.unlink()
        gone = recalled(servers, asked)
        assert "a.png: was deleted 6 hours after its upload; upload it again" in gone[0]
        assert len(gone) == len(shown) and str(path) not in gone
        assert "Why?" in gone  # the other fields are filled
