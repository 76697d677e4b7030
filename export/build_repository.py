"""Checkpoint -> ready-to-serve Triton model repository.

    python export/build_repository.py --checkpoint DIR_OR_HUB_ID --output DIR

Checks every tensor first, so that nothing random is ever served, and compares a few scores with
transformers' own. Scores one small request, which `triward-server health --deep` asks again. Writes
to a temporary folder beside the output and renames it, so that there is never half a repository.
The result holds everything but Python packages and can be moved or mounted elsewhere.

`--version 2` on a repository that has version 1 puts the new one beside it; the served version
stays as it is until `triward-server switch`.

`--name` puts several models into one repository, each with versions, options and memory of its own.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from enum import Enum
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
import typer
from google.protobuf import text_format
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from tritonclient.grpc import model_config_pb2

from triward_server import __version__, contract, schema
from triward_server.backend.onnx_runner import VISION_FILE
from triward_server.backend.triton_io import CHECKPOINT_DIRECTORY
from triward_server.config import ForwardConfig, PreprocessConfig, VisionConfig, from_strings
from triward_server.engine import checkpoint
from triward_server.engine.scoring import Scorer
from triward_server.engine.vision import CHANNELS
from triward_server.errors import ConfigError, LaunchError, TriwardError
from triward_server.export import verify
from triward_server.export.onnx import export_vision
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import ModelNames
from triward_server.serving.canary import TOLERANCE, Canary
from triward_server.serving.integrity import MANIFEST, describe, read_manifest
from triward_server.serving.repository import models, pin, versions

SOURCE = Path(__file__).resolve().parent.parent / "model_repository"
SOURCE_VERSION = "1"  # of the adapters in SOURCE
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# What the processor and the configuration are read from; weights come on top.
PROCESSOR_FILES = (
    "config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "tokenizers", "qwen-vl-utils", "pillow", "av", "numpy")


class VisionBackend(str, Enum):
    """Which backend of Triton runs the vision tower's graph."""

    ONNXRUNTIME = "onnxruntime"
    PYTHON = "python"


class Weights(str, Enum):
    """How weight files get into the repository."""

    LINK = "link"
    COPY = "copy"


@dataclass(frozen=True)
class Options:
    """How the repository's models run."""

    preprocess: PreprocessConfig
    forward: ForwardConfig
    vision_backend: VisionBackend
    preprocess_instances: int
    preprocess_batch_size: int
    queue_delay_us: int
    max_queue_size: int
    queue_timeout_ms: int
    weights: Weights
    canary: bool
    verify: bool


def build(
    source: str,
    revision: str | None,
    output: Path,
    names: ModelNames,
    version: str,
    options: Options,
    force: bool,
) -> None:
    """Write the repository, or another model or version into it.

    Args:
        source: a local folder, or a Hugging Face id that is resolved through the hub's cache.
        revision: branch, tag or commit on the hub.
        output: folder to create, or a repository that lacks this model or version.
        names: what Triton will call the model.
        version: a positive number.
        options: how the model runs.
        force: replace a model of this name that is already there, with all its versions.

    Raises:
        TriwardError: the checkpoint or an option is wrong; nothing was written.
    """
    _check_output(output, names, version, force)
    folder, commit = _resolve(source, revision)
    checkpoint.verify(folder)
    # Here the processor's files are tried, wherever they will run.
    preprocessor = Preprocessor(folder, replace(options.preprocess, device="cpu"))
    preprocessor.warm_up()
    if options.verify:
        _verify(folder, options)
    canary = _canary(folder, preprocessor, options)
    with _written_whole(output, names, None if force else version) as draft:
        _copy_source(draft, names, version, options)
        _configure(draft, names, options)
        graph = _write_vision(folder, draft, names, version, options)
        pin(draft, version, names)
        weights = checkpoint.weight_files(folder)
        files = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
        index = [p for p in [folder / checkpoint.INDEX_FILE] if p.is_file()]
        _place(files, draft / names.preprocess / version / CHECKPOINT_DIRECTORY, Weights.COPY)
        target = draft / names.forward / version / CHECKPOINT_DIRECTORY
        _place([*files, *index], target, Weights.COPY)
        _place(weights, target, options.weights)
        contents = [
            *((f"preprocess/{CHECKPOINT_DIRECTORY}/{file.name}", file) for file in files),
            *(
                (f"forward/{CHECKPOINT_DIRECTORY}/{file.name}", file)
                for file in (*files, *index, *weights)
            ),
            *((f"vision/{file.name}", file) for file in graph),
        ]
        manifest = _manifest(source, commit, contents, options)
        public = draft / names.ensemble / version
        (public / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        canary.write(public)


def model_names(name: str) -> ModelNames:
    """The names of a model with this public one.

    Raises:
        ConfigError: it cannot be one, or could be mistaken for another model's step.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: 1 to 64 of A-Z a-z 0-9 _ . -, the first a letter or digit"
        )
    for suffix in schema.SUFFIXES:
        if name.endswith(suffix):
            raise ConfigError(f"--name {name!r}: names that end in {suffix} are taken by models")
    return ModelNames(name)


def _check_output(output: Path, names: ModelNames, version: str, force: bool) -> None:
    if not output.exists():
        return
    ours = [each for each in models(output) if _is_ours(output, each)]
    if not ours:
        raise ConfigError(f"{output} is not a repository (no {MANIFEST} of ours) and is left alone")
    taken = _folders(names, output)
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
    """Whether an export wrote a model."""
    for version in versions(repository, names):
        with suppress(LaunchError):  # somebody else's
            read_manifest(repository, names, version)
            return True
    return False


def _folders(names: ModelNames, repository: Path) -> list[str]:
    """A model's folders there. The public one is the last: it makes the others complete."""
    every = (names.vision, *names.steps, names.ensemble)
    return [folder for folder in every if (repository / folder).exists()]


def _canary(folder: Path, preprocessor: Preprocessor, options: Options) -> Canary:
    """A request, with an image if the model reads any; two responses, if allowed; its scores."""
    picture = BytesIO()
    Image.linear_gradient("L").resize((28, 28)).convert("RGB").save(picture, "PNG")
    image = [{"type": "image"}] if preprocessor.reads_images else []
    content = [*image, {"type": "text", "text": "Does it get brighter downwards?"}]
    canary = Canary(
        messages=json.dumps([{"role": "user", "content": content}]),
        responses=("Yes, from black to white.", "No.")[: options.preprocess.max_responses],
        media=(picture.getvalue(),) * len(image),
        scores=None,
        tolerance=TOLERANCE[options.forward.dtype],
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
    if preprocessor.knows_the_date or not options.canary:
        checkpoint.check_finite(folder)  # as the scorer does when it loads
        return canary
    scorer = Scorer(folder, replace(options.forward, device=_device(options), compile=False))
    [scored] = scorer.score([features])
    if isinstance(scored, TriwardError):
        raise scored
    return replace(canary, scores=tuple(scored.scores.tolist()))


def _verify(folder: Path, options: Options) -> None:
    """Compare a few scores with transformers' own; raise `CheckpointError` if they differ."""
    report = verify.verify(folder, torch.device(_device(options)), small=True)
    verify.check(report)
    typer.echo(
        f"verified: {len(report.rows)} scores are transformers' own to {report.largest:.0e}, in "
        f"{report.seconds:.1f} s; triward-server verify asks more, --no-verify none",
        err=True,
    )


def _device(options: Options) -> str:
    """The device that will serve if this machine has it, or else the CPU."""
    return options.forward.device if torch.cuda.is_available() else "cpu"


def _say_where(device: str) -> None:
    """Of a GPU, which; or that there is none here."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        typer.echo(
            f"--device {device}: this machine has no CUDA GPU; the repository will serve only "
            "where there is one. For this machine: --device cpu",
            err=True,
        )
        return
    there = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if device != "cuda" and device not in there:
        typer.echo(f"--device {device}: this machine has {', '.join(there)} only", err=True)
        return
    used = there if device == "cuda" else {device: there[device]}
    typer.echo(
        f"--device {device}: will serve on {', '.join(f'{k} ({v})' for k, v in used.items())}"
        f"{', an instance on each' if len(used) > 1 else ''}",
        err=True,
    )


def _copy_source(draft: Path, names: ModelNames, version: str, options: Options) -> None:
    shutil.copytree(SOURCE, draft, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "__*"))
    if options.forward.vision != "onnx":
        shutil.rmtree(draft / schema.VISION)
    elif options.vision_backend is VisionBackend.ONNXRUNTIME:
        (draft / schema.VISION / SOURCE_VERSION / "model.py").unlink()
    for source in _folders(schema.REWARD, draft):
        model = names.ensemble + source.removeprefix(schema.ENSEMBLE)
        (draft / source).rename(draft / model)
        (draft / model / SOURCE_VERSION).rename(draft / model / version)
    for adapter in draft.glob("*/*/model.py"):
        # In the place of the folder that Python would make there. Triton takes a version whose
        # folder changed for a new one, and loads it again whenever another one comes; its Python
        # heeds no variable that says not to write.
        (adapter.parent / "__pycache__").touch()


def _resolve(source: str, revision: str | None) -> tuple[Path, str | None]:
    """The local folder of a checkpoint, and its commit if it came from the hub."""
    if Path(source).is_dir():
        if revision is not None:
            raise ConfigError(f"--revision {revision}: {source} is a folder and has no revisions")
        return Path(source).resolve(), None
    try:
        patterns = [*PROCESSOR_FILES, "*.safetensors", checkpoint.INDEX_FILE]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{source}: neither a folder nor available on the hub: {reason}"
        ) from None
    return folder, folder.name


@contextmanager
def _written_whole(output: Path, names: ModelNames, version: str | None) -> Iterator[Path]:
    """A temporary folder that becomes `output` if the block succeeds and vanishes if not.

    If `output` is there already, the model in it becomes part of that: beside the others, or with
    None for a version in the place of the one that has its name. A model that is there gets the
    version.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    draft.chmod(0o755)
    try:
        yield draft
        if not output.exists():
            draft.rename(output)
        elif version and names in models(output):
            _add_version(draft, output, names, version)
        else:
            _put_model(draft, output, names)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _add_version(draft: Path, output: Path, names: ModelNames, version: str) -> None:
    """Move a version's folders to a model that is there."""
    *steps, _ = _folders(names, draft)
    for model in steps:
        # A model's configuration is all its versions': Triton would load them all again. Which one
        # is loaded stays as it is.
        file = f"{model}/config.pbtxt"
        if not (output / file).is_file() or _options(draft / file) != _options(output / file):
            raise ConfigError(
                f"{file} would change with this version's options, for the running versions too; "
                "use the same options, or another repository"
            )
    with ExitStack() as undo:
        for model in _folders(names, draft):
            _move(draft / model / version, output / model / version, undo)
        undo.pop_all()


def _put_model(draft: Path, output: Path, names: ModelNames) -> None:
    """Move a model's folders into a repository, in the place of those that have their names."""
    with (
        tempfile.TemporaryDirectory(prefix=f".{output.name}.old.", dir=output.parent) as aside,
        ExitStack() as undo,
    ):
        for model in reversed(_folders(names, output)):
            _move(output / model, Path(aside, model), undo)
        if not (output / schema.DRAINING).exists():
            _move(draft / schema.DRAINING, output / schema.DRAINING, undo)
        for model in _folders(names, draft):
            _move(draft / model, output / model, undo)
        undo.pop_all()


def _move(source: Path, target: Path, undo: ExitStack) -> None:
    source.rename(target)
    undo.callback(target.rename, source)


def _configure(draft: Path, names: ModelNames, options: Options) -> None:
    path = draft / names.preprocess / "config.pbtxt"
    model = _read_config(path)
    model.name = names.preprocess
    _set_parameters(model, asdict(options.preprocess))
    _set_parameters(model, {contract.PARAMETER: schema.CONTRACT_VERSION})
    model.instance_group[0].count = options.preprocess_instances
    model.max_batch_size = options.preprocess_batch_size
    _place_on(model, options.preprocess.device)
    _bound_queue(model, options)
    _write_config(path, model)

    path = draft / names.ensemble / "config.pbtxt"
    model = _read_config(path)
    model.name = names.ensemble
    for step, name in zip(model.ensemble_scheduling.step, names.steps, strict=True):
        step.model_name = name
    model.max_batch_size = options.preprocess_batch_size  # at most its steps'
    _write_config(path, model)

    path = draft / names.forward / "config.pbtxt"
    model = _read_config(path)
    model.name = names.forward
    _set_parameters(model, asdict(options.forward))
    _set_parameters(model, {contract.PARAMETER: schema.CONTRACT_VERSION})
    _place_on(model, options.forward.device)
    model.dynamic_batching.max_queue_delay_microseconds = options.queue_delay_us
    _bound_queue(model, options)
    _write_config(path, model)


def _write_vision(
    folder: Path, draft: Path, names: ModelNames, version: str, options: Options
) -> list[Path]:
    """Export the vision tower if it is to be served, and describe it; the files of its graph."""
    if options.forward.vision != "onnx":
        return []
    target = draft / names.vision / version
    tower, _ = checkpoint.load_vision(folder)
    export_vision(tower, target)
    path = target.parent / "config.pbtxt"
    model = _read_config(path)
    model.name = names.vision
    # Triton's backend compares these with the graph's own.
    patch = CHANNELS * tower.cut.frames * tower.cut.patch_size**2
    model.input[0].dims[:] = [-1, patch]
    model.output[0].dims[:] = [-1, tower.config.out_hidden_size]
    if options.vision_backend is VisionBackend.PYTHON:
        _set_parameters(model, asdict(VisionConfig(threads=options.forward.threads)))
    else:
        model.backend = VisionBackend.ONNXRUNTIME.value
        model.default_model_filename = VISION_FILE
        _place_on(model, options.forward.device)
    _write_config(path, model)
    return sorted(target.glob(f"{VISION_FILE}*"))


def _bound_queue(model: Any, options: Options) -> None:
    policy = model.dynamic_batching.default_queue_policy
    policy.max_queue_size = options.max_queue_size
    policy.timeout_action = policy.REJECT
    policy.default_timeout_microseconds = options.queue_timeout_ms * 1000
    policy.allow_timeout_override = True  # a caller's shorter timeout counts


def _place_on(model: Any, device: str) -> None:
    group = model.instance_group[0]
    kind, _, number = device.partition(":")
    group.kind = group.KIND_CPU if kind == "cpu" else group.KIND_GPU
    group.gpus[:] = [int(number)] if number else []  # none listed: instances on every GPU


def _read_config(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def _options(path: Path) -> Any:
    """A configuration without what differs from version to version, as today's export writes it."""
    model = _read_config(path)
    model.ClearField("version_policy")
    if contract.PARAMETER not in model.parameters and "device" in model.parameters:
        _set_parameters(model, {contract.PARAMETER: contract.UNNAMED})
    return model


def _write_config(path: Path, model: Any) -> None:
    path.write_text(text_format.MessageToString(model))


def _set_parameters(model: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        model.parameters[key].string_value = str(value)


def _place(files: Iterable[Path], folder: Path, how: Weights) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if how is Weights.LINK and _hard_link(file.resolve(), folder / file.name):
            continue
        shutil.copyfile(file, folder / file.name)


def _hard_link(source: Path, target: Path) -> bool:
    """Whether a link could be made: it cannot across file systems, and not on all of them."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        typer.echo(f"{source.name}: copied, a link is not possible ({error.strerror})", err=True)
        return False
    return True


def _manifest(
    source: str, commit: str | None, contents: Iterable[tuple[str, Path]], options: Options
) -> dict[str, Any]:
    files = describe(contents)
    return {
        "source": source,
        "revision": commit,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "triward_server": __version__,
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "options": {
            "preprocess": asdict(options.preprocess),
            "forward": asdict(options.forward),
            "vision_backend": options.vision_backend.value,
            "preprocess_instances": options.preprocess_instances,
            "preprocess_batch_size": options.preprocess_batch_size,
            "queue_delay_us": options.queue_delay_us,
            "max_queue_size": options.max_queue_size,
            "queue_timeout_ms": options.queue_timeout_ms,
        },
        "files": files,
        # By name alone, for who compares checkpoints.
        "sha256": {PurePosixPath(name).name: entry["sha256"] for name, entry in files.items()},
    }


_PREPROCESS = PreprocessConfig()
_FORWARD = ForwardConfig()
app = typer.Typer(add_completion=False)


@app.command()
def main(
    checkpoint: Annotated[str, typer.Option(help="Local folder or Hugging Face id.")],
    output: Annotated[
        Path, typer.Option(help="Folder to create, or a repository to add this model to.")
    ],
    name: Annotated[
        str, typer.Option(help="What callers will call the model; another one adds a model.")
    ] = schema.ENSEMBLE,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = _FORWARD.dtype,
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = _FORWARD.device,
    preprocess_device: Annotated[
        str, typer.Option(help="cpu: Pillow resizes, exactly; cuda, cuda:N: torch, nearly so.")
    ] = _PREPROCESS.device,
    preprocess_instances: Annotated[
        int, typer.Option(min=1, help="Processes that decode, resize and tokenize.")
    ] = 4,
    preprocess_batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            max=schema.MAX_BATCH_SIZE,
            help="Requests of one preprocessing batch; 1 keeps a malformed tensor to its request.",
        ),
    ] = schema.MAX_BATCH_SIZE,
    queue_delay_us: Annotated[
        int, typer.Option(min=0, help="How long the forward model waits to fill a batch.")
    ] = 1000,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Tokens of one forward pass.")
    ] = _FORWARD.max_batch_tokens,
    max_batch_patches: Annotated[
        int, typer.Option(help="Vision patches of one forward pass.")
    ] = _FORWARD.max_batch_patches,
    max_batch_tflop: Annotated[
        float, typer.Option(help="Predicted TFLOP of one forward pass.")
    ] = _FORWARD.max_batch_tflop,
    embedding_cache_bytes: Annotated[
        int, typer.Option(help="Image embeddings kept between batches; 0: none.")
    ] = _FORWARD.embedding_cache_bytes,
    max_batch_bytes: Annotated[
        int, typer.Option(help="Predicted bytes of one forward pass, beside the weights.")
    ] = _FORWARD.max_batch_bytes,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Fuse layers with torch.compile; yes on cuda."),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Scores bitwise independent of company.")
    ] = _FORWARD.deterministic,
    threads: Annotated[
        int, typer.Option(help="CPU threads of the forward model; 0: torch's choice.")
    ] = _FORWARD.threads,
    vision: Annotated[
        str, typer.Option(help="torch; onnx: the vision tower is a model of its own.")
    ] = _FORWARD.vision,
    vision_backend: Annotated[
        VisionBackend, typer.Option(help="Who runs that model; python needs onnxruntime there.")
    ] = VisionBackend.ONNXRUNTIME,
    max_queue_size: Annotated[
        int, typer.Option(min=1, help="Requests that wait for each model; more are UNAVAILABLE.")
    ] = 1024,
    queue_timeout_ms: Annotated[
        int, typer.Option(min=1, help="How long one waits for each model, unless it allows less.")
    ] = 30_000,
    max_responses: Annotated[
        int, typer.Option(help="Responses in one request.")
    ] = _PREPROCESS.max_responses,
    max_text_bytes: Annotated[
        int, typer.Option(help="Bytes of messages, and of all responses, in one request.")
    ] = _PREPROCESS.max_text_bytes,
    max_parts: Annotated[
        int, typer.Option(help="Messages and their parts in one request.")
    ] = _PREPROCESS.max_parts,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of one conversation; 0: the model's positions.")
    ] = _PREPROCESS.max_tokens,
    max_request_tokens: Annotated[
        int, typer.Option(help="Tokens of a request: its prompt once and every response.")
    ] = _PREPROCESS.max_request_tokens,
    max_media: Annotated[
        int, typer.Option(help="Media items in one request.")
    ] = _PREPROCESS.max_media,
    max_request_bytes: Annotated[
        int, typer.Option(help="Bytes of all media items of a request.")
    ] = _PREPROCESS.max_request_bytes,
    max_media_bytes: Annotated[
        int, typer.Option(help="Bytes of one encoded media item.")
    ] = _PREPROCESS.max_media_bytes,
    max_image_pixels: Annotated[
        int, typer.Option(help="Pixels of one image or frame before it is resized.")
    ] = _PREPROCESS.max_image_pixels,
    max_video_frames: Annotated[
        int, typer.Option(help="Frames of one video that are shown.")
    ] = _PREPROCESS.max_video_frames,
    max_video_pixels: Annotated[
        int, typer.Option(help="Pixels of all frames that one request shows, resized.")
    ] = _PREPROCESS.max_video_pixels,
    max_decode_seconds: Annotated[
        float, typer.Option(help="For decoding and resizing a request's media.")
    ] = _PREPROCESS.max_decode_seconds,
    version: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of the model: a new one is added. (Of this tool: triward-server --version.)",
        ),
    ] = 1,
    canary: Annotated[
        bool,
        typer.Option(
            "--canary/--no-canary", help="Score one request, for deep health checks to compare."
        ),
    ] = True,
    verify_: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Compare a few scores with transformers' own class before anything is written.",
        ),
    ] = True,
    weights: Annotated[
        Weights, typer.Option(help="Hard-link weight files (same file system) or copy them.")
    ] = Weights.LINK,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace the model of this name with all its versions; others are left alone.",
        ),
    ] = False,
) -> None:
    """Turn a checkpoint into a Triton model repository."""
    preprocess = {
        "device": preprocess_device,
        "resize": "pillow" if preprocess_device == "cpu" else "torch",
        "max_responses": max_responses,
        "max_text_bytes": max_text_bytes,
        "max_parts": max_parts,
        "max_media": max_media,
        "max_media_bytes": max_media_bytes,
        "max_request_bytes": max_request_bytes,
        "max_image_pixels": max_image_pixels,
        "max_video_frames": max_video_frames,
        "max_video_pixels": max_video_pixels,
        "max_decode_seconds": max_decode_seconds,
        "max_tokens": max_tokens,
        "max_request_tokens": max_request_tokens,
    }
    forward = {
        "dtype": dtype,
        "device": device,
        "max_batch_tokens": max_batch_tokens,
        "max_batch_patches": max_batch_patches,
        "max_batch_tflop": max_batch_tflop,
        "max_batch_bytes": max_batch_bytes,
        "embedding_cache_bytes": embedding_cache_bytes,
        "deterministic": deterministic,
        "compile": device != "cpu" if compile_ is None else compile_,
        "threads": threads,
        "vision": vision,
        "max_responses": max_responses,
        "max_tokens": max_tokens,
        "max_request_tokens": max_request_tokens,
    }
    try:
        options = Options(
            preprocess=from_strings(PreprocessConfig, {k: str(v) for k, v in preprocess.items()}),
            forward=from_strings(ForwardConfig, {k: str(v) for k, v in forward.items()}),
            vision_backend=vision_backend,
            preprocess_instances=preprocess_instances,
            preprocess_batch_size=preprocess_batch_size,
            queue_delay_us=queue_delay_us,
            max_queue_size=max_queue_size,
            queue_timeout_ms=queue_timeout_ms,
            weights=weights,
            canary=canary,
            verify=verify_,
        )
        _say_where(options.forward.device)
        build(checkpoint, revision, output, model_names(name), str(version), options, force)
    except (TriwardError, OSError) as error:
        typer.echo(f"build_repository: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output}: ready; serve it with: triward-server serve --repository {output}")


if __name__ == "__main__":
    app()
