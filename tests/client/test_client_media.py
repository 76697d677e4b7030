from __future__ import annotations

import base64
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import triward
from triward import DeadlineExceeded, MediaError
from triward.deadline import Deadline
from triward.media import read_media

PNG = b"\x89PNG\r\n\x1a\n not an image, and not looked into \0\0"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a chart ü 100%.png"
    path.write_bytes(PNG)
    return path


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_like(kind, deadline):
    data = read_media(kind(PNG), deadline)
    assert type(data) is bytes
    assert data == PNG


def test_paths_are_sent_as_they_are_on_disk(file, deadline):
    assert read_media(str(file), deadline) == PNG
    assert read_media(file, deadline) == PNG


def test_file_urls(file, deadline):
    assert read_media(file.as_uri(), deadline) == PNG
    assert read_media(file.as_uri().replace("file://", "FILE://localhost"), deadline) == PNG
    assert read_media(f"file://{file.as_posix()}", deadline) == PNG


def test_a_relative_path(file, deadline, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert read_media(file.name, deadline) == PNG


@pytest.mark.parametrize("value", ["gone.png", "file:///gone.png", "s3://bucket/x.png", "x" * 5000])
def test_a_missing_file(value, deadline):
    with pytest.raises(MediaError, match="cannot read") as caught:
        read_media(value, deadline)
    assert len(str(caught.value)) < 300


def test_what_is_not_a_file(tmp_path, deadline):
    with pytest.raises(MediaError, match="not a regular file"):
        read_media(tmp_path, deadline)
    with pytest.raises(MediaError, match="not a path"):
        read_media("a\0b", deadline)


def test_a_pipe_does_not_block(tmp_path, deadline):
    os = pytest.importorskip("os")
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names on this system")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="not a regular file"):
        read_media(tmp_path / "pipe", deadline)


@pytest.mark.parametrize("value", [b"", "data:image/png;base64,"])
def test_empty_media(value, deadline):
    with pytest.raises(MediaError, match="0 bytes"):
        read_media(value, deadline)


@pytest.mark.parametrize("value", [None, 3, ["a.png"], object()])
def test_unknown_types(value, deadline):
    with pytest.raises(MediaError, match=type(value).__name__):
        read_media(value, deadline)


@given(st.binary(min_size=1))
def test_data_urls(data):
    text = base64.b64encode(data).decode()
    escaped = text.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    wrapped = base64.encodebytes(data).decode()
    for payload in (text, escaped, wrapped):
        for header in ("data:image/png;base64", "data:image;base64", "DATA:;Base64"):
            assert read_media(f"{header},{payload}", Deadline(30)) == data


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc",
        "data:image/png;base64",
        "data:;base64,a*==",
        "data:;base64,abcde",
        "data:;base64,YW*Jj",
    ],
)
def test_bad_data_urls(url, deadline):
    with pytest.raises(MediaError, match="data URL"):
        read_media(url, deadline)


def test_http(web, deliver, deadline):
    agents = []

    def answer(handler):
        agents.append(handler.headers["User-Agent"])
        deliver(PNG)(handler)

    assert read_media(web("/a.png", answer), deadline) == PNG
    assert agents == [f"triward/{triward.__version__}"]


def test_http_scheme_in_capitals_and_characters_to_escape(web, deliver, deadline):
    url = web("/a%20%C3%BC.png?x=1&y=%20", deliver(PNG))
    loud = url.replace("http://", "HTTP://").replace("a%20%C3%BC", "a ü")
    assert read_media(loud, deadline) == PNG


def test_http_redirect(web, deliver, deadline):
    target = web("/b.png", deliver(PNG))

    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    assert read_media(web("/a.png", answer), deadline) == PNG


def test_http_failure_names_the_status_and_hides_the_query(web, deadline):
    url = web("/gone.png?signature=secret", lambda handler: handler.send_error(404))
    with pytest.raises(MediaError, match="HTTP 404") as caught:
        read_media(url, deadline)
    assert "/gone.png" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_http_without_a_server(deadline, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as held:  # bound but not listening: a connection is refused
        held.bind(("127.0.0.1", 0))
        with pytest.raises(MediaError, match="cannot fetch"):
            read_media(f"http://127.0.0.1:{held.getsockname()[1]}/a.png", deadline)


@pytest.mark.parametrize("url", ["http://[bad/", "http://host:port/", "http://", "http://\ud800/"])
def test_http_malformed_urls(url, deadline):
    with pytest.raises(MediaError):
        read_media(url, deadline)


def test_http_broken_off(web, deliver, deadline):
    with pytest.raises(MediaError, match=f"after {len(PNG)} of {len(PNG) + 1} bytes"):
        read_media(web("/a.png", deliver(PNG, declared=len(PNG) + 1)), deadline)


def test_http_limit(web, deliver, deadline):
    url = web("/a.png", deliver(PNG))
    assert read_media(url, deadline, download_limit=len(PNG)) == PNG
    with pytest.raises(MediaError, match=f"limit of {len(PNG) - 1} bytes"):
        read_media(url, deadline, download_limit=len(PNG) - 1)


def test_http_limit_holds_for_a_body_of_unknown_length(web, deadline):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(PNG * 10)

    url = web("/a.png", answer)
    assert read_media(url, deadline) == PNG * 10
    with pytest.raises(MediaError, match=f"limit of {len(PNG)} bytes"):
        read_media(url, deadline, download_limit=len(PNG))


@pytest.mark.parametrize("header_first", [False, True])
def test_http_that_never_finishes_ends_with_the_deadline(web, header_first):
    finish = threading.Event()

    def answer(handler):
        if header_first:
            handler.send_response(200)
            handler.send_header("Content-Length", "10")
            handler.end_headers()
            handler.wfile.write(b"12345")
        finish.wait(30)

    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"timeout of 0\.2 s"):
        read_media(web("/a.png", answer), Deadline(0.2))
    assert time.monotonic() - start < 10
    finish.set()


@pytest.mark.parametrize("header_first", [False, True])
def test_http_that_drips_ends_with_the_deadline(web, header_first):
    stop = threading.Event()

    def answer(handler):
        if header_first:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
        try:
            for _ in range(240):  # each byte comes well within any socket timeout
                if stop.wait(0.05):
                    break
                handler.wfile.write(b"x")
        except OSError:
            pass

    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        read_media(web("/a.png", answer), Deadline(0.5))
    assert time.monotonic() - start < 10
    stop.set()


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e300])
def test_timeouts_that_nothing_can_wait_for(timeout):
    with pytest.raises(ValueError, match="timeout"):
        Deadline(timeout)
