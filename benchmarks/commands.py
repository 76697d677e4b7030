"""Command lines of the benchmarks: options from a function, examples from its module's text."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import typer


def run_main(main: Callable[..., None]) -> None:
    """Carry out a benchmark's command line."""
    benchmark_command(main, sys.modules[main.__module__].__doc__ or "")()


def benchmark_command(main: Callable[..., None], text: str) -> typer.Typer:
    """Return a program of one command, whose help ends with the commands of a text."""
    examples = re.findall(r"^ *(python -m .*)$", text, re.MULTILINE)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog="\n".join(["\b", "Example:", *(f"  {line}" for line in examples)]))(main)
    return app
