"""The table of scores: what is where, how wide, in which encoding, and when it is styled."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import triward.cli
from triward.table import Screen, one_line, table_lines

PLAIN = Screen(80, "utf-8", styled=False)


def test_numbers_stand_under_each_other_and_the_best_is_marked():
    lines = table_lines([-12.5, 3.25, -0.5], ["0", "1", "2"], ["low", "top", "mid"], PLAIN)
    assert lines == [
        "   rank  response     score  text",
        "*     1         1    3.2500  top",
        "      2         2   -0.5000  mid",
        "      3         0  -12.5000  low",
    ]


def test_the_documentation_shows_it():
    text = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
    shown = table_lines([2.125, -0.5], ["0", "1"], ["June.", "May."], PLAIN)
    assert "\n".join(["```", *shown, "```"]) in text


def test_equal_scores_are_marked_alike_and_a_single_one_is_not():
    tied = table_lines([1.0, 2.0, 2.0], ["0", "1", "2"], ["a", "b", "c"], PLAIN)
    assert [line[0] for line in tied] == [" ", "*", "*", " "]
    assert table_lines([1.0], ["0"], ["a"], PLAIN)[1][0] == " "


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_line_is_as_wide_as_the_terminal(columns):
    [_, row] = table_lines([1.0], ["0"], ["word " * 100], Screen(columns, "utf-8", styled=False))
    assert columns - 1 <= len(row) <= columns
    assert row.endswith("…")


def test_a_tiny_terminal_still_shows_how_a_response_begins():
    [_, row] = table_lines([1.0], ["0"], ["a" * 100], Screen(8, "utf-8", styled=False))
    assert row.endswith("  aaaaaaaaa…")


FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\U0001f600" * 5, "\U0001f600" * 5),  # an emoji takes two columns: ten
        ("\U0001f600" * 6, "\U0001f600" * 4 + "…"),
        ("\u2764\ufe0f" * 5, "\u2764\ufe0f" * 5),  # a heart that a selector makes an emoji
        ("\u2764\ufe0f" * 6, "\u2764\ufe0f" * 4 + "\u2764…"),  # the last without it
        (FAMILY, FAMILY),  # joined: never more than its parts
        ("\uff21\uff22\uff23\uff24\uff25\uff26", "\uff21\uff22\uff23\uff24…"),  # full width
        ("a\xad" * 6, "a\xada\xada\xada\xada…"),  # terminals show soft hyphens
        ("a\u202eb\u2066c", "abc"),  # nothing may turn the line around
        ("\u0646\u0645\u06cc\u200c\u062e", "\u0646\u0645\u06cc\u200c\u062e"),  # Persian's joiner
        ("a\x9bb\x07c", "abc"),
        ("z" + "\u0301" * 5000, "z" + "\u0301" * 5000),
    ],
)
def test_widths_of_scripts_and_emoji(text, shown):
    assert one_line(text, 10) == shown


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "caf\xe9", r"caf\xe9"),
        ("ascii", "\u6587" * 3, r"\u6587..."),
        ("latin-1", "caf\xe9 \u6587", "caf\xe9 ..."),
        ("cp1252", "aaaaaaaaaaaaa", "aaaaaaaaa…"),
    ],
)
def test_what_an_encoding_lacks_takes_the_room_of_its_escape(encoding, text, shown):
    assert one_line(text, 10, encoding) == shown
    assert len(shown) <= 10


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.skipif(os.name == "nt", reason="no style there")
@pytest.mark.parametrize(
    ("stream", "environment", "styled"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": ""}, True),  # as no-color.org has it
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_only_a_terminal_gets_style(monkeypatch, stream, environment, styled):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = Screen.of(stream)
    assert screen.styled is styled
    lines = table_lines([1.0, 2.0], ["0", "1"], ["a", "b"], screen)
    assert [line.startswith("\x1b[1m*") for line in lines] == [False, styled, False]
    assert ("\x1b" in "".join(lines)) is styled


def shell(*arguments, given="", **environment):
    """The command as a process whose output is a pipe; its output, decoded as ASCII."""
    names = {"PYTHONIOENCODING", "PYTHONUTF8", "NO_COLOR", "COLUMNS"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-m", "triward", *arguments],
        input=given.encode(), capture_output=True, timeout=120, env={**kept, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pipe_gets_eighty_plain_columns(server):
    out = shell("score", "--url", server.url, "--prompt", "q", "--response", "long " * 50).decode()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].endswith("…")
    assert "\x1b" not in out


MIXED = "caf\xe9 \u6587 \U0001f600"


def test_a_console_that_is_not_utf_8_gets_a_table(server):
    asked = ("--url", server.url, "--prompt", "q", "--response", MIXED)
    out = shell("score", *asked, PYTHONIOENCODING="ascii", PYTHONUTF8="1").decode("ascii")
    assert out.splitlines()[1].endswith(r"caf\xe9 \u6587 \U0001f600")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_lines_are_json_in_every_encoding(server, encoding):
    """Escapes of Python's would be none of JSON's."""
    line = {"messages": [{"role": "user", "content": "q"}], "responses": [MIXED, "b"], "id": MIXED}
    given = json.dumps(line, ensure_ascii=False)
    asked = ("score", "--url", server.url, "--input", "-")
    out = shell(*asked, given=given, PYTHONIOENCODING=encoding)
    row = json.loads(out.decode("utf-8"))
    assert {**row, "scores": []} == {**line, "scores": []}
    assert len(row["scores"]) == 2
    assert out.isascii() is (encoding != "utf-8")


def test_json_is_never_shortened(server, capsys):
    responses = ["x" * 1000, "y"]
    asked = [argument for text in responses for argument in ("--response", text)]
    assert triward.cli.main(["rank", "--url", server.url, "--prompt", "q", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["ranking"]) == [0, 1]
    assert len(found["scores"]) == 2
