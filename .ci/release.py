"""Builds the three distributions into dist/ and checks them: `make release`. Nothing is uploaded.

What is built is the last commit, from an export of it, with the packages of this environment and
without the network; where there is no git, the files that are here. The same files and the same
setuptools give the same bytes. The READMEs that become descriptions get absolute links.
"""

from __future__ import annotations

import argparse
import gzip
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from datetime import datetime
from io import BytesIO
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
HOME = "https://github.com/triward/triward"
RAW = "https://raw.githubusercontent.com/triward/triward"
# Distribution -> its folder, and folders of the checkout with where they are in the wheel.
DISTRIBUTIONS = {
    "triward": ("client", {"client/triward": "triward"}),
    "triward-tools": ("tools", {"tools/triward_tools": "triward_tools"}),
    "triward-server": (
        "",
        {"triward_server": "triward_server", "model_repository": "triward_server/model_repository"},
    ),
}
PACKAGES = ("triward", "triward_tools", "triward_server")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
_ENTRY = re.compile(r"^## (\S+) – \d{4}-\d\d-\d\d$", re.MULTILINE)
# What a folder holds that git would leave out of an export, or that no distribution needs.
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site")


def main() -> None:
    """Build and check; end with a sentence where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="(dist)")
    output = parser.parse_args().output
    if output != ROOT / "dist" and output.exists() and any(output.iterdir()):
        sys.exit(f"release: --output: {output} is not empty")
    if has_git() and (left_out := git("status", "--porcelain").decode().strip()):
        print(f"release: not committed, so not in it:\n{left_out}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "dist")
        version = release(built)
        shutil.rmtree(output, ignore_errors=True)  # of the last release, now that there is another
        shutil.copytree(built, output)
    for path in sorted(output.iterdir()):
        print(f"{path.stat().st_size:>9}  {path.name}")
    print(f"release: {version} is built and checked; nothing was uploaded")


def release(output: Path) -> str:
    """Build into a new folder, check what is there, and return the version."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        export(source)
        version, epoch = the_version(source), the_day(source)
        for directory, _ in DISTRIBUTIONS.values():
            readme = source / directory / "README.md"
            text = absolute_links(readme.read_text(encoding="utf-8"), directory, version, source)
            readme.write_text(text, encoding="utf-8")
        for directory, _ in DISTRIBUTIONS.values():
            build(source / directory, output, epoch)
        check_files(output, version)
        for name in DISTRIBUTIONS:
            check_contents(wheel_of(output, name, version), name, source)
        check_installed(output, version, Path(folder) / "venv")
    return version


def export(folder: Path) -> None:
    """Write the last commit's files, or without git those that are here, into a new folder."""
    if not has_git():
        shutil.copytree(ROOT, folder, ignore=_LEFT_OUT)
        return
    archive = git("archive", "--format=tar", "HEAD")
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def the_version(root: Path) -> str:
    """Return the version, which every distribution must have, and the changelog an entry of."""
    found = {}
    for directory, _ in DISTRIBUTIONS.values():
        path = PurePosixPath(directory, "pyproject.toml")
        found[str(path)] = first(r'^version = "(.+)"$', root / path)
    for _, folders in DISTRIBUTIONS.values():
        path = PurePosixPath(next(iter(folders)), "__init__.py")
        found[str(path)] = first(r'^__version__ = "(.+)"$', root / path)
    if len(set(found.values())) != 1:
        sys.exit(f"release: versions differ: {', '.join(f'{p} {v}' for p, v in found.items())}")
    [version] = set(found.values())
    newest = _ENTRY.search((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    if newest is None or newest[1] != version:
        found_there = newest[1] if newest else "none"
        sys.exit(f"release: CHANGELOG.md: its newest entry is {found_there}, not {version} – DATE")
    return version


def the_day(root: Path) -> int:
    """Return the day of the changelog's newest entry, in seconds since 1970: all files get it."""
    day = first(r"^## \S+ – (\d{4}-\d\d-\d\d)$", root / "CHANGELOG.md")
    return int(datetime.fromisoformat(f"{day}T00:00+00:00").timestamp())


def first(pattern: str, path: Path) -> str:
    """Return what the pattern's group matches first in a file."""
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        sys.exit(f"release: {path}: nothing is like {pattern}")
    return match.group(1)


def absolute_links(text: str, directory: str, version: str, root: Path) -> str:
    """Return Markdown whose relative links lead to the version's tag on GitHub."""

    def absolute(match: re.Match[str]) -> str:
        image, shown, target = match.groups()
        shown = _LINK.sub(absolute, shown)
        path, mark, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            return f"{image}[{shown}]({target})"
        if path:
            path = posixpath.normpath(posixpath.join(directory, path))
            if not (root / path).exists():
                sys.exit(f"release: {directory or '.'}/README.md links to {path}, which is missing")
        else:
            path = posixpath.join(directory, "README.md")
        place = f"{RAW}/v{version}" if image else f"{HOME}/blob/v{version}"
        return f"{image}[{shown}]({place}/{path}{mark}{anchor})"

    return _LINK.sub(absolute, text)


def build(source: Path, output: Path, epoch: int) -> None:
    """Build an sdist, and a wheel from it, with this environment's setuptools."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    before = set(output.glob("*.tar.gz"))
    run(*command, SOURCE_DATE_EPOCH=str(epoch))
    [sdist] = set(output.glob("*.tar.gz")) - before
    repack(sdist, epoch)


def repack(sdist: Path, epoch: int) -> None:
    """Write an sdist anew without times, users and an order of this machine's."""
    with tarfile.open(sdist) as files:
        members = [(m, files.extractfile(m)) for m in files.getmembers()]
        contents = [(m, data.read() if data else b"") for m, data in members]
    packed = BytesIO()
    with (
        gzip.GzipFile("", "wb", fileobj=packed, mtime=epoch) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as files,
    ):
        for member, content in sorted(contents, key=lambda pair: pair[0].name):
            fresh = tarfile.TarInfo(member.name)
            fresh.type, fresh.size, fresh.mtime = member.type, len(content), epoch
            fresh.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            files.addfile(fresh, BytesIO(content))
    sdist.write_bytes(packed.getvalue())


def check_files(output: Path, version: str) -> None:
    """See that there is a wheel and an sdist of each, with metadata that PyPI takes."""
    expected = set()
    for name in DISTRIBUTIONS:
        stem = f"{name.replace('-', '_')}-{version}"
        expected |= {f"{stem}.tar.gz", f"{stem}-py3-none-any.whl"}
    found = {path.name for path in output.iterdir()}
    if found != expected:
        sys.exit(f"release: built {sorted(found)}, not {sorted(expected)}")
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(output.iterdir()))


def wheel_of(output: Path, name: str, version: str) -> Path:
    """Return the path of a distribution's wheel."""
    return output / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"


def check_contents(wheel: Path, name: str, root: Path) -> None:
    """See that a wheel has each file of its packages, and no other."""
    _, folders = DISTRIBUTIONS[name]
    expected = {
        f"{inside}/{path.relative_to(root / folder).as_posix()}"
        for folder, inside in folders.items()
        for path in packaged(root / folder)
    }
    with zipfile.ZipFile(wheel) as files:
        found = {n for n in files.namelist() if ".dist-info/" not in n}
        licensed = [n for n in files.namelist() if n.endswith(".dist-info/licenses/LICENSE")]
    if found != expected:
        missing, strange = sorted(expected - found), sorted(found - expected)
        sys.exit(f"release: {wheel.name} lacks {missing} and has {strange}")
    if not licensed:
        sys.exit(f"release: {wheel.name} has no license")


def packaged(folder: Path) -> Iterator[Path]:
    """Yield files below a folder that belong into a wheel."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and "__pycache__" not in path.parts:
            yield path


def check_installed(output: Path, version: str, folder: Path) -> None:
    """Install the wheels where nothing is, with their dependencies beside, and ask for versions."""
    venv.create(folder)
    python = folder / "bin" / "python"
    wheels = [wheel_of(output, name, version) for name in DISTRIBUTIONS]
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", *wheels)
    at = "from sysconfig import get_path; print(get_path('purelib'), end='')"
    own, ours = (Path(run(each, "-c", at).decode()) for each in (python, sys.executable))
    # Behind the wheels on the path, as this environment has Triward, too.
    (own / "dependencies.pth").write_text(f"import site; site.addsitedir({str(ours)!r})\n")
    for package in PACKAGES:
        code = f"import {package}; print({package}.__file__, {package}.__version__)"
        place, found = run(python, "-c", code, cwd=folder).decode().split()
        if not Path(place).is_relative_to(own) or found != version:
            sys.exit(f"release: installed {package} is {found} at {place}, not {version}")
    for program in ("triward", "triward-server"):
        said = run(folder / "bin" / program, "--version").decode()
        if not said.startswith(f"{program} {version},"):
            sys.exit(f"release: {program} --version says {said!r}, not {version}")
    run(folder / "bin" / "triward", "eval", "--help")  # by an entry point of the tools


def has_git() -> bool:
    """Return True in a checkout; an archive of its files is none."""
    return (ROOT / ".git").exists() and shutil.which("git") is not None


def git(*arguments: str) -> bytes:
    """Return what git says about this checkout, which may be another user's, as in a container."""
    return run("git", "-c", f"safe.directory={ROOT}", *arguments, cwd=ROOT)


def run(*command: object, cwd: Path | None = None, **environment: str) -> bytes:
    """Return a command's output; end with it where the command fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    environment = {**inherited, **environment}
    # Modes of files are in a wheel.
    done = subprocess.run(words, capture_output=True, cwd=cwd, env=environment, umask=0o022)
    if done.returncode:
        shown = (done.stdout + done.stderr).decode(errors="replace")
        sys.exit(f"release: {' '.join(words)}\n{shown}")
    return done.stdout


if __name__ == "__main__":
    main()
