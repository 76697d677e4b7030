from __future__ import annotations

import json
import os
import runpy
import sys

import pytest

import triward.cli
from triward import (
    DeadlineExceeded,
    InvalidRequest,
    MediaError,
    RewardClient,
    ServerError,
    ServerUnavailable,
    TriwardError,
)

ARGUMENTS = ["score", "--prompt", "q"]


@pytest.fixture
def made(monkeypatch, transport):
    """Arguments with which the command made its client, which gets the fake transport."""
    made = []

    def make(url, *, timeout):
        made.append((url, timeout))
        return RewardClient(url, timeout=timeout, _transport=transport)

    monkeypatch.setattr(triward.cli, "RewardClient", make)
    return made


def responses(*texts):
    return [argument for text in texts for argument in ("--response", text)]


def test_table_is_best_first(made, capsys):
    assert triward.cli.main([*ARGUMENTS, *responses("no", "longest", "four")]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["*", "7.0000", "longest"],
        ["4.0000", "four"],
        ["2.0000", "no"],
    ]
    assert err == ""
    assert made == [("localhost:8001", 60.0)]


def test_a_line_per_response_whatever_it_holds(made, capsys):
    assert triward.cli.main([*ARGUMENTS, *responses("a\nb " * 100, "")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(len(line) < 100 for line in lines)
    assert "a b a b" in lines[0]


def test_json_is_in_the_order_given(made, capsys):
    assert triward.cli.main([*ARGUMENTS, *responses("no", "longest"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"scores": [2.0, 7.0]}


def test_what_is_asked(made, transport, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(path.name.encode())
    options = ["--url", "host:1", "--timeout", "2.5", "--system", "s"]
    options += ["--image", str(paths[0]), "--image", str(paths[1])]
    assert triward.cli.main([*ARGUMENTS, *options, *responses("r")]) == 0
    assert made == [("host:1", 2.5)]
    sent = transport.sent(transport.calls[0])
    assert json.loads(sent["messages"][1][0]) == [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}],
        },
    ]
    assert sent["media"][1] == [b"a.png", b"b.png"]
    assert transport.closed == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("bad"), 2),
        (MediaError("bad"), 2),
        (ServerUnavailable("bad"), 3),
        (DeadlineExceeded("bad"), 4),
        (ServerError("bad"), 1),
        (TriwardError("bad"), 1),
    ],
)
def test_exit_codes(made, transport, capsys, error, code):
    def reply(arguments):
        raise error

    transport.reply = reply
    assert triward.cli.main([*ARGUMENTS, *responses("r")]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "triward: bad\n"
    assert transport.closed == 1


def test_a_missing_image(made, transport, capsys):
    assert triward.cli.main([*ARGUMENTS, "--image", "gone.png", *responses("r")]) == 2
    assert "gone.png" in capsys.readouterr().err
    assert transport.calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["score"],
        ARGUMENTS,
        ["score", "--response", "r"],
        [*ARGUMENTS, "--response", "r", "--timeout", "0"],
        [*ARGUMENTS, "--response", "r", "--timeout", "soon"],
    ],
)
def test_usage(made, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        triward.cli.main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err
    assert made == []


def test_a_response_that_is_no_text(made, capsys):
    undecodable = os.fsdecode(b"\xff") if os.name == "posix" else "\udcff"
    assert triward.cli.main([*ARGUMENTS, *responses(undecodable)]) == 2
    assert "responses[0]" in capsys.readouterr().err


def test_python_dash_m(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["triward", *ARGUMENTS, *responses("four"), "--json"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("triward", run_name="__main__")
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"scores": [4.0]}
