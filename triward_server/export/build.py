"""Checkpoint -> ready-to-serve Triton model repository: `triward-server export`.

Checks every tensor first, so that nothing random is ever served, and compares a few scores with
transformers' own. Scores one small request, which `triward-server health --deep` asks again. Writes
to a temporary folder beside the output and renames it, so that there is never half a repository.
Exports into one output wait for each other.
The result holds everything but Python packages and can be moved or mounted elsewhere.

`--version 2` on a repository that has version 1 puts the new one beside it; the served version
stays as it is until `triward-server switch`.

`--name` puts several models into one repository, each with versions, options and memory of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import typer
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

from .. import __version__, schema
from ..backend.onnx_runner import VISION_FILE
from ..backend.triton_io import CHECKPOINT_DIRECTORY
from ..engine import checkpoint, weights
from ..engine.scoring import Scorer
from ..engine.towers import CHANNELS
from ..errors import ConfigError, LaunchError, TriwardError
from ..intake.ixc import FONT
from ..intake.preprocess import Preprocessor
from ..schema import ModelNames
from ..serving.canary import TOLERANCE, Canary
from ..serving.integrity import MANIFEST, describe, read_manifest
from ..serving.repository import pin, served_models, versions
from . import calibration, verify
from .calibration import OrderKept
from .configuration import configure, configure_vision
from .draft import alone, copy_source, folders, is_empty, link_or_copy, written_whole
from .onnx import export_vision
from .options import Options, Template, Weights
from .prepared import may_be_polar, prepared

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# What the processor and the configuration are read from; weights come on top.
PROCESSOR_FILES = (
    "config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", FONT,
)  # fmt: skip
PACKAGES = ("torch", "transformers", "tokenizers", "qwen-vl-utils", "pillow", "av", "numpy")


def build(options: Options) -> None:
    """Write a repository, or another model or version into it.

    Raises:
        TriwardError: the checkpoint or an option is wrong; nothing was written.
    """
    wanted = options.export
    names, version = model_names(wanted.name), str(wanted.version)
    _say_where(options)
    with alone(wanted.output) as work:  # before gigabytes are downloaded
        _check_output(wanted.output, names, version, wanted.force)
        source, commit = _resolve(wanted.checkpoint, wanted.revision)
        _say_template(source, wanted.template)
        place = work if wanted.lora else None
        with prepared(source, wanted.lora, place, wanted.template) as folder:
            _build(folder, commit, names, version, options, work)


def _build(
    folder: Path, commit: str | None, names: ModelNames, version: str, options: Options, work: Path
) -> None:
    wanted = options.export
    checkpoint.check_tensors(folder)
    # Here the processor's files are tried, wherever they will run.
    preprocessor = Preprocessor(folder, replace(options.preprocess, device="cpu"))
    preprocessor.warm_up()
    if wanted.verify:
        _verify(folder, options)
    calibrated = _calibrate(folder, preprocessor, options)
    canary = _canary(folder, preprocessor, options, calibrated)
    with written_whole(wanted.output, names, None if wanted.force else version, work) as draft:
        copy_source(draft, names, version, options)
        configure(draft, names, options)
        graph = _write_vision(folder, draft, names, version, options)
        pin(draft, version, names)
        contents = [*_place_files(folder, draft, names, version, wanted.weights), *graph]
        manifest = _manifest(commit, contents, options)
        if calibrated:
            manifest["calibration"] = asdict(calibrated)
        public = draft / names.ensemble / version
        (public / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        canary.write(public)


def _place_files(
    folder: Path, draft: Path, names: ModelNames, version: str, how: Weights
) -> list[tuple[str, Path]]:
    """Put the checkpoint's files where the steps read them; their names in the manifest."""
    tensors = weights.weight_files(folder)
    files = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    index = [p for p in [folder / weights.INDEX_FILE] if p.is_file()]
    link_or_copy(files, draft / names.preprocess / version / CHECKPOINT_DIRECTORY, Weights.COPY)
    target = draft / names.forward / version / CHECKPOINT_DIRECTORY
    link_or_copy([*files, *index], target, Weights.COPY)
    link_or_copy(tensors, target, how)
    read = {"preprocess": files, "forward": [*files, *index, *tensors]}
    return [
        (f"{role}/{CHECKPOINT_DIRECTORY}/{file.name}", file)
        for role, placed in read.items()
        for file in placed
    ]


def _write_vision(
    folder: Path, draft: Path, names: ModelNames, version: str, options: Options
) -> list[tuple[str, Path]]:
    """Export the vision tower if it is to be served; the graph's files, by name in the manifest."""
    if options.forward.vision != "onnx":
        return []
    target = draft / names.vision / version
    tower, _ = checkpoint.load_vision(folder)
    export_vision(tower, target)
    patch = CHANNELS * tower.cut.frames * tower.cut.patch_size**2
    configure_vision(draft, names, patch, tower.config.out_hidden_size, options)
    return [(f"vision/{file.name}", file) for file in sorted(target.glob(f"{VISION_FILE}*"))]


def model_names(name: str) -> ModelNames:
    """Return the names of a model with this public one.

    Raises:
        ConfigError: it cannot be one, or could be mistaken for another model's step.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: 1 to 64 of A-Z a-z 0-9 _ . -, the first a letter or digit"
        )
    for suffix in schema.SUFFIXES:
        if name.endswith(suffix):
            raise ConfigError(f"--name {name!r}: names that end in {suffix} are taken by models")
    return ModelNames(name)


def _check_output(output: Path, names: ModelNames, version: str, force: bool) -> None:
    if not output.exists() or is_empty(output):
        return
    ours = [each for each in served_models(output) if _is_ours(output, each)]
    if not ours:
        raise ConfigError(f"{output} is not a repository (no {MANIFEST} of ours) and is left alone")
    taken = folders(names, output)
    if taken and names not in ours:
        raise ConfigError(
            f"{output / taken[0]} is no model of ours (no {MANIFEST}); --name another, or delete "
            "what a removed model has left"
        )
    if taken and not force and version in versions(output, names):
        raise ConfigError(
            f"{output} exists and has version {version} of {names.ensemble}; --version adds "
            "another, --force replaces all of this model, --name adds a model"
        )


def _is_ours(repository: Path, names: ModelNames) -> bool:
    """Return True if an export wrote a model."""
    for version in versions(repository, names):
        with suppress(LaunchError):  # somebody else's
            read_manifest(repository, names, version)
            return True
    return False


def _canary(
    folder: Path, preprocessor: Preprocessor, options: Options, calibrated: OrderKept | None
) -> Canary:
    """Score a request, with an image if the model reads any, of two responses, if allowed."""
    picture = BytesIO()
    Image.linear_gradient("L").resize((28, 28)).convert("RGB").save(picture, "PNG")
    image = [{"type": "image"}] if preprocessor.reads_images else []
    content = [*image, {"type": "text", "text": "Does it get brighter downwards?"}]
    reference = {"reference": "Yes."} if preprocessor.needs_reference else {}
    canary = Canary(
        messages=json.dumps([{"role": "user", "content": content, **reference}]),
        responses=("Yes, from black to white.", "No.")[: options.preprocess.max_responses],
        media=(picture.getvalue(),) * len(image),
        scores=None,
        tolerance=calibrated.tolerance if calibrated else TOLERANCE[options.forward.dtype],
    )
    features = preprocessor.features(
        canary.messages.encode(), [text.encode() for text in canary.responses], canary.media
    )
    if preprocessor.knows_the_date:
        typer.echo(
            "the chat template writes the day's date, so scores change with it: deep health checks "
            "see that the canary has a score, not which",
            err=True,
        )
    if preprocessor.knows_the_date or not options.export.canary:
        weights.check_finite(folder)  # as the scorer does when it loads
        return canary
    scorer = Scorer(folder, replace(options.forward, device=_device(options), compile=False))
    [scored] = scorer.score([features])
    if isinstance(scored, TriwardError):
        raise scored
    return replace(canary, scores=tuple(scored.scores.tolist()))


def _verify(folder: Path, options: Options) -> None:
    """Compare a few scores with the reference's; raise `CheckpointError` if they differ."""
    report = verify.verify(folder, torch.device(_device(options)), small=True)
    verify.require_agreement(report)
    typer.echo(
        f"verified: {len(report.rows)} scores are those of {report.referee} to "
        f"{report.largest:.0e}, in {report.seconds:.1f} s; triward-server verify asks more, "
        "--no-verify none",
        err=True,
    )


def _calibrate(folder: Path, preprocessor: Preprocessor, options: Options) -> OrderKept | None:
    """Return what a float8 model has shown; raise `ConfigError` if that is too little."""
    if options.forward.dtype != "float8":
        return None
    device, file = torch.device(_device(options)), options.export.calibration
    found = calibration.calibrate(folder, preprocessor, device, file)
    calibration.require_order(found)
    typer.echo(f"calibrated: {found}", err=True)
    return found


def _device(options: Options) -> str:
    """Return the device that will serve if this machine has it, or else the CPU."""
    return options.forward.device if torch.cuda.is_available() else "cpu"


def _say_where(options: Options) -> None:
    """Say which GPUs will serve, or that there are none here."""
    if options.placement.device == "cpu":
        return
    devices = options.triton.devices
    flag = f"--devices {devices}" if devices else f"--device {options.forward.device}"
    if not torch.cuda.is_available():
        typer.echo(
            f"{flag}: this machine has no CUDA GPU; the repository will serve only "
            "where there is one. For this machine: --device cpu",
            err=True,
        )
        return
    there = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    wanted = [f"cuda:{number}" for number in options.placement.gpus] or list(there)
    if not set(wanted) <= set(there):
        typer.echo(f"{flag}: this machine has {', '.join(there)} only", err=True)
        return
    used = {name: there[name] for name in wanted}
    typer.echo(
        f"{flag}: will serve on {', '.join(f'{k} ({v})' for k, v in used.items())}"
        f"{', an instance on each' if len(used) > 1 else ''}",
        err=True,
    )


def _say_template(source: Path, template: Template | None) -> None:
    """Warn where the template is InternLM2-Reward's or POLAR's, and none was named."""
    if may_be_polar(source) and template is None:
        typer.echo(
            "warning: InternLM2-Reward and POLAR have the same class, and this export takes the "
            "checkpoint's chat template. If it is POLAR, its scores will be wrong: export with "
            "--template polar. If not, --template checkpoint ends this warning",
            err=True,
        )


def _resolve(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the local folder of a checkpoint, and its commit if it came from the hub."""
    if Path(source).is_dir():
        if revision is not None:
            raise ConfigError(f"--revision {revision}: {source} is a folder and has no revisions")
        return Path(source).resolve(), None
    try:
        patterns = [*PROCESSOR_FILES, "*.safetensors", weights.INDEX_FILE, "value_head.bin"]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{source}: neither a folder nor available on the hub: {reason}"
        ) from None
    return folder, folder.name


def _manifest(
    commit: str | None, contents: Iterable[tuple[str, Path]], options: Options
) -> dict[str, Any]:
    files = describe(contents)
    return {
        "source": options.export.checkpoint,
        "revision": commit,
        "lora": str(options.export.lora) if options.export.lora else None,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "triward_server": __version__,
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "options": {
            "preprocess": asdict(options.preprocess),
            "forward": asdict(options.forward),
            **asdict(options.triton),
        },
        "files": files,
        # By name alone, for who compares checkpoints.
        "sha256": {PurePosixPath(name).name: entry["sha256"] for name, entry in files.items()},
    }
