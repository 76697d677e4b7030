"""Exports into a folder that is a mount: in a container, as an ordinary user, from the hub, too."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Exit
from tests.container import USER, contained, missing
from tests.fakehub import COMMIT, fake_hub
from triward_server.errors import ConfigError
from triward_server.export.draft import alone, room, written_whole
from triward_server.schema import REWARD

Export = Callable[..., Exit]

HUB_NAME = "someone/a-reward-model"
WHY_NOT = missing()
namespaces = pytest.mark.skipif(bool(WHY_NOT), reason=f"no mounts here: {WHY_NOT}")


class Box:
    """Runs exports in a container's place, with /models and /cache mounted."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        folder.chmod(0o755)
        for name in ("root", "models", "cache"):
            (folder / name).mkdir()
            if os.getuid() == 0:
                os.chown(folder / name, USER, USER)
        self.mounts = {f"/{name}": folder / name for name in ("models", "cache")}

    def export(
        self, source: object, output: str = "/models", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        arguments = [
            sys.executable, ROOT / "export" / "build_repository.py", "--checkpoint", source,
            "--output", output, "--device=cpu", "--threads=1", "--no-verify",
        ]  # fmt: skip
        command = contained(
            self.folder / "root", self.mounts, *arguments, readable=[self.checkpoint]
        )
        given = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/tmp",
            "HF_HOME": "/cache", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        return subprocess.run(
            command, env=given | environment, capture_output=True, text=True, timeout=300
        )

    def written(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "models").iterdir())


@pytest.fixture
def box(tmp_path: Path, checkpoint: Path) -> Box:
    return Box(tmp_path, checkpoint)


MODELS = ["reward", "reward_draining", "reward_forward", "reward_preprocess"]


@namespaces
def test_into_a_mount_and_from_the_hub(box: Box) -> None:
    """The root is read-only and the user has no name; first without a network, then with one."""
    (box.folder / "models" / "lost+found").mkdir(mode=0o700)
    offline = box.export(HUB_NAME)
    assert offline.returncode == 1
    assert f"{HUB_NAME}: neither a folder nor available on the hub" in offline.stderr
    assert box.written() == [".models.lock", "lost+found"]

    with fake_hub(HUB_NAME, box.checkpoint) as address:
        result = box.export(HUB_NAME, HF_HUB_OFFLINE="0", HF_ENDPOINT=address)
    assert result.returncode == 0, result.stderr
    assert box.written() == [".models.lock", "lost+found", *MODELS]
    manifest = json.loads((box.folder / "models/reward/1/manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (HUB_NAME, COMMIT)
    assert (box.folder / "cache" / "hub").is_dir()

    # From a folder, and what is there already.
    again = box.export(box.checkpoint)
    assert again.returncode == 1 and "exists and has version 1 of reward" in again.stderr
    assert box.written() == [".models.lock", "lost+found", *MODELS]


@namespaces
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_mount_of_somebody_else_is_refused_at_once(box: Box) -> None:
    os.chown(box.folder / "models", 0, 0)
    result = box.export("not/looked-for")
    assert result.returncode == 1
    assert f"--output /models: user {USER} cannot write in /models (Permission denied)" in (
        result.stderr
    )
    assert "not/looked-for" not in result.stderr


def test_drafts_lie_beside_what_takes_moves(tmp_path: Path) -> None:
    output = tmp_path / "models"
    assert room(output) == tmp_path
    output.mkdir()
    assert room(output) == tmp_path
    assert [*tmp_path.iterdir()] == [output] and [*output.iterdir()] == []


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that nothing can be moved into from outside."""
    output = tmp_path / "models"
    output.mkdir()
    rename = Path.rename

    def moved(self: Path, target: Path) -> Path:
        if (output in target.parents) != (output in self.parents):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", moved)
    return output


def test_nothing_is_left_beside_a_mount(checkpoint: Path, export: Export, mounted: Path) -> None:
    """New, refused, replaced, with a second version and a second model."""
    left = mounted / ".models.export" / "draft"  # what an export leaves that was killed
    left.mkdir(parents=True)
    arguments = ("--checkpoint", checkpoint, "--output", mounted, "--device=cpu", "--no-verify")
    assert export(*arguments).code == 0
    (mounted / "reward" / "mark").touch()
    assert export(*arguments).code == 1
    assert (mounted / "reward" / "mark").exists()
    assert export(*arguments, "--force").code == 0
    assert not (mounted / "reward" / "mark").exists()
    assert export(*arguments, "--version=2").code == 0
    assert sorted(path.name for path in (mounted / "reward").glob("[0-9]*")) == ["1", "2"]
    assert export(*arguments, "--name=judge").code == 0
    public = [path.name for path in mounted.iterdir() if "_" not in path.name]
    assert sorted(public) == [".models.lock", "judge", "reward"]
    assert [*mounted.parent.iterdir()] == [mounted]


def test_a_draft_in_a_mount_vanishes_with_its_error(mounted: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        alone(mounted) as work,
        written_whole(mounted, REWARD, "1", work) as draft,
    ):
        assert draft.parent.parent == mounted
        raise RuntimeError
    assert [path.name for path in mounted.iterdir()] == [".models.lock"]


def test_no_room_is_an_error_with_what_to_do(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(
        ConfigError, match=r"cannot write in .*models \(Permission.*docker run --user"
    ):
        room(mounted)
