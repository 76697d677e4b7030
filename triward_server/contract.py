"""The wire contract's version, compared with a caller's and a repository's."""

from __future__ import annotations

import json
from typing import Any

from . import schema
from .errors import ConfigError, ContractMismatch, InvalidRequest

PARAMETER = "contract_version"  # of a request, and of a model's configuration

# What a repository was exported for that does not say it: the first versions did not.
UNNAMED = 1


def check_caller(parameters: str) -> None:
    """Refuse a request of another version; one that names none is taken as it is.

    Args:
        parameters: of the request, as JSON; an ensemble hands them on to its steps.

    Raises:
        ContractMismatch: it names another version.
        InvalidRequest: what it names is no version.
    """
    said = json.loads(parameters or "{}").get(PARAMETER)
    if said is None:
        return
    if type(said) is not int:
        raise InvalidRequest(PARAMETER, f"{said!r}; must be a whole number")
    if said != schema.CONTRACT_VERSION:
        older = "server" if said > schema.CONTRACT_VERSION else "client"
        raise ContractMismatch(
            f"{PARAMETER}: the client speaks version {said} of the wire contract, this server "
            f"version {schema.CONTRACT_VERSION}; upgrade the {older}"
        )


def check_repository(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the other parameters of a model's configuration.

    Raises:
        ConfigError: it was exported for another version.
    """
    rest = dict(parameters)
    said = rest.pop(PARAMETER, {"string_value": str(UNNAMED)})["string_value"]
    if said != str(schema.CONTRACT_VERSION):
        raise ConfigError(
            f"this repository was exported for version {said} of the wire contract, this "
            f"triward-server speaks version {schema.CONTRACT_VERSION}; export it again"
        )
    return rest
