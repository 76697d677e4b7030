"""The command `triward completion`: a shell's script that completes commands, flags and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from triward.arguments import examples

SHELLS = ("bash", "zsh", "tcsh", "fish")
_NEEDED = "needs shtab; in a checkout of Triward: pip install './client[completion]'"


def add_completion(commands: Any) -> None:
    """Add the command, which needs no server."""
    command = commands.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description="Print a script for a shell, which completes commands, flags and file names. "
        "It knows the commands that are installed now: print it again after an upgrade.",
        epilog=examples("source <(triward completion bash)"),
    )
    command.set_defaults(error=command.error)
    command.add_argument("shell", choices=SHELLS, help="whose script is printed")


def completion_script(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return the script for `options.shell`.

    Raises:
        SystemExit: shtab is not installed; usage is shown.
    """
    try:
        import shtab
    except ImportError:
        options.error(_NEEDED)
        raise
    kinds = {"FILE": shtab.FILE, "PATH": shtab.FILE, "FOLDER": shtab.DIRECTORY}
    for action in _actions(parser):
        if action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, options.shell)
    return script


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
