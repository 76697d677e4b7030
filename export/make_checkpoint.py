"""Make a checkpoint with random weights in the layout of a published one.

python export/make_checkpoint.py --size tiny --seed 0 --output DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triward_server.export.random_checkpoint import Size, make_checkpoint
from triward_server.export.random_text_checkpoint import KINDS, make_text_checkpoint


def main(
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    size: Annotated[
        Size, typer.Option(help="7b, for qwen2_5_vl, has the real dimensions: 16.6 GB.")
    ],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where random numbers are drawn.")] = "cpu",
    architecture: Annotated[
        str, typer.Option(help=f"qwen2_5_vl, or a text model: {', '.join(KINDS)}.")
    ] = "qwen2_5_vl",
) -> None:
    """Write a checkpoint with random weights."""
    try:
        if architecture == "qwen2_5_vl":
            make_checkpoint(size, seed, output, device)
        elif architecture in KINDS and size != "7b":
            make_text_checkpoint(architecture, size, seed, output)
        else:
            raise typer.BadParameter(f"no {size} {architecture}")
    except FileExistsError:
        typer.echo(f"make_checkpoint: {output} exists", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output}: {size} {architecture} checkpoint of seed {seed}")


if __name__ == "__main__":
    typer.run(main)
