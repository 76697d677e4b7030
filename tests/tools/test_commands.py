"""The commands that the tools add to `triward`."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import triward.cli
from tests.fakeserver import FakeServer

ROOT = Path(__file__).parents[2]
LINE = {
    "messages": [{"role": "user", "content": "q"}],
    "responses": ["no", "longest"],
    "source": "there",
}


def test_the_words_that_the_client_knows_are_all_there(capsys):
    with pytest.raises(SystemExit):
        triward.cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in triward.cli._TOOLS)
    assert "comes with triward-tools" not in out


def test_each_entry_point_adds_the_command_of_its_name():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "tools" / "pyproject.toml").read_text(encoding="utf-8"))
    points = project["project"]["entry-points"]["triward.commands"]
    assert sorted(points) == sorted(triward.cli._TOOLS)
    for name, value in points.items():
        parser = triward.cli.Parser()
        commands = parser.add_subparsers()
        EntryPoint(name, value, "triward.commands").load()(
            commands, parser.__class__(add_help=False)
        )
        assert list(commands.choices) == [name]


def test_a_word_that_is_mistyped(capsys):
    with pytest.raises(SystemExit) as caught:
        triward.cli.main(["best-of-n", "--inptu", "a.jsonl", "--output", "b.jsonl"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: triward best-of-n")
    assert err.endswith("; did you mean --input?\n")


@pytest.mark.parametrize("command", ["gateway", "playground"])
@pytest.mark.parametrize(
    ("port", "said"),
    [("65536", "must be at most 65535, got 65536"), ("-1", "must be a whole number from 0 on")],
)
def test_a_port_that_is_none(command, port, said, capsys):
    with pytest.raises(SystemExit) as caught:
        triward.cli.main([command, "--url", "localhost:1", f"--port={port}"])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_scored_lines_can_be_filtered(tmp_path):
    """What comes back is the input, with scores: a tool that takes that takes this."""
    given, scored, kept = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "kept.jsonl"))
    given.write_text(f"{json.dumps(LINE)}\n" * 4, encoding="utf-8")
    with FakeServer() as server:
        options = ["--url", server.url, "--input", str(given), "--output", str(scored)]
        assert triward.cli.main(["score", *options]) == 0
    first, second = json.loads(scored.read_text(encoding="utf-8").splitlines()[0])["scores"]
    options = ["--min", str((first + second) / 2), "--no-picture", "--scores", "scores"]
    columns = ["--prompt", "messages", "--responses", "responses"]
    files = ["--input", str(scored), "--output", str(kept)]
    assert triward.cli.main(["filter", *files, *options, *columns]) == 0
    best = "no" if first > second else "longest"
    expected = {**LINE, "responses": [best], "scores": [max(first, second)]}
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert rows == [expected] * 4
