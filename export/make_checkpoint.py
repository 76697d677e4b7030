"""Make a checkpoint with random weights in the layout of Skywork-VL-Reward-7B.

python export/make_checkpoint.py --size tiny --seed 0 --output DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triward_server.random_checkpoint import Size, make_checkpoint


def main(
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    size: Annotated[Size, typer.Option(help="7b has the real dimensions: 16.6 GB.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="Where random numbers are drawn.")] = "cpu",
) -> None:
    """Write a checkpoint with random weights."""
    try:
        make_checkpoint(size, seed, output, device)
    except FileExistsError:
        typer.echo(f"make_checkpoint: {output} exists", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output}: {size} checkpoint of seed {seed}")


if __name__ == "__main__":
    typer.run(main)
