"""Results on disk after every step: a run that is stopped has kept what it measured."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer


class Record:
    """A JSON file of results; one that is there already is continued.

    Args:
        output: the file; None: results are printed alone.
        about: what this run is; written over what an earlier run said of itself.
    """

    def __init__(self, output: Path | None, about: dict[str, Any]) -> None:
        self._output = output
        there = output is not None and output.is_file() and output.stat().st_size
        self.results: dict[str, Any] = json.loads(output.read_text()) if output and there else {}
        self.results |= about
        self.results.setdefault("seconds", {})

    def keep(self, name: str, value: Any) -> None:
        """Add a result, and write all of them."""
        self.results[name] = value
        if self._output:
            new = self._output.with_suffix(".new")
            new.write_text(json.dumps(self.results, indent=2) + "\n")
            new.replace(self._output)  # whole at any moment

    def step(self, name: str, run: Callable[[], Any]) -> Exception | None:
        """Run one step and keep what it returns, or how it failed.

        Returns:
            Its exception. It is not raised: the next step may say more.
        """
        start, failure = time.perf_counter(), None
        try:
            value = run()
        except Exception as error:
            failure = error
            value = {"failed": f"{type(error).__name__}: {error}", "traceback": _lines(error)}
        self.results["seconds"][name] = round(time.perf_counter() - start, 2)
        self.keep(name, value)
        told = f"failed: {failure!r}" if failure else json.dumps(value)
        typer.echo(f"{name}: {self.results['seconds'][name]} s: {told[:2000]}")
        return failure


def _lines(error: Exception) -> list[str]:
    return "".join(traceback.format_exception(error)).splitlines()
