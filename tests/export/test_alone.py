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
from triward_server.export import draft as moves
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


def write(folder: Path, names: ModelNames, mark: str, vision: bool, version: str = "1") -> None:
    """A model that says who wrote it."""
    for model in (*names.steps, names.ensemble, schema.DRAINING, *[names.vision] * vision):
        (folder / model / version).mkdir(parents=True, exist_ok=True)
        (folder / model / version / "mark").write_text(mark)
        (folder / model / "config.pbtxt").touch()


def read(output: Path) -> dict[str, str]:
    """Who wrote which version of which model."""
    return {str(path.relative_to(output).parent): path.read_text() for path in output.glob("*/*/*")}


class Kills:
    """Copies of a disk before each change: each is what a kill would leave there."""

    def __init__(self, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._disk = disk
        self.copies: list[Path] = []
        self._rename, self._rmtree = Path.rename, shutil.rmtree
        monkeypatch.setattr(Path, "rename", lambda path, target: self._move(path, target))
        monkeypatch.setattr(shutil, "rmtree", self._remove)

    def outcomes(self) -> list[dict[str, str]]:
        """What the next export makes of each, which leaves nothing else behind."""
        found = []
        for copy in self.copies:
            with alone(copy / "models"):
                found.append(read(copy / "models"))
            assert [path.name for path in copy.iterdir()] == ["models"]
        return found

    def _copy(self) -> None:
        copy = self._disk.with_name(f"killed-{len(self.copies)}")
        self.copies.append(shutil.copytree(self._disk, copy))

    def _move(self, path: Path, target: Path) -> Path:
        self._copy()
        return self._rename(path, target)

    def _remove(self, folder: Path, **how: bool) -> None:
        self._copy()
        for part in [each for each in sorted(Path(folder).glob("*")) if each.is_dir()][:1]:
            self._rmtree(part)
            self._copy()
        self._rmtree(folder, **how)


@pytest.mark.parametrize("names", [REWARD, JUDGE], ids=lambda names: names.ensemble)
@pytest.mark.parametrize(("before", "after"), [(None, True), (True, False), (False, True)])
def test_whenever_it_is_killed_a_model_is_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: ModelNames,
    before: bool | None,
    after: bool,
) -> None:
    """`before` and `after`: whether the old and the new model have a vision tower; None: none."""
    output = tmp_path / "disk" / "models"
    output.mkdir(parents=True)
    if before is not None:
        write(output, names, "old", before)
    old = read(output)
    with alone(output) as work:
        kills = Kills(output.parent, monkeypatch)
        with written_whole(output, names, None, work) as draft:
            write(draft, names, "new", after)
    monkeypatch.undo()
    new = read(output)
    assert set(new.values()) - {"old"} == {"new"} and f"{names.ensemble}/1" in new
    outcomes = kills.outcomes()
    assert [each for each in outcomes if each not in (old, new)] == []
    assert old in outcomes and new in outcomes


@pytest.mark.parametrize("names", [REWARD, JUDGE], ids=lambda names: names.ensemble)
@pytest.mark.parametrize("vision", [True, False])
def test_whenever_it_is_killed_a_version_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: ModelNames, vision: bool
) -> None:
    output = tmp_path / "disk" / "models"
    write(output, names, "old", vision)
    old = read(output)
    monkeypatch.setattr(moves, "served_models", lambda _: [names])
    monkeypatch.setattr(moves, "comparable", Path.read_text)
    with alone(output) as work, monkeypatch.context() as patched:
        kills = Kills(output.parent, patched)
        with written_whole(output, names, "2", work) as draft:
            write(draft, names, "new", vision, "2")
    new = read(output)
    added = {f"{model}/2" for model in (*names.steps, names.ensemble, *[names.vision] * vision)}
    assert new == old | dict.fromkeys(added, "new")
    for left in map(read, (copy / "models" for copy in kills.copies)):
        assert f"{names.ensemble}/2" not in left or left == new, "the public one comes last"
    outcomes = kills.outcomes()
    assert [each for each in outcomes if each not in (old, new)] == []
    assert old in outcomes and new in outcomes
