"""The manifest of a version, and whether its files are still those that were exported.

`<model>/<version>/manifest.json` says under `files`, for each file of the version's steps,

    bytes    its size
    sha256   of its whole content
    sampled  SHA-256 of 64 blocks of 64 KiB, the first at its beginning, the last at its end, the
             others evenly between (block i at i * (bytes - 65536) // 63); of the whole content
             where that is no more

`full` compares whole contents; `sampled` sizes and blocks, which takes milliseconds for any size
and finds files that are cut short, mixed up or of another checkpoint, not every flipped bit. A file
that the manifest does not name is an error, too: a `value_head.safetensors` that appears in a
checkpoint's folder would change all scores.
A manifest of an earlier release has `sha256` by file name alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from .. import __version__
from ..errors import LaunchError
from ..schema import DRAINING, ModelNames
from .canary import FILE, Canary
from .repository import loads_all, pin, pinned, served_models

MANIFEST = "manifest.json"

_BLOCKS, _BLOCK = 64, 1 << 16
_IMPORT = re.compile(r"^from (triward_server[\w.]*) import", re.MULTILINE)
_ROLES = ("preprocess", "forward", "vision")
# What a version's folders hold besides: the adapter; and what Python makes, or an export puts there
# so that Python does not.
_UNNAMED = {"model.py", "__pycache__"}


class Verify(str, Enum):
    """Ways to compare a version's files with its manifest."""

    FULL = "full"
    SAMPLED = "sampled"
    OFF = "off"


@dataclass(frozen=True)
class Checked:
    """Effort of a comparison that found nothing wrong.

    Attributes:
        how: `full` or `sampled`.
        files: that were looked at.
        size: their bytes, all together.
        read: bytes that were read of them.
        seconds: it took.
        old: whether the manifest, of an earlier release, has no sizes.
    """

    how: Verify
    files: int
    size: int
    read: int
    seconds: float
    old: bool

    def __str__(self) -> str:
        """Return a line for an operator."""
        text = (
            f"{self.files} files verified ({self.how.value}): read {self.read:,} of "
            f"{self.size:,} bytes in {self.seconds:.2f} s"
        )
        if self.old and self.how is Verify.SAMPLED:
            text += "; its manifest, of an earlier release, has no sizes: --verify full compares"
        return text


def describe(files: Iterable[tuple[str, Path]]) -> dict[str, dict[str, Any]]:
    """Return the manifest's `files`, of pairs of `<role>/<path in the version>` and a file."""
    return {
        name: {
            "bytes": path.stat().st_size,
            "sha256": _digest(path, Verify.FULL)[0],
            "sampled": _digest(path, Verify.SAMPLED)[0],
        }
        for name, path in files
    }


def read_manifest(repository: Path, names: ModelNames, version: str) -> dict[str, Any]:
    """Return a version's manifest.

    Raises:
        LaunchError: there is none of ours, or it is damaged.
    """
    where = f"{names.ensemble}/{version}/{MANIFEST}"
    try:
        fields = json.loads((repository / where).read_text())
    except FileNotFoundError:
        raise LaunchError(f"{where}: missing") from None
    except (OSError, ValueError) as error:
        raise LaunchError(f"{where}: {type(error).__name__}: {error}") from None
    if not isinstance(fields, dict) or "triward_server" not in fields:
        raise LaunchError(f"{where}: no manifest of ours")
    return fields


def check_version(repository: Path, names: ModelNames, version: str, how: Verify) -> Checked:
    """Compare a version's files with its manifest.

    Args:
        repository: where it is.
        names: of which model.
        version: which one.
        how: `full` or `sampled`.

    Raises:
        LaunchError: the first file that is wrong, and what is wrong with it.
    """
    begun = time.monotonic()
    manifest = read_manifest(repository, names, version)
    Canary.of(repository, version, names)
    for step in names.steps:
        if not (repository / step / version / "model.py").is_file():
            raise LaunchError(f"{step}/{version}/model.py: missing")
    _check_imports(repository, names, version)
    count = size = read = 0
    named = [*_expected(repository, names, version, manifest)]
    if "files" in manifest:
        _check_nothing_else(repository, names, version, {file for file, _ in named})
    for file, expected in named:
        where = file.relative_to(repository)
        try:
            read += _compare(file, expected, how)
            size += file.stat().st_size
        except FileNotFoundError:
            raise LaunchError(f"{where}: missing") from None
        except (LaunchError, OSError) as error:
            raise LaunchError(f"{where}: {error}") from None
        count += 1
    return Checked(how, count, size, read, time.monotonic() - begun, "files" not in manifest)


def _check_imports(repository: Path, names: ModelNames, version: str) -> None:
    """Raise `LaunchError` if adapters of another release import what this one does not have."""
    places = [*((step, version) for step in (*names.steps, names.vision)), (DRAINING, "*")]
    for model, number in places:
        for file in sorted(repository.glob(f"{model}/{number}/model.py")):
            missing = [name for name in _IMPORT.findall(file.read_text()) if not _is_there(name)]
            if missing:
                raise LaunchError(
                    f"{file.relative_to(repository)}: written by another release: triward-server "
                    f"{__version__} has no module {missing[0]}; export it again, into another "
                    "folder"
                )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its package
        return False


def check_served(repository: Path, how: Verify, say: Callable[[str], None]) -> None:
    """Check, before a server starts, that everything it will load is whole.

    Args:
        repository: what will be served.
        how: `off` compares nothing.
        say: takes a line for each model, and one for each version that is broken and not served.

    Raises:
        LaunchError: a served version is broken, or Triton would load a broken one beside it.
    """
    for names in served_models(repository):
        served = pinned(repository, names)
        broken: dict[str, LaunchError] = {}
        checked = None
        try:
            if how is Verify.OFF:
                _check_imports(repository, names, served)
            else:
                checked = check_version(repository, names, served, how)
        except LaunchError as error:
            raise LaunchError(
                f"{names.ensemble}: version {served}, which is served, is broken: {error}"
            ) from None
        if checked:
            say(f"{names.ensemble}: version {served}: {checked}")
            broken = _broken(repository, names, served)
            for version, fault in broken.items():
                say(f"{names.ensemble}: version {version} is broken, and not served: {fault}")
        if loads_all(repository, names):
            _load_served_only(repository, names, served, list(broken))


def _broken(repository: Path, names: ModelNames, served: str) -> dict[str, LaunchError]:
    """Versions that nobody serves, and what is wrong with them."""
    folders = (names.ensemble, *names.steps)
    found = {p.name for f in folders for p in (repository / f).iterdir() if p.name.isdecimal()}
    broken = {}
    for version in sorted(found - {served}, key=int):
        try:
            check_version(repository, names, version, Verify.SAMPLED)
        except LaunchError as error:
            broken[version] = error
    return broken


def _load_served_only(repository: Path, names: ModelNames, served: str, broken: list[str]) -> None:
    """Bring a repository of an earlier release, whose steps load every version, up to date."""
    try:
        pin(repository, served, names)
    except OSError as error:
        if broken:  # otherwise it is served as it always was
            raise LaunchError(
                f"{names.ensemble}: the configuration of its steps, of an earlier release, loads "
                f"the broken version {', '.join(broken)}, too, and cannot be changed "
                f"({error.strerror}): delete that version's folders, or serve the repository once "
                "where it is writable"
            ) from None


def _expected(
    repository: Path, names: ModelNames, version: str, manifest: dict[str, Any]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every file that a version must have, with its entry."""
    folders = {role: repository / f"{names.ensemble}_{role}" / version for role in _ROLES}
    try:
        if "files" in manifest:
            for name, entry in manifest["files"].items():
                role, *rest = PurePosixPath(name).parts
                entry = {key: entry[key] for key in ("bytes", "sha256", "sampled")}
                yield folders[role].joinpath(*rest), entry
            return
        for name, digest in manifest["sha256"].items():
            places = [folders[role] / "checkpoint" / name for role in ("preprocess", "forward")]
            places.append(folders["vision"] / name)
            there = [place for place in places if place.is_file()]
            for place in there or places[1:2]:
                yield place, {"sha256": digest}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        where = f"{names.ensemble}/{version}/{MANIFEST}"
        raise LaunchError(f"{where}: {type(error).__name__}: {error}") from None


def _check_nothing_else(
    repository: Path, names: ModelNames, version: str, named: Collection[Path]
) -> None:
    """Raise `LaunchError` for a file in a version's folders that its manifest does not name."""
    known = {repository / names.ensemble / version / name for name in (MANIFEST, FILE)} | {*named}
    for model in (names.ensemble, *names.steps, names.vision):
        top = repository / model / version
        for folder, directories, files in os.walk(top, followlinks=True):
            if Path(folder) == top:
                directories[:] = {*directories} - _UNNAMED
                files = [name for name in files if name not in _UNNAMED]
            unknown = sorted({Path(folder, name) for name in files} - known)
            if unknown:
                raise LaunchError(
                    f"{unknown[0].relative_to(repository)}: not in the manifest of version "
                    f"{version}; delete it, or export the version again"
                )


def _compare(file: Path, expected: dict[str, Any], how: Verify) -> int:
    """Bytes that were read; raises `LaunchError` for what differs."""
    size = file.stat().st_size
    if "bytes" not in expected:
        _check_length(file, size)
    elif size != expected["bytes"]:
        raise LaunchError(f"{size:,} bytes, {expected['bytes']:,} at export")
    kind = "sha256" if how is Verify.FULL else "sampled"
    if kind not in expected:
        return 0
    digest, read = _digest(file, how)
    if digest != expected[kind]:
        raise LaunchError(f"not what was exported: {kind} {digest[:12]}…, {expected[kind][:12]}…")
    return read


def _check_length(file: Path, size: int) -> None:
    """Check the length of a safetensors file by its header, which says where its data end."""
    if file.suffix != ".safetensors":
        return
    with file.open("rb") as stream:
        try:
            [length] = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)))
            ends = [entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__"]
        except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
            raise LaunchError(f"no safetensors header: {type(error).__name__}") from None
    if (whole := 8 + length + max(ends, default=0)) != size:
        raise LaunchError(f"{size:,} bytes, {whole:,} by its header")


def _digest(file: Path, how: Verify) -> tuple[str, int]:
    """Return a file's SHA-256, of all or of the sampled blocks, and how many bytes it read."""
    digest, read = hashlib.sha256(), 0
    size = file.stat().st_size
    with file.open("rb") as stream:
        if how is Verify.SAMPLED and size > _BLOCKS * _BLOCK:
            for index in range(_BLOCKS):
                stream.seek(index * (size - _BLOCK) // (_BLOCKS - 1))
                block = stream.read(_BLOCK)
                digest.update(block)
                read += len(block)
        else:
            while block := stream.read(1 << 20):
                digest.update(block)
                read += len(block)
    return digest.hexdigest(), read
