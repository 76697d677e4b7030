"""Jobs that write a folder and can be resumed: the manifest, and files that are whole.

A manifest says what the folder's content depends on. A job that differs is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from triward.errors import InvalidRequest


class JobMismatch(InvalidRequest):
    """The output folder was begun with other input or other settings, or is no job's at all."""


def pin_manifest(output: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into a new folder, or compare with the one that is there.

    One of a job that has finished nothing, as when it was begun with a wrong model, is replaced.

    Args:
        output: the job's folder; made if it is not there.
        name: of the manifest's file.
        manifest: what JSON can hold.

    Raises:
        JobMismatch: the folder is another job's; the message names what differs.
    """
    path = output / name
    if path.exists():
        begun = _read(path)
        differing = [key for key in {**begun, **manifest} if begun.get(key) != manifest.get(key)]
        if not differing:
            return
        if not _nothing_finished(output, path) or "format" not in begun:
            key = differing[0]
            was, now = begun.get(key), manifest.get(key)
            raise JobMismatch(
                f"{output} was begun with {key} = {was!r}, now it is {now!r}; "
                "remove it, or name another output"
            )
    output.mkdir(parents=True, exist_ok=True)
    if not path.exists() and any(entry.suffix != ".tmp" for entry in output.iterdir()):
        raise JobMismatch(f"{output} is not empty, and has no {name}; name another output")
    with whole_file(path) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def check_apart(source: Path, output: Path) -> None:
    """See that an output would not be read as input, whatever links or dots lead to it.

    Raises:
        InvalidRequest: it lies in the folder that is the input.
    """
    folder, real = source.resolve(), output.resolve()
    if folder.is_dir() and folder in (real, *real.parents):
        raise InvalidRequest(f"the output {output} lies in the input")


def fingerprint(path: Path) -> str:
    """Return a file's size and the digest of its whole content, for a manifest."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return f"{size} bytes, sha256 {digest.hexdigest()}"


def footer_fingerprint(path: Path) -> str:
    """Return a Parquet file's size and footer as text, for a manifest.

    A footer says where in the file each column of each row group lies, how long it is, and what its
    extremes are. Other rows change it, and it is short however long the file is.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - 8)
        length = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - length)
        return f"{size} bytes, {hashlib.sha256(file.read()).hexdigest()}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about; that of a write, as on a full disk, does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def whole_file(path: Path, scratch: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that is at `path` once it is complete and on disk, and never before.

    Args:
        path: where it will be.
        scratch: folder for it until then, where what a killed process left is removed some day;
            else, and if that is another file system's, it is beside `path`.
    """
    near = scratch is not None and scratch.stat().st_dev == path.parent.stat().st_dev
    folder = scratch if scratch is not None and near else path.parent
    temporary = folder / f".{path.name}.{uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def row_bar(wanted: bool, done: int = 0, total: int | None = None) -> Any:
    """Return a bar of tqdm's on standard error that counts rows, from what is done on."""
    from tqdm.auto import tqdm

    return tqdm(initial=done, total=total, unit="row", disable=not wanted)


def _nothing_finished(output: Path, manifest: Path) -> bool:
    """Return True if nothing in the folder but the manifest holds anything that is whole."""
    others = (entry for entry in output.iterdir() if entry != manifest and entry.suffix != ".tmp")
    return all(entry.is_file() and not entry.stat().st_size for entry in others)


def _read(path: Path) -> dict[str, Any]:
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise JobMismatch(f"{path} is no manifest: {error}") from error
    if not isinstance(begun, dict):
        raise JobMismatch(f"{path} is no manifest: it holds no object")
    return begun
