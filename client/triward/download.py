"""Fetching of an http(s) URL within a deadline and a size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from triward.deadline import Deadline
from triward.errors import MediaError, TriwardError

if TYPE_CHECKING:
    from http.client import HTTPResponse

DOWNLOAD_LIMIT = 64 * 2**20
_CHUNK = 256 * 2**10

# What a URL may hold besides letters and digits; the rest (spaces, umlauts) is percent-encoded.
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


def download(
    url: str,
    deadline: Deadline,
    *,
    limit: int = DOWNLOAD_LIMIT,
    opener: Callable[..., Any] | None = None,
) -> bytes:
    """Fetch a URL, following redirects.

    Args:
        url: starts with http:// or https://.
        deadline: when to give up.
        limit: the most bytes to accept.
        opener: used in place of `urllib.request.urlopen`; it decides who may be asked.

    Raises:
        MediaError: the server refuses, breaks off, or sends more than `limit`.
        DeadlineExceeded: the deadline passed.
    """
    # Socket timeouts bound one read each and name resolution not at all, so the wait is bounded
    # here. An abandoned thread ends at its next read.
    future: Future[bytes] = Future()

    def work() -> None:
        try:
            future.set_result(_fetch(url, deadline, limit, opener))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="triward-download", daemon=True).start()
    done, _ = wait([future], timeout=deadline.remaining())
    if not done:
        raise deadline.exceeded()
    return future.result()


def _fetch(url: str, deadline: Deadline, limit: int, opener: Callable[..., Any] | None) -> bytes:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from triward import __version__  # which is being imported with this module

    shown = _without_query(url)
    try:
        agent = {"User-Agent": f"triward/{__version__}"}
        request = Request(quote(url, safe=_URL_CHARACTERS), headers=agent)
        with (opener or urlopen)(request, timeout=deadline.remaining()) as response:
            return _read_body(response, deadline, limit, shown)
    except TriwardError:
        raise
    except HTTPError as error:
        error.close()
        raise MediaError(f"{shown} answered HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        deadline.remaining()  # a socket that timed out did so for the deadline's sake
        raise MediaError(f"cannot fetch {shown}: {error}") from error


def _read_body(response: HTTPResponse, deadline: Deadline, limit: int, shown: str) -> bytes:
    expected = _content_length(response)
    body = bytearray()
    while True:
        if max(len(body), expected or 0) > limit:
            raise MediaError(f"{shown} is larger than the limit of {limit} bytes")
        chunk = response.read1(_CHUNK)
        deadline.remaining()
        if not chunk:
            break
        body += chunk
    # A read with a size does not complain when the connection breaks off early.
    if expected is not None and len(body) != expected:
        raise MediaError(f"{shown} broke off after {len(body)} of {expected} bytes")
    return bytes(body)


def _content_length(response: HTTPResponse) -> int | None:
    declared = response.headers.get("Content-Length", "")
    if "Transfer-Encoding" in response.headers or not declared.isdecimal():
        return None
    return int(declared)


def _without_query(url: str) -> str:
    # The query of a signed URL is a secret that must not reach logs.
    return url.partition("?")[0][:200]
