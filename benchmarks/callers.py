"""The load of a soak: callers of every kind, until their standard input ends.

    python -m benchmarks.callers URL KIND SEED

Prints what came back as JSON, `{"kind/outcome": count}`. Imports neither torch nor the server, so
that several of these leave the machine to it.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from tritonclient.grpc import InferenceServerClient

from benchmarks.workloads import Messages, photo
from triward import (
    DeadlineExceeded,
    InvalidRequest,
    RewardClient,
    ServerUnavailable,
    TriwardError,
)
from triward.conversation import build_request
from triward.deadline import Deadline
from triward.wire import infer_arguments

BURST = 200  # requests at once, several times what may wait
BURST_EVERY = 45.0  # seconds
_TIMEOUT = 60.0
_SIZES = (28, 56, 84, 112, 140, 196, 280, 333, 420, 504)
_KEPT = 12  # images that come again and again


class Caller:
    """One caller with its own random requests.

    Args:
        url: of the server's gRPC endpoint.
        seed: of everything random.
    """

    def __init__(self, url: str, seed: int) -> None:
        self.client = RewardClient(url, timeout=_TIMEOUT, max_attempts=1)
        self._raw = InferenceServerClient(url)
        self.rng = np.random.default_rng(seed)
        self._kept = [self._image() for _ in range(_KEPT)]

    def single(self) -> str:
        """Score one conversation, text or with an image, old or new."""
        return self.score(self.conversation())

    def group(self) -> str:
        """Several responses to one prompt."""
        responses = [self._text(40) for _ in range(self.rng.choice([2, 4, 8, 16]))]
        self.client.score_responses(self._prompt(), responses)
        return "scored"

    def bad(self) -> str:
        """Send what the client lets through and no server can score."""
        whole = _encoded(photo(self.rng, 90, 60), str(self.rng.choice(["PNG", "JPEG"])))
        image = whole[: int(self.rng.integers(1, len(whole)))]
        if self.rng.random() < 0.3:
            image = self.rng.bytes(2000)
        messages: Messages = [{"role": "user", "content": [{"type": "image", "image": image}]}]
        if self.rng.random() < 0.2:
            messages = [{"role": "user", "content": "word " * 20_000}]
        self.client.score_responses(messages, ["yes"])
        return "scored"  # a file that lacks its last bytes alone is whole

    def cancelled(self) -> str:
        """Give up a request at some moment of its way."""
        request = build_request(self._prompt(), [self._text(80)], Deadline(_TIMEOUT))
        arguments = infer_arguments(request, model="reward", remaining=_TIMEOUT)
        done, errors = threading.Event(), list[Any]()

        def answered(result: Any, error: Any) -> None:
            errors.append(error)
            done.set()

        call = self._raw.async_infer(callback=answered, **arguments)
        if not done.wait(float(self.rng.exponential(0.05))):
            call.cancel()
        done.wait(_TIMEOUT)
        return "scored" if errors == [None] else "cancelled"

    def impatient(self) -> str:
        """Send a request with less time than it takes, mostly."""
        return self.score(self.conversation(), float(self.rng.exponential(0.2)) + 1e-3)

    def score(self, messages: Messages, timeout: float = _TIMEOUT) -> str:
        """Make a conversation that can be scored."""
        self.client.score(messages, timeout=timeout)
        return "scored"

    def conversation(self) -> Messages:
        """Any."""
        return [*self._prompt(), {"role": "assistant", "content": self._text(80)}]

    def _prompt(self) -> Messages:
        parts: list[dict[str, Any]] = [{"type": "text", "text": self._text(120)}]
        if self.rng.random() < 0.6:
            old = self.rng.random() < 0.5
            image = self._kept[self.rng.integers(_KEPT)] if old else self._image()
            parts.insert(0, {"type": "image", "image": image})
        return [{"role": "user", "content": parts}]

    def _image(self) -> Image.Image:
        width, height = self.rng.choice(_SIZES, 2)
        return photo(self.rng, int(width), int(height))

    def _text(self, words: int) -> str:
        """So many words at most, of which there are very many different ones."""
        numbers = self.rng.integers(0, 10**6, self.rng.integers(1, words + 1))
        return " ".join(f"{number:x}" for number in numbers)


def outcome(call: Callable[[], str]) -> str:
    """Name the outcome of a call in a word."""
    try:
        return call()
    except InvalidRequest:
        return "invalid"
    except ServerUnavailable:
        return "unavailable"
    except DeadlineExceeded:
        return "late"
    except TriwardError as error:
        return f"error: {str(error)[:200]}"


def steadily(
    caller: Caller, kinds: Sequence[str], pause: float, stop: threading.Event, counts: Counter[str]
) -> None:
    """Send one request after the other, with pauses of random length between them.

    Args:
        caller: whose methods are called.
        kinds: their names.
        pause: seconds on average.
        stop: ends it.
        counts: where outcomes are counted.
    """
    while not stop.wait(float(caller.rng.exponential(pause))):
        kind = str(caller.rng.choice(kinds))
        counts[f"{kind}/{outcome(getattr(caller, kind))}"] += 1


def in_bursts(caller: Caller, stop: threading.Event, counts: Counter[str]) -> None:
    """Send nothing for a while, then far more requests at once than may wait."""
    with ThreadPoolExecutor(BURST) as pool:
        while not stop.wait(BURST_EVERY):
            requests = [caller.conversation() for _ in range(BURST)]
            for result in pool.map(partial(_outcome, caller), requests):
                counts[f"burst/{result}"] += 1


def _outcome(caller: Caller, messages: Messages) -> str:
    return outcome(lambda: caller.score(messages))


def _encoded(image: Image.Image, format_: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_)
    return buffer.getvalue()


STEADY: dict[str, tuple[tuple[str, ...], float]] = {
    "singles": (("single",), 0.02),
    "groups": (("group",), 0.1),
    "nuisances": (("bad", "cancelled", "impatient"), 0.03),
    # Without those that are given up, by whatever means: Triton 24.10 can abort over them.
    "wrong": (("bad",), 0.03),
}


def main(url: str, kind: str, seed: int) -> None:
    """Call until standard input ends."""
    stop, counts = threading.Event(), Counter[str]()
    if kind in STEADY:
        kinds, pause = STEADY[kind]
        callers = [Caller(url, seed * 1000 + index) for index in range(2)]
        threads = [
            threading.Thread(target=steadily, args=(caller, kinds, pause, stop, counts))
            for caller in callers
        ]
    else:
        threads = [threading.Thread(target=in_bursts, args=(Caller(url, seed), stop, counts))]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
