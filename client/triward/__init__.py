"""Rewards of multimodal conversations from a Triward server, over gRPC.

Start with `RewardClient`. Every failure is a `TriwardError`.
"""

from __future__ import annotations

from triward.client import RewardClient
from triward.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MediaError,
    ServerError,
    ServerUnavailable,
    TriwardError,
)

__version__ = "0.1.0"

__all__ = [
    "DeadlineExceeded",
    "InvalidRequest",
    "MediaError",
    "RewardClient",
    "ServerError",
    "ServerUnavailable",
    "TriwardError",
    "__version__",
]
