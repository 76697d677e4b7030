"""Errors for requests that Triton itself finds are not its model's."""

from __future__ import annotations

import re

from triward import protocol
from triward.errors import ServerError, TriwardError

# Triton's words for tensors that a model does not have, or has otherwise.
_REFUSED = re.compile(
    r"expected \d+ inputs but got \d+|unexpected inference (?:input|output) '"
    r"|data-type is '\w+', but model|unexpected shape for input"
)
# How `triward-server serve` names its Triton.
_SERVER = re.compile(r"triward-contract-(\d+)")


def is_refusal(message: str) -> bool:
    """Return True if Triton refused a request before the model saw it."""
    return _REFUSED.search(message) is not None


def refusal(message: str, *, url: str, model: str, server: str) -> TriwardError:
    """Return the error for such a refusal; this client sends nothing outside its contract.

    Args:
        message: Triton's words.
        url: where that was.
        model: who was asked.
        server: the name that the server gives itself.
    """
    ours = protocol.CONTRACT_VERSION
    found = _SERVER.fullmatch(server)
    mine = f"the client speaks version {ours} of the wire contract"
    if found is None:
        why = "the server tells none: it is older, or no Triward server"
        return ServerError(f"{url}: {mine}, {why}; Triton says: {message}")
    theirs = int(found[1])
    if theirs == ours:
        why = f"as the server does, but its model {model!r} has other tensors and is not Triward's"
        return ServerError(f"{url}: {mine}, {why}; Triton says: {message}")
    older = "client" if theirs > ours else "server"
    why = f"the server version {theirs}; upgrade the {older}"
    return ServerError(f"{url}: {mine}, {why}. Triton says: {message}")
