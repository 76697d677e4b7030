from __future__ import annotations

import io
import json
import os
import runpy
import sys
from types import SimpleNamespace

import pytest

import triward.cli
from triward import (
    DeadlineExceeded,
    InvalidRequest,
    MediaError,
    RewardClient,
    ServerError,
    ServerUnavailable,
    Tls,
    TriwardError,
)

ARGUMENTS = ["score", "--prompt", "q"]


@pytest.fixture
def made(monkeypatch, transport):
    """Arguments with which the command made its client, which gets the fake transport."""
    made = []

    def make(url, **settings):
        made.append((url, settings))
        return RewardClient(url, **settings, _transport=transport)

    monkeypatch.setattr(triward.cli, "RewardClient", make)
    return made


def responses(*texts):
    return [argument for text in texts for argument in ("--response", text)]


def defaults(**settings):
    return {
        "timeout": 60.0,
        "model": "reward",
        "tls": None,
        "headers": {},
        "wait_ready": 0.0,
        "routing": "round_robin",
        **settings,
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a" * 30, "a" * 13 + "…"),
        ("a" * 14, "a" * 14),
        ("\u6587" * 30, "\u6587" * 6 + "…"),  # two columns each
        ("e\u0301" * 14, "e\u0301" * 14),  # an accent takes none
        ("red\x1b[31m \n\tand more", "red[31m and m…"),
    ],
)
def test_a_row_is_one_line_of_the_terminal(made, capsys, monkeypatch, text, shown):
    monkeypatch.setenv("COLUMNS", "42")
    assert triward.cli.main([*ARGUMENTS, *responses(text)]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.rpartition("000  ")[2] == shown


def test_table_is_best_first(made, capsys):
    assert triward.cli.main([*ARGUMENTS, *responses("no", "longest", "four")]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["rank", "response", "score", "text"],
        ["*", "1", "1", "7.0000", "longest"],
        ["2", "2", "4.0000", "four"],
        ["3", "0", "2.0000", "no"],
    ]
    assert err == ""
    assert made == [("localhost:8001", defaults())]


def test_a_line_per_response_whatever_it_holds(made, capsys):
    assert triward.cli.main([*ARGUMENTS, *responses("a\nb " * 100, "[red]x[/red]")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines)
    assert "a b a b" in lines[1]
    assert "[red]x[/red]" in lines[2]


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
    assert made == [("host:1", defaults(timeout=2.5))]
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
        (ServerError("bad"), 5),
        (TriwardError("bad"), 5),
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
        ["rank", "--prompt", "q"],
        ["compare", "--prompt", "q", "--a", "x"],
        ["compare", "--a", "x", "--b", "y"],
        ["score", "--input", "f.jsonl", "--prompt", "q"],
        ["health", "--url", "http://host:1"],
        ["health", "--wait-ready", "-1"],
        ["health", "--tls-key", "only.key"],
        ["health", "--header", "no colon"],
        ["score", "--input", "f.jsonl", "--concurrency", "0"],
        [*ARGUMENTS, "--response", "r", "--timeout", "0"],
        [*ARGUMENTS, "--response", "r", "--timeout", "soon"],
    ],
)
def test_usage(made, transport, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        triward.cli.main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err
    assert transport.calls == []


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


def test_rank(made, capsys):
    arguments = ["rank", "--prompt", "q", *responses("no", "longest", "four"), "--json"]
    assert triward.cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ranking": [1, 2, 0],
        "scores": [2.0, 7.0, 4.0],
    }


@pytest.mark.parametrize(("a", "b", "code"), [("long", "no", 0), ("no", "long", 1), ("x", "y", 1)])
def test_compare(made, capsys, a, b, code):
    arguments = ["compare", "--prompt", "q", "--a", a, "--b", b]
    assert triward.cli.main([*arguments, "--json"]) == code
    margin = float(len(a) - len(b))
    assert json.loads(capsys.readouterr().out) == {
        "a": float(len(a)), "b": float(len(b)), "margin": margin,
    }  # fmt: skip
    assert triward.cli.main(arguments) == code
    _, best, _, last = capsys.readouterr().out.splitlines()
    assert best.split()[:3] == ["*", "1", "A" if margin >= 0 else "B"]
    assert last == f"margin of A over B: {margin:.4f}"


@pytest.mark.parametrize(("ready", "code", "text"), [(True, 0, "ready"), (False, 3, "not ready")])
def test_health(made, transport, capsys, ready, code, text):
    transport.ready = ready
    assert triward.cli.main(["health", "--url", "a:1", "--url", "b:2"]) == code
    out, err = capsys.readouterr()
    assert out == f"a:1, b:2: {text}\n"
    assert err == ("" if ready else "triward: a:1, b:2: the model 'reward' is not ready\n")
    assert triward.cli.main(["health", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {"ready": ready}


def test_how_servers_are_reached(made, tmp_path):
    tls = ["--tls-ca", "ca.pem", "--tls-certificate", "c.pem", "--tls-key", "c.key"]
    options = ["--url", "a:1", "--url", "b:2", "--header", "Key: v", "--model", "other"]
    assert triward.cli.main([*ARGUMENTS, *options, *tls, *responses("r")]) == 0
    settings = defaults(model="other", headers={"key": "v"}, tls=Tls("ca.pem", "c.pem", "c.key"))
    assert made == [(["a:1", "b:2"], settings)]
    assert triward.cli.main(["health", "--tls"]) == 0
    assert made[-1][1]["tls"] == Tls()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["scroe", "--prompt", "q", "--response", "r"], "score"),
        ([*ARGUMENTS, "--respone", "r"], "--response"),
        ([*ARGUMENTS, "--response", "r", "--time-out=5"], "--timeout"),
        (["compare", "--promt", "q", "--a", "x", "--b", "y"], "--prompt"),
        (["health", "--ulr", "host:1"], "--url"),
    ],
)
def test_a_word_that_is_mistyped(made, transport, arguments, meant, capsys):
    with pytest.raises(SystemExit) as caught:
        triward.cli.main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith(f"; did you mean {meant}?\n")
    assert f"usage: triward {'' if meant == 'score' else arguments[0]}" in err
    assert transport.calls == []


@pytest.mark.parametrize("name", ["eval", "best-of-n", "filter", "pairs"])
@pytest.mark.parametrize("arguments", [[], ["--help"], ["--input", "a", "b"]])
def test_a_command_that_is_not_installed(monkeypatch, capsys, name, arguments):
    monkeypatch.setattr(triward.cli, "entry_points", lambda group: ())
    with pytest.raises(SystemExit) as caught:
        triward.cli.main([name, *arguments])
    assert caught.value.code == 2
    error = "comes with triward-tools; in a checkout of Triward: pip install ./tools"
    assert capsys.readouterr().err.endswith(f"triward {name}: error: {error}\n")


def test_a_command_of_another_distribution(made, monkeypatch, capsys):
    """By an entry point; it gets a client for the server's options."""

    def add(commands, server):
        command = commands.add_parser("hello", help="greet the server", parents=[server])
        command.set_defaults(run=lambda client, options: print(client, options.model) or 7)

    asked = []
    point = SimpleNamespace(name="hello", load=lambda: add)
    monkeypatch.setattr(triward.cli, "entry_points", lambda group: asked.append(group) or (point,))
    assert triward.cli.main(["hello", "--url", "a:1", "--model", "other"]) == 7
    assert capsys.readouterr().out == "RewardClient('a:1') other\n"
    assert asked == ["triward.commands"]
    with pytest.raises(SystemExit):
        triward.cli.main(["--help"])
    out = capsys.readouterr().out
    assert "greet the server" in out and "comes with triward-tools" in out


def test_a_word_that_is_like_none(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["triward", *ARGUMENTS, "--response", "r", "--xyz"])
    with pytest.raises(SystemExit):
        triward.cli.main()
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --xyz\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        triward.cli.main(["--version"])
    assert caught.value.code == 0
    expected = f"triward {triward.__version__}, version 1 of the wire contract\n"
    assert capsys.readouterr().out == expected


def test_waiting_for_a_server(made):
    assert triward.cli.main(["health", "--wait-ready", "2.5"]) == 0
    assert made[-1][1]["wait_ready"] == 2.5
    assert triward.cli.main(["health", "--wait-ready", "0"]) == 0


PROMPT = [{"role": "user", "content": "q"}]
LINES = [
    {"id": 1, "messages": PROMPT, "responses": ["no", "longest"]},
    {"messages": [*PROMPT, {"role": "assistant", "content": "four"}], "id": "x"},
]


def run_lines(tmp_path, lines, *options, command="score"):
    given, got = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    given.write_text("\n".join(text), encoding="utf-8")
    code = triward.cli.main([command, "--input", str(given), "--output", str(got), *options])
    return code, [json.loads(line) for line in got.read_text(encoding="utf-8").splitlines()]


def test_lines(made, tmp_path):
    assert run_lines(tmp_path, [*LINES, "", LINES[1]]) == (
        0,
        [
            {**LINES[0], "scores": [2.0, 7.0]},
            {**LINES[1], "score": 4.0},
            {**LINES[1], "score": 4.0},
        ],
    )
    _, rows = run_lines(tmp_path, LINES, "--force", command="rank")
    assert rows[0] == {**LINES[0], "scores": [2.0, 7.0], "ranking": [1, 0]}


def test_an_output_that_is_there_is_not_replaced(made, transport, tmp_path, capsys):
    assert run_lines(tmp_path, LINES)[0] == 0
    calls = len(transport.calls)
    code, rows = run_lines(tmp_path, LINES[1:])
    assert code == 2 and len(rows) == 2 and len(transport.calls) == calls
    there = f"triward: {tmp_path / 'out.jsonl'}: is there already; --force (force=True) replaces it"
    assert capsys.readouterr().err == f"{there}, or name another output\n"
    code, rows = run_lines(tmp_path, LINES[1:], "--force")
    assert code == 0 and len(rows) == 1
    (tmp_path / "out.jsonl").write_text("")  # as mktemp makes it
    assert run_lines(tmp_path, LINES)[0] == 0


def test_lines_that_cannot_be_scored_come_back_with_their_error(made, transport, tmp_path, capsys):
    def reply(arguments):
        if b"bad" in transport.sent(arguments)["responses"][1]:
            raise InvalidRequest("too bad")
        return transport.lengths(arguments)

    transport.reply = reply
    bad = {"id": 2, "messages": PROMPT, "responses": ["fine", "bad"]}
    lines = ["{", "[]", LINES[0], bad, {"id": 3, "messages": PROMPT}, {"responses": []}, LINES[1]]
    empty = {"id": 4, "messages": PROMPT, "responses": []}
    code, rows = run_lines(tmp_path, [*lines, empty])
    assert code == 2
    assert [row.get("id") for row in rows] == [None, None, 1, 2, 3, None, "x", 4]
    assert (rows[2]["scores"], rows[6]["score"]) == ([2.0, 7.0], 4.0)
    errors = {index: row["error"] for index, row in enumerate(rows) if "error" in row}
    assert set(errors) == {0, 1, 3, 4, 5, 7}
    assert {error["type"] for error in errors.values()} == {"InvalidRequest"}
    assert errors[3]["message"] == "line 4: responses[1]: too bad"
    assert all(errors[i]["message"].startswith(f"line {i + 1}: ") for i in errors)
    assert "6 of 8 lines have no score" in capsys.readouterr().err


def test_lines_through_pipes(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(LINES[1])))
    assert triward.cli.main(["score", "--input", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {**LINES[1], "score": 4.0}


def test_a_missing_input_file(made, capsys):
    assert triward.cli.main(["score", "--input", "gone.jsonl"]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_the_input_is_not_written_over(made, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(LINES[1]), encoding="utf-8")
    assert triward.cli.main(["score", "--input", str(path), "--output", str(path)]) == 2
    assert json.loads(path.read_text(encoding="utf-8")) == LINES[1]


def test_what_an_earlier_run_said_is_not_handed_on(made, tmp_path):
    stale = {"score": 17, "scores": [17], "ranking": [0], "error": {}}
    lines = [{**LINES[0], **stale}, {"id": 2, "messages": PROMPT, "responses": [5], **stale}]
    _, rows = run_lines(tmp_path, lines)
    assert rows[0] == {**LINES[0], "scores": [2.0, 7.0]}
    assert rows[1].keys() == {"id", "messages", "responses", "error"}


def test_lines_that_are_no_text(made, tmp_path):
    path, out = tmp_path / "in", tmp_path / "out"
    half = json.dumps({**LINES[1], "id": "\ud800"}).encode()
    deep = b'{"messages": ' + b"[" * 100_000
    path.write_bytes(b"\n".join([b"\xff", half, deep, json.dumps(LINES[1]).encode()]))
    assert triward.cli.main(["score", "--input", str(path), "--output", str(out)]) == 2
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row.get("score") for row in rows] == [None, 4.0, None, 4.0]
    assert rows[1]["id"] == "\ud800"


@pytest.mark.parametrize(
    ("failure", "code"), [(FileNotFoundError(2, "no", "ca.pem"), 2), (KeyError("a bug"), 5)]
)
def test_no_failure_is_compares_no(made, transport, capsys, failure, code):
    def reply(arguments):
        raise failure

    transport.reply = reply
    assert triward.cli.main(["compare", "--prompt", "q", "--a", "x", "--b", "y"]) == code
    assert "triward: " in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(made, monkeypatch, capsys):
    def interrupted(client, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(triward.cli, "_score", interrupted)
    assert triward.cli.main([*ARGUMENTS, *responses("a")]) == 130
    assert capsys.readouterr().err.startswith("triward: interrupted; ")
    assert triward.cli.main(["score", "--input", "lines.jsonl"]) == 130
    assert "--force begins anew" in capsys.readouterr().err


def test_an_os_error_without_a_file_or_number_says_what_it_knows(made, monkeypatch, capsys):
    def damaged(client, options):
        raise OSError("Corrupt snappy compressed data.")

    monkeypatch.setattr(triward.cli, "_score", damaged)
    assert triward.cli.main([*ARGUMENTS, *responses("a")]) == 2
    assert capsys.readouterr().err == "triward: output: Corrupt snappy compressed data.\n"
