"""One batch is read while the one before it is computed.

Triton hands a model its next batch when `execute` returns. Here it returns when the last pass of
its batch is in the device's queue, and other threads wait for the scores and send the answers. So
the device finds the next batch prepared when it is done with this one: unpacked, checked, its media
known, its conversations sorted. A third batch is not taken before that one is launched.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

_COMPLETE = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL: an answer is all of them

BatchT = TypeVar("BatchT")
ResultT = TypeVar("ResultT")
T = TypeVar("T")


class Overlap(Generic[BatchT, ResultT]):
    """Computes one batch at a time and answers its requests.

    Args:
        compute: returns a batch's results, one for each request; it calls its second argument when
            all passes are launched. It has a thread of its own.
        answer: makes a response of a result or of an exception; on another thread, so that the
            device does not wait for it.
        working: shows that a batch is under way, from when it is read until it is answered.
        begin: what the thread that computes does first.
    """

    def __init__(
        self,
        compute: Callable[[BatchT, Callable[[], None]], Sequence[ResultT | Exception]],
        answer: Callable[[ResultT | Exception], Any],
        working: Callable[[], AbstractContextManager[None]],
        begin: Callable[[], object],
    ) -> None:
        self._compute = compute
        self._answer = answer
        self._working = working
        self._computing = ThreadPoolExecutor(1, "computing", begin)
        self._answering = ThreadPoolExecutor(1, "answering")

    def execute(self, requests: Sequence[Any], read: Callable[[Sequence[Any]], BatchT]) -> None:
        """Read a batch, hand it over and wait until the device has all of it.

        Args:
            requests: Triton's; each gets one answer, sooner or later.
            read: makes a batch of them, while the one before is computed.
        """
        work = ExitStack()
        work.enter_context(self._working())
        senders = [request.get_response_sender() for request in requests]
        try:
            batch = read(requests)
        except Exception as error:
            self._answering.submit(self._send, senders, [error] * len(senders), work)
            return
        launched = threading.Event()
        self._computing.submit(self._run, batch, senders, launched, work)
        launched.wait()

    def call(self, function: Callable[[], T]) -> T:
        """Return what a function returns on the thread that computes."""
        return self._computing.submit(function).result()

    def close(self) -> None:
        """Answer everything that was handed over."""
        self._computing.shutdown()
        self._answering.shutdown()

    def _run(
        self, batch: BatchT, senders: Sequence[Any], launched: threading.Event, work: ExitStack
    ) -> None:
        results: Sequence[ResultT | Exception]
        try:
            results = self._compute(batch, launched.set)
        except Exception as error:
            results = [error] * len(senders)
        finally:
            launched.set()
        self._answering.submit(self._send, senders, results, work)

    def _send(
        self, senders: Sequence[Any], results: Sequence[ResultT | Exception], work: ExitStack
    ) -> None:
        with work:
            for sender, result in zip(senders, results, strict=True):
                try:
                    sender.send(self._answer(result), _COMPLETE)
                except Exception:  # of this one; the others' callers wait
                    logger.exception("an answer could not be sent")
