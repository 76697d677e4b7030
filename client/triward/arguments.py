"""Parsing shared by the commands: types of arguments, and suggestions for mistyped words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from triward.errors import InvalidRequest


def whole_number(text: str, least: int = 1) -> int:
    """Return a whole number from `least` on; raise ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """Return a whole number from 0 on."""
    return whole_number(text, 0)


def port(text: str) -> int:
    """Return a port's number; 0 stands for a free one."""
    number = whole_number(text, 0)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, got {number}")
    return number


def check_free(path: Path) -> None:
    """See that nothing would be lost if a file were written.

    Raises:
        InvalidRequest: it is there, and holds something.
    """
    if path.is_file() and path.stat().st_size:
        raise InvalidRequest(
            f"{path}: is there already; --force (force=True) replaces it, or name another output"
        )


def examples(*commands: str) -> str:
    """Return an epilog of commands that can be copied; a long one continues behind `\\`."""
    head = "example:" if len(commands) == 1 else "examples:"
    return "\n".join([head, *(f"  {line}" for each in commands for line in each.splitlines())])


class Help(argparse.HelpFormatter):
    """Fills lines of text, but leaves those that begin with a space; aligns commands."""

    def _iter_indented_subactions(
        self, action: argparse.Action
    ) -> Generator[argparse.Action, None, None]:
        yield from getattr(action, "_get_subactions", list)()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            line if line.startswith(" ") else super(Help, self)._fill_text(line, width, indent)
            for line in text.splitlines()
        )


class Parser(argparse.ArgumentParser):
    """Suggests what a word that it does not know may have been meant to be.

    Attributes:
        needed: error of a command that is not installed, whatever its arguments are.
    """

    needed = ""
    _given: Sequence[str] = ()

    def __init__(self, *args: Any, **settings: Any) -> None:
        """Set up a parser as argparse does, whose help keeps examples as they are."""
        super().__init__(*args, **{"formatter_class": Help, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; keep what was given, for `error`."""
        self._given = list(sys.argv[1:] if args is None else args)
        if self.needed:
            self.error(self.needed)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; the command reports its own unrecognized arguments."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            error = getattr(options, "error", self.error)
            error(f"unrecognized arguments: {' '.join(unknown)}")
        return options

    def error(self, message: str) -> NoReturn:
        """Show usage, the mistake, and what was meant."""
        super().error("; ".join([message, *self._suggestions()]))

    def _suggestions(self) -> Iterable[str]:
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for word in self._given:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(each.startswith(name) for each in options):
                yield from _meant(name, options)
        commands = [name for action in self._actions for name in action.choices or ()
                    if isinstance(action, argparse._SubParsersAction)]  # fmt: skip
        if commands and self._given and self._given[0] not in commands:
            yield from _meant(self._given[0], commands)


def _meant(word: str, known: Sequence[str]) -> Iterable[str]:
    found = get_close_matches(word, known, n=1)
    return (f"did you mean {found[0]}?",) if found else ()
