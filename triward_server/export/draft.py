"""The repository's folders: written aside as a whole, then moved to where they are served from."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import typer

from .. import schema
from ..errors import ConfigError
from ..schema import ModelNames
from ..serving.repository import served_models
from .configuration import comparable
from .options import OnnxBackend, Options, Weights

_PACKAGE = Path(__file__).resolve().parent.parent
SOURCE_VERSION = "1"  # of the adapters in `source`
_OLD, _NEW = "old", "new"  # a model on its way out of the output and into it
_ADDED = "added"  # a version on its way into a model that is there
_LOST_AND_FOUND = "lost+found"  # ext4's, in the root of each file system


def source() -> Path:
    """Return the adapters' folder: within an installed package, beside that of a checkout."""
    packaged = _PACKAGE / "model_repository"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "model_repository"


def copy_source(draft: Path, names: ModelNames, version: str, options: Options) -> None:
    """Copy the adapters that the options need, under the model's names and version."""
    shutil.copytree(source(), draft, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "__*"))
    if options.forward.vision != "onnx":
        shutil.rmtree(draft / schema.VISION)
    elif options.triton.vision_backend is OnnxBackend.ONNXRUNTIME:
        (draft / schema.VISION / SOURCE_VERSION / "model.py").unlink()
    for folder in folders(schema.REWARD, draft):
        model = names.ensemble + folder.removeprefix(schema.ENSEMBLE)
        (draft / folder).rename(draft / model)
        (draft / model / SOURCE_VERSION).mkdir(exist_ok=True)  # a wheel has no empty folders
        (draft / model / SOURCE_VERSION).rename(draft / model / version)
    for adapter in draft.glob("*/*/model.py"):
        # In the place of the folder that Python would make there. Triton takes a version whose
        # folder changed for a new one, and loads it again whenever another one comes; its Python
        # heeds no variable that says not to write.
        (adapter.parent / "__pycache__").touch()


def folders(names: ModelNames, repository: Path) -> list[str]:
    """Return a model's folders there. The public one is the last: it makes the others complete."""
    every = (names.vision, *names.steps, names.ensemble)
    return [folder for folder in every if (repository / folder).exists()]


def is_empty(output: Path) -> bool:
    """Return True for a folder without models: a new volume's, with what file systems put there."""
    return all(path.name == _LOST_AND_FOUND or path.name[0] == "." for path in output.iterdir())


def room(output: Path) -> Path:
    """Return the folder for drafts: beside the output, or inside it where that is a mount.

    A rename, which completes an export, cannot enter a mount. What is beside it, such as the root
    of a container, may be read-only besides.

    Raises:
        ConfigError: nothing can be written there.
    """
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
    place = output if output.exists() and not _takes_moves(output) else output.parent
    try:
        _new_folder(output, place).rmdir()
    except OSError as error:
        raise ConfigError(
            f"--output {output}: user {os.getuid()} cannot write in {place} ({error.strerror}); "
            "run as its owner (in a container: docker run --user) or give it away"
        ) from None
    return place


def _takes_moves(output: Path) -> bool:
    """Return True if a folder beside the output can be moved into it."""
    with suppress(OSError):
        probe = _new_folder(output, output.parent)
        try:
            moved = probe.rename(output / probe.name)
        except OSError:
            probe.rmdir()
        else:
            moved.rmdir()
            return True
    return False


def _new_folder(output: Path, place: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=place))


@contextmanager
def alone(output: Path) -> Iterator[Path]:
    """Yield a folder to write in; wait while another export into this output has it.

    A killed export's folder is still there. What it was moving into the output is moved to the end,
    or back where its own model was not complete.

    Raises:
        ConfigError: nothing can be written or locked there.
    """
    place = room(output)
    work = place / f".{output.name}.export"
    # In a mount the file stays: another node would see late that it was removed.
    with _locked(place / f".{output.name}.lock", output, keep=place == output):
        _complete(work, output)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(file: Path, output: Path, *, keep: bool) -> Iterator[None]:
    while True:
        with file.open("w") as lock:
            _wait_for(lock, output)
            if os.fstat(lock.fileno()).st_nlink:  # who had it has not removed it
                try:
                    yield
                finally:
                    if not keep:
                        file.unlink()
                return


def _wait_for(lock: IO[str], output: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        typer.echo(f"{output}: another export writes there; waiting for its end", err=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise ConfigError(
            f"--output {output}: {lock.name} cannot be locked ({error.strerror}), so that two "
            "exports could write there at once; choose another file system"
        ) from None


@contextmanager
def written_whole(
    output: Path, names: ModelNames, version: str | None, work: Path
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `output` if the block succeeds and vanishes if not.

    If `output` is there already, the model in it becomes part of that: beside the others, or with
    None for a version in the place of the one that has its name. A model that is there gets the
    version.

    Args:
        output: the repository.
        names: of the model.
        version: of the model.
        work: of `alone`.
    """
    draft = work / "draft"
    draft.mkdir()
    draft.chmod(0o755)
    yield draft
    if not output.exists():
        draft.rename(output)
    elif version and not is_empty(output) and names in served_models(output):
        _add_version(draft, output, names, work)
    else:
        _put_model(draft, output, names, work)


def _add_version(draft: Path, output: Path, names: ModelNames, work: Path) -> None:
    """Move a version's folders to a model that is there."""
    *steps, _ = folders(names, draft)
    for model in steps:
        # A model's configuration is all its versions': Triton would load them all again. Which one
        # is loaded stays as it is.
        file = f"{model}/config.pbtxt"
        if not (output / file).is_file() or comparable(draft / file) != comparable(output / file):
            raise ConfigError(
                f"{file} would change with this version's options, for the running versions too; "
                "use the same options, or another repository"
            )
    with ExitStack() as undo:
        _move(draft, work / _ADDED, undo)  # if this export is killed, `_complete` goes on from here
        _put_versions(work / _ADDED, output, undo)
        undo.pop_all()


def _put_model(draft: Path, output: Path, names: ModelNames, work: Path) -> None:
    """Move a model's folders into a repository, in the place of those that have their names."""
    old, new = work / _OLD, work / _NEW
    old.mkdir()
    with ExitStack() as undo:
        for model in reversed(folders(names, output)):
            _move(output / model, old / model, undo)
        _move(draft, new, undo)  # if this export is killed, `_complete` goes on from here
        _put_folders(new, output, undo)
        undo.pop_all()
    shutil.rmtree(old)  # before `new`, without which it would be put back


def _put_folders(new: Path, output: Path, undo: ExitStack) -> None:
    """Move a model's folders; the public one, with whose name the others begin, last."""
    if (output / schema.DRAINING).exists() and (new / schema.DRAINING).exists():
        shutil.rmtree(new / schema.DRAINING)
    every = sorted(new.iterdir(), key=lambda at: (at.name == schema.DRAINING, at.name))
    for folder in reversed(every):
        _move(folder, output / folder.name, undo)


def _put_versions(added: Path, output: Path, undo: ExitStack) -> None:
    """Move a version of each model; the public one's, with whose name the others begin, last."""
    for model in sorted(added.iterdir(), reverse=True):
        if model.name != schema.DRAINING:
            for version in filter(Path.is_dir, model.iterdir()):
                _move(version, output / model.name / version.name, undo)


def _complete(work: Path, output: Path) -> None:
    """End what a killed export began to move, forwards if its own folders were on their way."""
    for name, put in ((_NEW, _put_folders), (_OLD, _put_folders), (_ADDED, _put_versions)):
        if (work / name).is_dir():
            with ExitStack() as undo:
                put(work / name, output, undo)
                undo.pop_all()
            return


def _move(source: Path, target: Path, undo: ExitStack) -> None:
    source.rename(target)
    undo.callback(target.rename, source)


def link_or_copy(files: Iterable[Path], folder: Path, how: Weights) -> None:
    """Link or copy files into a folder; what cannot be linked is copied."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if how is Weights.LINK and _hard_link(file.resolve(), folder / file.name):
            continue
        shutil.copyfile(file, folder / file.name)


def _hard_link(source: Path, target: Path) -> bool:
    """Make a link; return False where file systems do not allow it."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        typer.echo(f"{source.name}: copied, a link is not possible ({error.strerror})", err=True)
        return False
    return True
