"""The playground's server, asked without a browser: other sites, and files that were uploaded."""

from __future__ import annotations

import pytest

from triward import RewardClient

pytest.importorskip("gradio")

from starlette.testclient import TestClient

from triward_tools.playground.app import mounted
from triward_tools.playground.asking import Servers
from triward_tools.playground.origin import is_own

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
