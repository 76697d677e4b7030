"""The models' own metrics, as Prometheus families beside Triton's on its metrics port.

Docs, alerts and dashboards use these names. Instances of a model are processes of their own; Triton
adds up what they add to a series of equal labels, so counters are shared. What is set and not added
has the label `instance`, or the last one would count alone.

Each update is a call into Triton of some 20 us, so they are made once a batch or forward pass.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Name -> help. Seconds are wall time; those of the two towers are the device's.
PREPROCESS_COUNTERS = {
    "triward_preprocess_seconds_total": "Parsing, decoding, resizing and tokenizing.",
}
FORWARD_COUNTERS = {
    "triward_conversations_total": "Conversations that were scored.",
    "triward_tokens_computed_total": "Tokens that went through the language model.",
    "triward_tokens_saved_total": "Tokens that did not, since conversations shared them.",
    "triward_prefix_tokens_reused_total": "Tokens that did not, since the prefix cache had them.",
    "triward_prefix_tokens_evicted_total": "Tokens that the prefix cache forgot for lack of room.",
    "triward_forward_passes_total": "Forward passes.",
    "triward_forward_capacity_tokens_total": "max_batch_tokens, summed over forward passes.",
    "triward_images_encoded_total": "Images and videos that went through the vision tower.",
    "triward_images_cached_total": "Images and videos whose embeddings were kept.",
    "triward_vision_seconds_total": "The vision tower's time.",
    "triward_language_model_seconds_total": "The language model's and the value head's time.",
    "triward_oom_retries_total": "Forward passes that were halved for lack of memory.",
    "triward_score_count": "Scores in the histogram.",
}
FORWARD_GAUGES = {
    "triward_embedding_cache_bytes": "Bytes of image embeddings that are kept.",
    "triward_prefix_cache_bytes": "Bytes of keys and values that are kept.",
}
SCORE_SUM = "triward_score_sum"
REQUESTS = "triward_instance_requests_total"
CANARIES = "triward_instance_canaries_total"
CANARY = "triward_canary_score"
ERRORS = "triward_errors_total"
WORKING = "triward_working_since_seconds"
SCORES = "triward_score_bucket"
# Upper bounds; scores of published reward models lie within +-30.
SCORE_BOUNDS = (
    -30.0, -25.0, -20.0, -15.0, -12.5, -10.0, -7.5, -5.0, -2.5, 0.0, 2.5, 5.0, 7.5, 10.0, 12.5,
    15.0, 17.5, 20.0, 22.5, 25.0, 30.0, float("inf"),
)  # fmt: skip


class Metrics:
    """The families of one model instance.

    Args:
        pb_utils: Triton's module.
        labels: of every series: model and version.
        instance: Triton's name for it.
        counters: names with help.
        gauges: likewise, of this instance alone.
        codes: gRPC status names that requests may fail with.
    """

    def __init__(
        self,
        pb_utils: Any,
        labels: Mapping[str, str],
        instance: str,
        counters: Mapping[str, str],
        gauges: Mapping[str, str],
        codes: Iterable[str],
    ) -> None:
        self._pb = pb_utils
        self._lock, self._under_way = threading.Lock(), 0
        self._labels, self._own = dict(labels), {**labels, "instance": instance}
        self._families: list[Any] = []  # a metric dies with its family
        kind = pb_utils.MetricFamily
        self._series = {
            name: self._family(name, text, kind.COUNTER).Metric(labels=self._labels)
            for name, text in counters.items()
        } | {
            name: self._family(name, text, kind.GAUGE).Metric(labels=self._own)
            for name, text in gauges.items()
        }
        errors = self._family(ERRORS, "Requests that were answered with an error.", kind.COUNTER)
        text = "Monotonic time of the last progress of a batch under way; 0 between batches."
        working = self._family(WORKING, text, kind.GAUGE)
        self._working = working.Metric(labels=self._own)
        self._errors = {code: errors.Metric(labels=self._labels | {"code": code}) for code in codes}

    def close(self) -> None:
        """Give everything back to Triton, while it is there: first the series, then their families.

        Nothing can be counted after it.
        """
        del self._series, self._errors, self._working
        del self._families

    def add(self, **amounts: float) -> None:
        """Increase counters, named without `triward_` and `_total`."""
        for name, amount in amounts.items():
            if amount:
                self._series[f"triward_{name}_total"].increment(amount)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._series[name].set(value)

    def error(self, code: str) -> None:
        """Count a request that failed."""
        self._errors[code].increment(1)

    def progress(self) -> None:
        """Show that the batch under way gets somewhere; a hung one does not."""
        self._working.set(time.monotonic())

    @contextmanager
    def working(self) -> Iterator[None]:
        """Show that the block is under way; several may be, also on several threads."""
        with self._lock:
            self._under_way += 1
        self.progress()
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                if not self._under_way:
                    self._working.set(0)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - begun})

    def _family(self, name: str, text: str, kind: Any) -> Any:
        family = self._pb.MetricFamily(name=name, description=text, kind=kind)
        self._families.append(family)
        return family


class ForwardMetrics(Metrics):
    """Metrics of the forward model, with the histogram of scores.

    The histogram is made of counters, one call for each bucket that a batch touches; Triton's own
    kind takes one for each score, and older releases have none.
    """

    def __init__(
        self, pb_utils: Any, labels: Mapping[str, str], instance: str, codes: Iterable[str]
    ) -> None:
        super().__init__(pb_utils, labels, instance, FORWARD_COUNTERS, FORWARD_GAUGES, codes)
        kind = pb_utils.MetricFamily
        total = self._family(SCORE_SUM, "Sum of the scores in the histogram.", kind.GAUGE)
        self._sum = total.Metric(labels=self._labels)
        text = "Requests that an instance took, health checks among them."
        self._requests = self._family(REQUESTS, text, kind.COUNTER).Metric(labels=self._own)
        text = "Health checks that an instance answered."
        self._canaries = self._family(CANARIES, text, kind.COUNTER).Metric(labels=self._own)
        self._canary_family = self._family(CANARY, "Scores of the last one.", kind.GAUGE)
        self._canary: dict[int, Any] = {}
        family = self._family(SCORES, "Scores up to a bound.", kind.COUNTER)
        self._buckets = [
            family.Metric(
                labels=self._labels | {"le": "+Inf" if bound == float("inf") else f"{bound}"}
            )
            for bound in SCORE_BOUNDS
        ]

    def close(self) -> None:
        """Close the metrics."""
        del self._buckets, self._sum, self._requests, self._canaries, self._canary
        del self._canary_family
        super().close()

    def took(self, requests: int) -> None:
        """Count a batch of requests as this instance's."""
        self._requests.increment(requests)

    def checked(self, scores: Iterable[float]) -> None:
        """Show what this instance scored in a health check: who asks cannot choose an instance."""
        for place, score in enumerate(scores):
            if place not in self._canary:
                labels = {**self._own, "response": str(place)}
                self._canary[place] = self._canary_family.Metric(labels=labels)
            self._canary[place].set(score)
        self._canaries.increment(1)

    def observe(self, scores: Iterable[float]) -> None:
        """Put scores into the histogram."""
        values = list(scores)
        if not values:
            return
        first = Counter(bisect_left(SCORE_BOUNDS, value) for value in values)
        below = 0
        for index, bucket in enumerate(self._buckets):
            below += first[index]
            if below:
                bucket.increment(below)
        self.add(conversations=len(values))
        self._series["triward_score_count"].increment(len(values))
        self._sum.increment(sum(values))
