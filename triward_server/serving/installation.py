"""Find a `tritonserver` that runs on this machine.

In NVIDIA's container `tritonserver` is on PATH and used as it is. Elsewhere the one in the
nvidia-pytriton wheel is assembled into something that serves an ordinary model repository: its
Python backend and the stub that matches this interpreter, in one temporary folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..errors import LaunchError


@dataclass(frozen=True)
class Installation:
    """A runnable Triton: its executable, the flags it needs and its environment."""

    executable: str
    flags: tuple[str, ...]
    environment: dict[str, str]


def find_triton(cleanup: ExitStack) -> Installation:
    """Return the `tritonserver` on PATH, or else the wheel's.

    Args:
        cleanup: takes over the temporary folder that the wheel's needs.

    Raises:
        LaunchError: there is none, or it cannot run here; says what to install.
    """
    executable = shutil.which("tritonserver")
    if executable is not None:
        return Installation(executable, (), dict(os.environ))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise LaunchError(
            "no tritonserver on PATH and no nvidia-pytriton installed; use NVIDIA's Triton "
            "container, or: pip install 'triward-server[embedded]'"
        )
    if int(version("numpy").split(".")[0]) >= 2:
        raise LaunchError(
            f"numpy {version('numpy')} silently breaks the Python backend of nvidia-pytriton's "
            "Triton; pip install 'numpy<2'"
        )
    package = Path(spec.origin).parent
    return _from_wheel(package, Path(cleanup.enter_context(tempfile.TemporaryDirectory())))


def _from_wheel(package: Path, folder: Path) -> Installation:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    triton = package / "tritonserver"
    stub = triton / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted(p.name for p in stub.parent.parent.iterdir())
        raise LaunchError(f"nvidia-pytriton has no stub for Python {python}, only {known}")
    library = _python_library()
    backend = folder / "backends" / "python"
    shutil.copytree(triton / "backends" / "python", backend)
    shutil.copy(stub, backend)
    environment = dict(os.environ)
    libraries = [str(library.parent), str(package.parent / "nvidia_pytriton.libs")]
    _prepend(environment, "LD_LIBRARY_PATH", libraries)
    # The stub is an embedded interpreter: it finds its packages through the `python3` on PATH.
    _prepend(environment, "PATH", [str(Path(sys.executable).parent)])
    return Installation(
        executable=str(triton / "bin" / "tritonserver"),
        flags=(f"--backend-directory={backend.parent}",),
        environment=environment,
    )


def _python_library() -> Path:
    """Return the shared library of this interpreter, which the stub links against."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    library = Path(sysconfig.get_config_var("LIBDIR") or "", name)
    if not library.is_file():
        raise LaunchError(
            f"this Python has no {name} (looked in {library.parent}), which Triton's Python "
            "backend needs; use a Python built with --enable-shared, such as the distribution's "
            "python3 with its libpython3 package"
        )
    return library


def _prepend(environment: dict[str, str], name: str, folders: list[str]) -> None:
    rest = [environment[name]] if environment.get(name) else []
    environment[name] = os.pathsep.join([*folders, *rest])
