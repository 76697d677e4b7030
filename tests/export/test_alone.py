"""Exports into one output at once, and after one that was killed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from tests.conftest import Exit
from triward_server import schema
from triward_server.errors import ConfigError
from triward_server.export.draft import alone, written_whole
from triward_server.schema import REWARD, ModelNames

Export = Callable[..., Exit]
JUDGE = ModelNames("judge")


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when an export says that it waits."""
    said, echo = threading.Event(), typer.echo

    def listen(message: str, **how: bool) -> None:
        if "waiting for its end" in message:
            said.set()
        echo(message, **how)

    monkeypatch.setattr(typer, "echo", listen)
    return said


def test_the_second_finds_what_the_first_wrote(
    checkpoint: Path, export: Export, tmp_path: Path, waiting: threading.Event
) -> None:
    models, ends = tmp_path / "models", []
    arguments = ("--checkpoint", checkpoint, "--output", models, "--device=cpu", "--no-verify")
    assert export(*arguments, "--no-canary").code == 0
    models.rename(tmp_path / "written")
    with alone(models):
        second = threading.Thread(target=lambda: ends.append(export(*arguments)))
        second.start()
        assert waiting.wait(60)
        (tmp_path / "written").rename(models)
    second.join()
    assert ends[0].code == 1 and "exists and has version 1 of reward" in ends[0].stderr
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_all_wait_their_turn(tmp_path: Path, waiting: threading.Event) -> None:
    """Also those that wait for a lock file that its holder removes."""
    inside: list[int] = []
    most: list[int] = []

    def enter(number: int) -> None:
        for _ in range(20):
            with alone(tmp_path / "models") as work:
                inside.append(number)
                most.append(len(inside))
                assert [*work.iterdir()] == []
                (work / "draft").mkdir()
                inside.remove(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waiting.is_set()
    assert most == [1] * 160
    assert [*tmp_path.iterdir()] == []


def test_another_output_is_not_waited_for(tmp_path: Path) -> None:
    with alone(tmp_path / "a") as one, alone(tmp_path / "a.export") as other:
        assert one != other


def test_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"\.models\.lock cannot be locked \(No locks"):
        alone(tmp_path / "models").__enter__()


def write(folder: Path, names: ModelNames, mark: str, vision: bool) -> None:
    """A model that says who wrote it."""
    every = [*names.steps, names.ensemble, schema.DRAINING, *[names.vision] * vision]
    for model in every:
        (folder / model).mkdir(parents=True, exist_ok=True)
        (folder / model / "config.pbtxt").write_text(mark)


def read(output: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in output.glob("*/config.pbtxt")}


@pytest.mark.parametrize("names", [REWARD, JUDGE], ids=lambda names: names.ensemble)
@pytest.mark.parametrize(("before", "after"), [(None, True), (True, False), (False, True)])
def test_whenever_it_is_killed_a_model_is_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: ModelNames,
    before: bool | None,
    after: bool,
) -> None:
    """Its disk is copied before each change; every copy is what a kill would leave there.

    `before` and `after`: whether the model there and the new one have a vision tower; None: none.
    """
    disk, copies = tmp_path / "disk", []
    output = disk / "models"
    output.mkdir(parents=True)
    if before is not None:
        write(output, names, "old", before)
    old = read(output)
    change, remove = Path.rename, shutil.rmtree

    def copy() -> None:
        copies.append(shutil.copytree(disk, tmp_path / f"killed-{len(copies)}"))

    def rename(self: Path, target: Path) -> Path:
        copy()
        return change(self, target)

    def rmtree(folder: Path, **how: bool) -> None:
        copy()
        for part in [each for each in sorted(Path(folder).glob("*")) if each.is_dir()][:1]:
            remove(part)
            copy()
        remove(folder, **how)

    with alone(output) as work:
        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        with written_whole(output, names, None, work) as draft:
            write(draft, names, "new", after)
    monkeypatch.undo()
    new = read(output)
    assert set(new.values()) - {"old"} == {"new"} and names.ensemble in new
    outcomes = []
    for killed in copies:
        with alone(killed / "models"):
            outcomes.append(read(killed / "models"))
        assert [path.name for path in killed.iterdir()] == ["models"]
    assert [each for each in outcomes if each not in (old, new)] == []
    assert old in outcomes and new in outcomes
