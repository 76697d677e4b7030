"""The help of each benchmark: its examples are real, and it fits 80 columns."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.commands import benchmark_command
from tests.conftest import ROOT

FILES = [
    path for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if "    run_main(main)" in path.read_text() and path.name != "rehearsal.py"
]  # fmt: skip


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def examples(command: typer.Typer) -> list[list[str]]:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(command, ["--help"])
    assert shown.exit_code == 0
    assert [line for line in shown.output.splitlines() if len(line) > 80 and "--" not in line] == []
    _, _, below = shown.output.partition("Example:\n")
    return [shlex.split(line) for line in below.splitlines() if line.strip()]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_examples_are_real(path: Path) -> None:
    module = importlib.import_module(name_of(path))
    command = benchmark_command(module.main, module.__doc__ or "")
    found = examples(command)
    assert found
    for words in found:
        assert words[:3] == ["python", "-m", name_of(path).removesuffix(".__main__")]
        typer.main.get_command(command).make_context(words[2], words[3:])


def test_all_are_found() -> None:
    text = "".join(path.read_text() for path in (ROOT / "benchmarks").rglob("*.py"))
    assert len(FILES) >= 19
    assert "typer.run(" not in text


def test_an_example_that_is_not_is_found() -> None:
    def main(output: Path) -> None:
        """Measure nothing."""

    command = benchmark_command(main, "Nothing.\n\n    python -m benchmarks.none --outptu x.json\n")
    [words] = examples(command)
    with pytest.raises(Exception, match="No such option"):
        typer.main.get_command(command).make_context("none", words[3:])
    assert re.search("Missing", str(CliRunner().invoke(command, []).output))
