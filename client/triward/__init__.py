"""Rewards of multimodal conversations from a Triward server, over gRPC.

Start with `RewardClient`, or `AsyncRewardClient` in asyncio. Every failure is a `TriwardError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triward.channel import Tls
from triward.client import RewardClient
from triward.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MediaError,
    ServerError,
    ServerUnavailable,
    TriwardError,
)
from triward.patches import pixels_of

if TYPE_CHECKING:
    from triward.aio import AsyncRewardClient
else:

    def __getattr__(name: str) -> object:
        """Import the client for asyncio when it is asked for: asyncio takes half of the time."""
        if name != "AsyncRewardClient":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from triward.aio import AsyncRewardClient

        return AsyncRewardClient


__version__ = "0.2.0"

__all__ = [
    "AsyncRewardClient",
    "DeadlineExceeded",
    "InvalidRequest",
    "MediaError",
    "RewardClient",
    "ServerError",
    "ServerUnavailable",
    "Tls",
    "TriwardError",
    "__version__",
    "pixels_of",
]
