"""An echo repository: what starts in a second and answers as a server does, without a model.

For tests of everything around the model: starting, stopping, watching, switching, failing. It is
an exported repository with the same configurations, manifests and checkpoint files, in which two
adapters import `echo_models` in place of the real backends. Its log and its manifest say so.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from ..schema import REWARD, ModelNames
from ..serving.canary import Canary
from ..serving.integrity import MANIFEST, describe, read_manifest
from . import echo_models

_BACKEND = re.compile(r"from triward_server\.\S+ import (\w+Backend)$", re.MULTILINE)


def make_echo(repository: Path, names: ModelNames = REWARD, version: str = "1") -> None:
    """Turn an exported version of a model into an echo.

    Its scores depend on the checkpoint's weights, so two checkpoints have two opinions.

    Args:
        repository: what the export wrote.
        names: of which model.
        version: which one.
    """
    manifest = read_manifest(repository, names, version)
    weights = {k: v for k, v in manifest["sha256"].items() if k.endswith(".safetensors")}
    checkpoint = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
    settings = repository / names.forward / version / echo_models.SETTINGS
    settings.write_text(json.dumps({"checkpoint": checkpoint}))
    manifest["files"] |= describe([(f"forward/{settings.name}", settings)])
    for step in names.steps:
        adapter = repository / step / version / "model.py"
        text, count = _BACKEND.subn(rf"from {echo_models.__name__} import \1", adapter.read_text())
        assert count == 1, f"{adapter} imports its backend otherwise"
        adapter.write_text(text)
    public = repository / names.ensemble / version
    (public / MANIFEST).write_text(json.dumps({**manifest, "echo": True}, indent=2) + "\n")
    canary = Canary.of(repository, version, names)
    replace(canary, scores=echo_scores(canary, checkpoint)).write(public)


def echo_scores(canary: Canary, checkpoint: str) -> tuple[float, ...]:
    """Return what an echo answers to a canary."""
    found = echo_models.digest_features(
        canary.messages.encode(), [text.encode() for text in canary.responses], canary.media
    )
    return tuple(
        echo_models.digest_score(checkpoint, found.prompt_ids, each) for each in found.response_ids
    )


def fault(repository: Path, name: str, value: str = "") -> None:
    """Make an echo's forward model fail from its next batch on.

    Args:
        repository: that is served; it may be gone by now.
        name: `hang`, `crash`, `error` (the value is its message), `nan`, `drift` (by the value)
            or `delay` (by so many seconds a request); `drift@reward_forward_0_1` of one instance.
        value: what the fault takes.
    """
    folder = repository.resolve()
    folder = folder.with_name(f"{folder.name}.faults")
    folder.mkdir(exist_ok=True)
    draft = folder / f".{name}"
    draft.write_text(value)
    draft.replace(folder / name)  # nobody reads half of it
