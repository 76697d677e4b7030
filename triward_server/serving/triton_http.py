"""Triton's HTTP endpoints (KServe v2 and its extensions) as far as an operator's commands use them.

gRPC is for callers; this is for the machine that Triton runs on: no certificates, standard library.
"""

from __future__ import annotations

import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from .. import schema
from ..errors import TriwardError
from .canary import Canary

# What a restricted protocol's caller must send.
ADMIN_HEADER = "admin-key"
GRPC_ADMIN_HEADER = f"triton-grpc-protocol-{ADMIN_HEADER}"

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_SERIES = re.compile(r"^(?P<name>\w+){(?P<labels>[^}]*)} (?P<value>\S+)$", re.MULTILINE)


class HttpError(TriwardError):
    """Triton did not answer 200.

    Args:
        status: of HTTP; 0 when nothing answered in time, or at all.
        message: why.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Loaded:
    """One version of one model, as Triton's index has it."""

    name: str
    version: str
    state: str  # READY, LOADING, UNLOADING or UNAVAILABLE


@dataclass(frozen=True)
class TritonHttp:
    """A Triton.

    Attributes:
        host: where it listens.
        port: for HTTP.
        admin_key: what opens the restricted protocols; empty where they are not needed.
    """

    host: str
    port: int
    admin_key: str = ""

    def is_ready(
        self, model: str = schema.ENSEMBLE, timeout: float = 5.0, version: int | None = None
    ) -> bool:
        """Return True if a model, or this version of it, can be asked."""
        which = model if version is None else f"{model}/versions/{version}"
        try:
            self._call(f"v2/models/{which}/ready", timeout)
        except HttpError:
            return False
        return True

    def release(self, timeout: float = 5.0) -> str:
        """Triton's own version, `2.51.0`."""
        return str(self._json("v2", timeout)["version"])

    def infer(
        self, canary: Canary, timeout: float, model: str = schema.ENSEMBLE
    ) -> tuple[str, list[float]]:
        """Score the canary through a public model.

        Args:
            canary: what to ask.
            timeout: seconds.
            model: its ensemble.

        Returns:
            The version that answered, and its scores.

        Raises:
            HttpError: it did not.
        """
        media = b"".join(len(item).to_bytes(4, "little") + item for item in canary.media)
        head = json.dumps({
            "id": schema.CANARY_ID,
            # A little less, so that one that only waited is told so.
            "parameters": {"timeout": int(0.8 * timeout * 1e6)},
            "inputs": [
                {"name": schema.MESSAGES.name, "shape": [1, 1], "datatype": "BYTES",
                 "data": [canary.messages]},
                {"name": schema.RESPONSES.name, "shape": [1, len(canary.responses)],
                 "datatype": "BYTES", "data": list(canary.responses)},
                {"name": schema.MEDIA.name, "shape": [1, len(canary.media)], "datatype": "BYTES",
                 "parameters": {"binary_data_size": len(media)}},
            ],
            "outputs": [{"name": schema.SCORES.name}],
        }).encode()  # fmt: skip
        headers = {"Inference-Header-Content-Length": str(len(head))}
        answer = self._json(f"v2/models/{model}/infer", timeout, head + media, headers)
        [scores] = [out["data"] for out in answer["outputs"] if out["name"] == schema.SCORES.name]
        return str(answer["model_version"]), [float(score) for score in scores]

    def index(self, timeout: float = 5.0) -> list[Loaded]:
        """All models that were loaded; needs the key."""
        rows = self._json("v2/repository/index", timeout, b"{}")
        return [
            Loaded(row["name"], row.get("version", ""), row.get("state", "UNAVAILABLE"))
            for row in rows
        ]

    def config(self, model: str, version: str, timeout: float = 5.0) -> Any:
        """Return a loaded model's configuration; needs the key."""
        return self._json(f"v2/models/{model}/versions/{version}/config", timeout)

    def load(
        self,
        model: str,
        timeout: float,
        config: str | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Load a model, or what has changed of it; needs the key.

        Args:
            model: its name.
            timeout: seconds until it is ready.
            config: JSON in place of its `config.pbtxt`.
            files: in place of its folder, `file:<path>` -> content.
        """
        parameters: dict[str, str] = {} if config is None else {"config": config}
        for path, content in (files or {}).items():
            parameters[path] = base64.b64encode(content).decode()
        body = json.dumps({"parameters": parameters}).encode()
        self._call(f"v2/repository/models/{model}/load", timeout, body)

    def unload(self, model: str, timeout: float = 30.0) -> None:
        """Unload all versions of a model; requests that it has taken finish. Needs the key."""
        self._call(f"v2/repository/models/{model}/unload", timeout, b"{}")

    def _json(
        self,
        path: str,
        timeout: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        return json.loads(self._call(path, timeout, body, headers))

    def _call(
        self,
        path: str,
        timeout: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        sent = {"Content-Type": "application/json", **(headers or {})}
        if self.admin_key:
            sent[ADMIN_HEADER] = self.admin_key
        url = f"http://{self.host}:{self.port}/{path}"
        return fetch(urllib.request.Request(url, body, sent), timeout)


@dataclass(frozen=True)
class Series:
    """One line of the metrics page."""

    name: str
    labels: Mapping[str, str]
    value: float


def read_metrics(host: str, port: int, timeout: float) -> list[Series]:
    """Return the metrics page; raises `HttpError` if there is none."""
    request = urllib.request.Request(f"http://{host}:{port}/metrics")
    return [
        Series(line["name"], dict(_LABEL.findall(line["labels"])), float(line["value"]))
        for line in _SERIES.finditer(fetch(request, timeout).decode())
    ]


def fetch(request: urllib.request.Request, timeout: float) -> bytes:
    """Return the answer's body; raises `HttpError` for anything but 200."""
    try:
        with _DIRECT.open(request, timeout=timeout) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        raise HttpError(error.code, _reason(text)) from None
    except TimeoutError:
        raise HttpError(0, f"no answer within {timeout:g} s") from None
    except (OSError, HTTPException) as error:
        late = isinstance(getattr(error, "reason", None), TimeoutError)
        problem = f"no answer within {timeout:g} s" if late else f"not reachable: {error}"
        raise HttpError(0, problem) from None


def _reason(text: str) -> str:
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text.strip() or "no details"
