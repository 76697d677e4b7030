"""The second tab: a file of scored rows."""

from __future__ import annotations

from triward_tools.playground.asking import Servers


def add(servers: Servers) -> None:
    """Add the tab."""
