"""The commands that make checkpoints and repositories, of `triward-server` and of `export/*.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..errors import TriwardError
from ..examples import epilog
from .options import OPSET, Size, TextModel, export_parameters, read_options

Command = Callable[..., None]


def export(context: typer.Context, **values: Any) -> None:
    """Turn a checkpoint into a Triton model repository."""
    from .build import build  # torch, which the other commands do not need

    with _refusals(context):
        build(read_options(values))
    output = values["output"]
    typer.echo(f"{output}: ready; serve it with: triward-server serve --repository {output}")


_CONTEXT = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
export.__signature__ = Signature([_CONTEXT, *export_parameters()])  # type: ignore[attr-defined]


def make_checkpoint(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    size: Annotated[
        Size, typer.Option(help="7b has the real dimensions, of a model with images: 16.6 GB.")
    ],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where random numbers are drawn.")] = "cpu",
    architecture: Annotated[
        str,
        typer.Option(
            help=f"qwen2_5_vl, ixc2_5, or a text model: {', '.join(get_args(TextModel))}."
        ),
    ] = "qwen2_5_vl",
) -> None:
    """Write a checkpoint with random weights."""
    from .random_checkpoint import make_checkpoint
    from .random_ixc_checkpoint import make_ixc_checkpoint
    from .random_text_checkpoint import KINDS, make_text_checkpoint

    with _refusals(context, output):
        if architecture == "qwen2_5_vl":
            make_checkpoint(size, seed, output, device)
        elif architecture == "ixc2_5":
            make_ixc_checkpoint(size, seed, output, device)
        elif architecture in KINDS and size != "7b":
            make_text_checkpoint(architecture, size, seed, output)
        else:
            raise typer.BadParameter(f"no {size} {architecture}")
    typer.echo(f"{output}: {size} {architecture} checkpoint of seed {seed}")


def export_onnx(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Option(help="Its local folder.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    opset: Annotated[
        int, typer.Option(min=18, help="Of ONNX's operators; an older runtime may need an older.")
    ] = OPSET,
) -> None:
    """Write vision.onnx and value_head.onnx, in float32, with their weights beside them."""
    from ..engine.checkpoint import load_vision
    from .onnx import export_value_head, export_vision

    with _refusals(context, output):
        tower, head = load_vision(checkpoint)
        output.mkdir(parents=True)
        export_vision(tower, output, opset)
        export_value_head(head, output, opset)
    typer.echo(f"{output}: {', '.join(sorted(file.name for file in output.iterdir()))}")


# By their names in `triward-server`.
COMMANDS: dict[str, Command] = {
    "export": export,
    "make-checkpoint": make_checkpoint,
    "export-onnx": export_onnx,
}


def application(name: str, script: str) -> typer.Typer:
    """Return a program of its own that has one command.

    Args:
        name: of the command.
        script: path of the program in a checkout, which its help shows.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog=epilog(name, script))(COMMANDS[name])
    return app


@contextmanager
def _refusals(context: typer.Context, output: Path | None = None) -> Iterator[None]:
    """End with 1, and say why on stderr, where an error is the caller's or the disk's.

    Args:
        context: of the command, whose name is said.
        output: a folder that must not exist yet.
    """
    try:
        yield
    except (TriwardError, OSError) as error:
        exists = output and isinstance(error, FileExistsError)
        name = context.command_path.removesuffix(".py")
        typer.echo(f"{name}: {f'{output} exists' if exists else error}", err=True)
        raise typer.Exit(1) from None
