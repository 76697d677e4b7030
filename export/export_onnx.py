"""Checkpoint -> the vision tower and the value head as ONNX, for serving them elsewhere.

    python export/export_onnx.py --checkpoint DIR --output DIR

docs/onnx.md says what the graphs take and give.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triward_server.engine.checkpoint import load_vision
from triward_server.errors import TriwardError
from triward_server.export.onnx import OPSET, export_value_head, export_vision


def main(
    checkpoint: Annotated[Path, typer.Option(help="Its local folder.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    opset: Annotated[
        int, typer.Option(min=18, help="Of ONNX's operators; an older runtime may need an older.")
    ] = OPSET,
) -> None:
    """Write vision.onnx and value_head.onnx, in float32, with their weights beside them."""
    try:
        tower, head = load_vision(checkpoint)
        output.mkdir(parents=True)
        export_vision(tower, output, opset)
        export_value_head(head, output, opset)
    except FileExistsError:
        typer.echo(f"export_onnx: {output} exists", err=True)
        raise typer.Exit(1) from None
    except (TriwardError, OSError) as error:
        typer.echo(f"export_onnx: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output}: {', '.join(sorted(file.name for file in output.iterdir()))}")


if __name__ == "__main__":
    typer.run(main)
