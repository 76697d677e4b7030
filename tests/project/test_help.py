"""The help of every command: its examples are real, and it fits 80 columns."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import triward.cli
from tests.conftest import ROOT
from triward.completion import completion_script
from triward_server.cli import app
from triward_server.export.commands import application

PARSER = triward.cli._parser()
[SUBPARSERS] = [a for a in PARSER._actions if isinstance(a, argparse._SubParsersAction)]
CLIENT = {"": PARSER, **SUBPARSERS.choices}
SERVER: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SCRIPTS = {
    "export/build_repository.py": "export",
    "export/export_onnx.py": "export-onnx",
    "export/make_checkpoint.py": "make-checkpoint",
}
_ENDS = ("&&", "|", ">")
_SOURCED = re.compile(r"source <\((.+)\)")


def examples(shown: str) -> list[list[str]]:
    """Words of the commands below `example:` in a help text, up to what a shell would cut off."""
    _, head, below = shown.replace("Example", "example").rpartition("example")
    assert head, "no example"
    text = below.partition("\n")[2]
    assert all(line.startswith("  ") for line in text.splitlines() if line), "not indented"
    text = _SOURCED.sub(r"\1", text.replace("\\\n", " "))
    commands = [shlex.split(line) for line in text.splitlines() if line.strip()]
    assert commands, "no example"
    return [[*until(_ENDS, words)] for words in commands]


def until(ends: tuple[str, ...], words: list[str]) -> Iterator[str]:
    for word in words:
        if word in ends:
            return
        yield word


def help_of(command: str) -> str:
    return CLIENT[command].format_help()


def server_help(command: typer.Typer, *arguments: str) -> str:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(command, [*arguments, "--help"])
    assert shown.exit_code == 0
    return shown.output


def check(words: list[str]) -> None:
    """See that a command takes these words, without carrying it out."""
    program, *arguments = words
    if program == "python":
        program, *arguments = arguments
        name = SCRIPTS[program]
        typer.main.get_command(application(name, program)).make_context(program, arguments)
    elif program == "triward-server":
        name, *arguments = arguments
        SERVER[name].make_context(name, arguments)
    else:
        assert program == "triward"
        options = PARSER.parse_args(arguments)
        if options.command == "completion":
            assert completion_script(PARSER, options)
        else:
            triward.cli._client(options).close()  # options that go together; nothing is asked


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", CLIENT)
def test_examples_of_triward_are_real(command: str) -> None:
    found = examples(help_of(command))
    assert all(words[: 1 + bool(command)] == f"triward {command}".split() for words in found)
    for words in found:
        check(words)


@pytest.mark.parametrize("command", SERVER)
def test_examples_of_triward_server_are_real(command: str) -> None:
    found = examples(server_help(app, command))
    assert all(words[:2] == ["triward-server", command] for words in found)
    for words in found:
        check(words)
    assert examples(server_help(app))[0][0] == "triward-server"


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_of_scripts_are_real(script: str) -> None:
    assert (ROOT / script).is_file()
    for words in examples(server_help(application(SCRIPTS[script], script))):
        assert words[:2] == ["python", script]
        check(words)


def test_an_example_that_is_not_is_found() -> None:
    with pytest.raises(SystemExit):
        check("triward score --prompt q --respones r".split())
    with pytest.raises(SystemExit):
        check("triward score --prompt q".split())
    with pytest.raises(Exception, match="No such option"):
        check("triward-server serve --repo skywork".split())
    with pytest.raises(Exception, match="Missing parameter"):
        check("python export/make_checkpoint.py --size tiny".split())
    with pytest.raises(AssertionError, match="no example"):
        examples("usage: triward score\n")


def test_help_fits_eighty_columns() -> None:
    texts = [help_of(command) for command in CLIENT]
    texts += [server_help(app), *(server_help(app, command) for command in SERVER)]
    lines = [line for text in texts for line in text.splitlines()]
    assert len(lines) > 300
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("command", CLIENT)
def test_every_option_says_what_it_does(command: str) -> None:
    assert [a.dest for a in CLIENT[command]._actions if not a.help and a.dest != "command"] == []


@pytest.mark.parametrize("command", SERVER)
def test_a_command_is_described_by_a_whole_sentence(command: str) -> None:
    [_, listed] = server_help(app).split("Commands:")
    sentence = " ".join((SERVER[command].help or "").partition("\n\n")[0].split())
    assert sentence.endswith(".")
    assert sentence in " ".join(listed.split())
