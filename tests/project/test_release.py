"""`make release`: one version everywhere, whole wheels, links that lead somewhere, equal bytes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from triward import __version__

SCRIPT = ROOT / ".ci" / "release.py"
NAMES = ["triward", "triward_server", "triward_tools"]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("release", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = load()


def build(output: Path, umask: int = 0o022) -> dict[str, bytes]:
    """The contents of each file that the command writes, from this checkout's last commit."""
    command = [sys.executable, SCRIPT, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, umask=umask)
    assert done.returncode == 0, done.stderr
    assert "nothing was uploaded" in done.stdout
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("release") / "dist"


@pytest.fixture(scope="module")
def built(folder: Path) -> dict[str, bytes]:
    return build(folder)


class TestVersions:
    @pytest.fixture
    def checkout(self, tmp_path: Path) -> Path:
        """What the version is read from, to be changed."""
        for path in ("CHANGELOG.md", "pyproject.toml", "*/pyproject.toml", "*/__init__.py",
                     "*/triward*/__init__.py"):  # fmt: skip
            for file in ROOT.glob(path):
                copy = tmp_path / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
        return tmp_path

    def test_this_checkout_has_one(self) -> None:
        assert release.the_version(ROOT) == __version__

    @pytest.mark.parametrize(
        "path",
        ["pyproject.toml", "client/pyproject.toml", "tools/pyproject.toml",
         "triward_server/__init__.py", "client/triward/__init__.py",
         "tools/triward_tools/__init__.py"],
    )  # fmt: skip
    def test_one_that_differs_is_named(self, checkout: Path, path: str) -> None:
        file = checkout / path
        file.write_text(file.read_text().replace(f'"{__version__}"', '"9.9.9"'))
        with pytest.raises(SystemExit, match=rf"versions differ: .*{re.escape(path)} 9\.9\.9"):
            release.the_version(checkout)

    def test_the_changelog_must_have_it_on_top(self, checkout: Path) -> None:
        file = checkout / "CHANGELOG.md"
        text = file.read_text(encoding="utf-8")
        assert release.the_version(checkout) == __version__
        file.write_text(text.replace(f"## {__version__} ", "## 0.1.9 "), encoding="utf-8")
        expected = rf"newest entry is 0\.1\.9, not {re.escape(__version__)} – DATE"
        with pytest.raises(SystemExit, match=expected):
            release.the_version(checkout)


class TestDescriptions:
    def test_links_lead_to_the_tag(self) -> None:
        text = (
            "[a](../docs/client.md#errors) ![b](../docs/images/tree.svg) [c](https://example.org)\n"
            "[d](#links) [![e](../docs/images/tree.svg)](../docs/engine.md)"
        )
        blob, raw = f"{release.HOME}/blob/v1.2.3", f"{release.RAW}/v1.2.3"
        assert release.absolute_links(text, "tools", "1.2.3", ROOT) == (
            f"[a]({blob}/docs/client.md#errors) ![b]({raw}/docs/images/tree.svg) "
            f"[c](https://example.org)\n[d]({blob}/tools/README.md#links) "
            f"[![e]({raw}/docs/images/tree.svg)]({blob}/docs/engine.md)"
        )

    def test_a_dead_link_is_named(self) -> None:
        with pytest.raises(SystemExit, match=r"tools/README\.md links to docs/gone\.md"):
            release.absolute_links("[a](../docs/gone.md)", "tools", "1.2.3", ROOT)

    @pytest.mark.parametrize("name", NAMES)
    def test_none_is_relative(self, name: str, built: dict[str, bytes], folder: Path) -> None:
        wheel = folder / f"{name}-{__version__}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as files:
            described = files.read(f"{name}-{__version__}.dist-info/METADATA").decode()
        links = re.findall(r"\]\(([^)\s]+)\)", described)
        assert [link for link in links if not link.startswith("https://")] == []


class TestDistributions:
    def test_there_is_a_wheel_and_an_sdist_of_each(self, built: dict[str, bytes]) -> None:
        ends = (f"-{__version__}-py3-none-any.whl", f"-{__version__}.tar.gz")
        assert sorted(built) == sorted(f"{name}{end}" for name in NAMES for end in ends)

    def test_wheels_hold_what_is_read_at_run_time(
        self, built: dict[str, bytes], folder: Path
    ) -> None:
        names: set[str] = set()
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as files:
                names |= set(files.namelist())
        assert {
            "triward/py.typed", "triward/integrations/trl.py", "triward_server/py.typed",
            "triward_server/model_repository/reward_forward/config.pbtxt",
            "triward_server/model_repository/reward_forward/1/model.py",
            "triward_tools/py.typed", "triward_tools/evaluation/report.html",
        } < names  # fmt: skip
        assert [n for n in names if re.search(r"(^|/)(tests|benchmarks|docs)/", n)] == []

    @pytest.mark.parametrize("change", ["left out", "strange"])
    def test_a_wheel_that_is_not_whole_is_refused(
        self, change: str, built: dict[str, bytes], folder: Path, tmp_path: Path
    ) -> None:
        whole = folder / f"triward_tools-{__version__}-py3-none-any.whl"
        wheel = tmp_path / whole.name
        with zipfile.ZipFile(whole) as files, zipfile.ZipFile(wheel, "w") as damaged:
            for name in files.namelist():
                if change != "left out" or name != "triward_tools/evaluation/report.html":
                    damaged.writestr(name, files.read(name))
            if change == "strange":
                damaged.writestr("tests/test_x.py", "")
        source = tmp_path / "source"
        release.export(source)
        release.check_contents(whole, "triward-tools", source)
        named = "lacks .*report.html" if change == "left out" else r"has \['tests/test_x\.py'\]"
        with pytest.raises(SystemExit, match=named):
            release.check_contents(wheel, "triward-tools", source)

    def test_sdists_know_nothing_of_this_machine(
        self, built: dict[str, bytes], folder: Path
    ) -> None:
        for sdist in folder.glob("*.tar.gz"):
            with tarfile.open(sdist) as files:
                members = files.getmembers()
            assert len({member.mtime for member in members}) == 1
            assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}

    @pytest.mark.slow
    def test_built_twice_they_are_the_same_bytes(
        self, built: dict[str, bytes], tmp_path: Path
    ) -> None:
        """By another user's mask and locale, later, elsewhere."""
        again = build(tmp_path / "again", umask=0o077)
        assert [name for name in built if built[name] != again.get(name)] == []
        assert sorted(again) == sorted(built)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The files of the last commit with the command, as an archive has them: without git."""
    folder = tmp_path / "archive"
    release.export(folder)
    (folder / ".ci").mkdir(exist_ok=True)
    shutil.copy(SCRIPT, folder / ".ci" / "release.py")
    return folder


def run_in(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ".ci/release.py"], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip


@pytest.mark.slow
def test_an_archive_of_the_files_gives_the_same_bytes(
    built: dict[str, bytes], archive: Path
) -> None:
    done = run_in(archive)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (archive / "dist").iterdir()} == built


def test_the_command_fails_with_a_sentence(archive: Path) -> None:
    """Here where a version differs; what the last release built stays."""
    file = archive / "tools" / "pyproject.toml"
    file.write_text(file.read_text().replace(f'"{__version__}"', '"9.9.9"'))
    last = archive / "dist" / "last.whl"
    last.parent.mkdir()
    last.touch()
    done = run_in(archive)
    assert done.returncode == 1
    assert "release: versions differ: " in done.stderr
    assert "tools/pyproject.toml 9.9.9" in done.stderr
    assert list(last.parent.iterdir()) == [last]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    command = [sys.executable, SCRIPT, "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "is not empty" in done.stderr) == (1, True)
    assert (tmp_path / "mine").exists()
