"""The third tab: two servers or models on the same input."""

from __future__ import annotations

from triward_tools.playground.asking import Servers


def add(servers: Servers) -> None:
    """Add the tab."""
