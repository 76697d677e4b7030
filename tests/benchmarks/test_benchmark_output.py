"""A measurement takes minutes to hours: whether its results can be written is asked before it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

import benchmarks
from benchmarks.measure import writable


def entry_points() -> Iterator[str]:
    """Modules whose command has `--output`."""
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks."):
        main = getattr(importlib.import_module(module.name), "main", None)
        if main is not None and "output" in inspect.signature(main).parameters:
            yield module.name


ENTRY_POINTS = sorted(entry_points())


def run(module: ModuleType, *arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    # A terminal's width cuts the sentence.
    return result.exit_code, " ".join(result.stderr.replace("│", " ").split())


def test_all_are_found() -> None:
    names = "advantages compare composer deadlines digests doors gpu.__main__ heap instances"
    names += " overlap peers.__main__ prefixes routing soak tokens perf_analyzer.__main__"
    names += " perf_analyzer.inputs"
    assert {f"benchmarks.{name}" for name in names.split()} == set(ENTRY_POINTS)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_the_output_is_tried_before_anything_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: object, **__: object) -> None:
        raise AssertionError("it measures")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", begun)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    for output in (tmp_path / "folder.json", tmp_path / "file" / "results.json"):
        code, told = run(importlib.import_module(name), "--output", output)
        assert code == 2 and "cannot be written" in told, told
    assert {path.name for path in tmp_path.iterdir()} == {"folder.json", "file"}


def test_what_is_there_stays(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    writable(None)
    writable(output, ".svg")
    assert list(tmp_path.iterdir()) == []
    output.write_text("{}")
    writable(output, ".svg")
    assert output.read_text() == "{}" and list(tmp_path.iterdir()) == [output]
    output.with_suffix(".svg").mkdir()
    with pytest.raises(typer.BadParameter, match=r"results\.svg cannot be written"):
        writable(output, ".svg")
    with pytest.raises(typer.BadParameter, match="No such file or directory"):
        writable(tmp_path / "nowhere" / "results.json")
