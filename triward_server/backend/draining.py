"""The model that answers UNAVAILABLE to every request while the server shuts down.

`launch` puts the model `reward_draining` behind every public name when it is told to stop. Imports
nothing heavy, so that the model costs next to nothing while it waits for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DrainingBackend:
    """`reward_draining`: refuses all.

    Args:
        pb_utils: Triton's module.
    """

    def __init__(self, pb_utils: Any) -> None:
        self._pb = pb_utils

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request with the status that tells callers to ask another server."""
        error = self._pb.TritonError
        message = "the server is shutting down"
        return [
            self._pb.InferenceResponse(error=error(message, error.UNAVAILABLE)) for _ in requests
        ]
