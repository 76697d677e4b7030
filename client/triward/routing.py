"""Routing by prompt: what begins alike goes to the server that has computed the beginning.

Rendezvous hashing (Thaler and Ravishankar 1998): each server has a weight for each prompt, and the
heaviest is the prompt's own. A server that goes away moves its own prompts and no others; when it
is back, they are. Bounded load (Mirrokni et al. 2018): a server that has much more than its share
of this process's calls is passed over, so that a prompt that everybody asks about is spread.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from typing import Any, Generic, Literal, TypeVar, get_args

from triward import protocol
from triward.channel import Url, pauses
from triward.conversation import RewardRequest
from triward.deadline import Deadline
from triward.errors import ServerUnavailable
from triward.tokens import TokenRequest

T = TypeVar("T")

Routing = Literal["round_robin", "prompt"]

# Times its equal share of the calls in flight that a server gets.
_SHARE = 1.25
# Calls that it gets however few there are: those of one prompt compute it once if they meet.
_ALWAYS = 8


def check_routing(routing: str, url: Url) -> None:
    """Raise ValueError for a routing that is unknown, or that these addresses do not allow."""
    if routing not in get_args(Routing):
        known = " or ".join(map(repr, get_args(Routing)))
        raise ValueError(f"routing must be {known}, got {routing!r}")
    if routing == "prompt" and isinstance(url, str):
        raise ValueError(
            f"routing='prompt' needs a list of host:port, got {url!r}: among the servers of a name "
            "gRPC alone chooses"
        )


@dataclass(frozen=True)
class Pause:
    """A step of a call: nothing for some seconds."""

    seconds: float


class Channels(Generic[T]):
    """Connections by server, each made when it is first used. Threads may share them.

    Args:
        connect: makes one; None stands for one channel over all servers.
    """

    def __init__(self, connect: Callable[[str | None], T]) -> None:  # noqa: D107 - the class says it
        self._connect = connect
        self._lock = threading.Lock()
        self._made: dict[str | None, T] = {}

    def get(self, server: str | None) -> T:
        """Return the connection to a server."""
        with self._lock:
            if server not in self._made:
                self._made[server] = self._connect(server)
            return self._made[server]

    def made(self) -> list[T]:
        """Return all that there are."""
        with self._lock:
            return list(self._made.values())


class Router:
    """Servers and the calls that this process has in flight to each. Threads may share it.

    Args:
        servers: addresses; their order means nothing.
    """

    def __init__(self, servers: Iterable[str]) -> None:  # noqa: D107 - the class says it
        self.servers = tuple(dict.fromkeys(servers))
        self._flying: Counter[str] = Counter()
        self._lock = threading.Lock()

    def order(self, key: bytes) -> list[str]:
        """Return all servers, the prompt's own first; the same in every process."""
        return sorted(self.servers, key=lambda server: _weight(server, key), reverse=True)

    @contextmanager
    def call(self, key: bytes, passed: Collection[str]) -> Iterator[str]:
        """Yield the server to ask, and count the block as a call to it.

        Args:
            key: of the prompt.
            passed: servers that have not taken this call; at least one has not been asked.
        """
        left = [server for server in self.order(key) if server not in passed]
        with self._lock:
            bound = max(_ALWAYS, ceil(_SHARE * (self._flying.total() + 1) / len(self.servers)))
            server = next((each for each in left if self._flying[each] < bound), left[0])
            self._flying[server] += 1
        try:
            yield server
        finally:
            with self._lock:
                self._flying[server] -= 1


def routed(
    router: Router,
    key: bytes,
    deadline: Deadline,
    attempts: int,
    send: Callable[[str], Generator[Any, Any, T]],
    closed: Callable[[], bool],
) -> Generator[Any, Any, T]:
    """Ask the prompt's server, and the next ones while it is full or away.

    Args:
        router: of the servers.
        key: of the prompt.
        deadline: of the whole.
        attempts: how often each server is asked, with gRPC's pauses between two rounds.
        send: the steps that ask one server.
        closed: whether nobody is to be asked any more.

    Raises:
        ServerUnavailable: no server took the call; the error of the last.
    """
    pausing = pauses(attempts)
    while True:
        passed: list[str] = []
        for _ in router.servers:
            with router.call(key, passed) as server:
                try:
                    return (yield from send(server))
                except ServerUnavailable as error:
                    if closed():
                        raise
                    passed.append(server)
                    last = error
        pause = next(pausing, None)
        if pause is None:
            raise last
        yield Pause(min(pause, deadline.left))
        if closed():
            raise last


def prompt_key(request: RewardRequest) -> bytes:
    """Digest what a conversation begins with: up to its first user message, with the media there.

    So a dialogue stays where its first turns' keys and values are, however long it gets.
    """
    messages = json.loads(request.messages)
    roles = [message["role"] for message in messages]
    beginning = messages[: roles.index("user") + 1] if "user" in roles else messages
    contents = [m["content"] for m in beginning if not isinstance(m["content"], str)]
    parts = [part for content in contents for part in content]
    shown = sum(part.get("frames", 1) for part in parts if part["type"] != "text")
    return _digest([json.dumps(beginning).encode(), *request.media[:shown]])


def tokens_key(request: TokenRequest) -> bytes:
    """Digest a prompt's token ids and pixels."""
    tensors = request.tensors
    ids = tensors[protocol.INPUT_IDS][: tensors[protocol.SEGMENT_LENGTHS][0]]
    grids = tensors[protocol.GRIDS].tobytes()
    return _digest([ids.tobytes(), grids, tensors[protocol.PIXELS].data])


def _digest(values: Sequence[bytes | memoryview]) -> bytes:
    digest = blake2b(digest_size=16)
    for value in values:
        digest.update(len(value).to_bytes(8, "little"))
        digest.update(value)
    return digest.digest()


def _weight(server: str, key: bytes) -> bytes:
    return blake2b(server.encode(), key=key, digest_size=8).digest()
