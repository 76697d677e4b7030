"""What operators see: every number that a dashboard or an alert names, and that it is right."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest
import torch

from tests.conftest import ROOT, brief, encode
from tests.conversations import picture
from tests.engine.test_scoring import request
from tests.promql import metric_names
from triward import InvalidRequest, RewardClient
from triward_server.backend.metrics import (
    CANARIES,
    CANARY,
    ERRORS,
    FORWARD_COUNTERS,
    FORWARD_GAUGES,
    PREPROCESS_COUNTERS,
    REQUESTS,
    SCORE_BOUNDS,
    SCORE_SUM,
    SCORES,
    WORKING,
    ForwardMetrics,
)
from triward_server.config import ForwardConfig
from triward_server.engine.passes import Pass
from triward_server.engine.scoring import Scorer
from triward_server.serving.canary import Canary
from triward_server.serving.launch import TritonServer
from triward_server.serving.triton_http import fetch

OWN = {WORKING, REQUESTS, CANARIES, CANARY}  # of an instance
OURS = {*FORWARD_COUNTERS, *FORWARD_GAUGES, *PREPROCESS_COUNTERS, ERRORS, SCORES, SCORE_SUM, *OWN}
Metric = Callable[[str, str], float]


@pytest.fixture
def page(server: TritonServer) -> Callable[[], str]:
    url = f"http://127.0.0.1:{server.endpoints.metrics_port}/metrics"
    return lambda: fetch(Request(url), 10).decode()


def test_every_metric_that_is_named_anywhere_is_there(
    page: Callable[[], str], client: RewardClient, server: TritonServer, repository: Path
) -> None:
    server.http.infer(Canary.of(repository, "1"), 20)
    client.score([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    served = set(re.findall(r"^(\w+)(?:{| )", page(), re.MULTILINE))
    named = metric_names()
    assert named >= {"triward_score_bucket", "triward_errors_total"}, "the files are read"
    # Without a GPU Triton has no metrics of one, and `up` is Prometheus's own.
    missing = {name for name in named - served if not name.startswith("nv_gpu_")} - {"up"}
    assert missing == set()
    assert served >= OURS
    documented = (ROOT / "docs" / "operations.md").read_text()
    assert {name for name in OURS if f"`{name}`" not in documented} == set()


def test_a_group_is_counted(client: RewardClient, metric: Metric) -> None:
    """Eight responses to one prompt with an image: what was computed, shared and encoded."""

    def read() -> dict[str, float]:
        names = [n for n in OURS - set(PREPROCESS_COUNTERS) if n not in {ERRORS, SCORES, *OWN}]
        return {name: metric(name, "reward_forward") for name in names}

    part = {"type": "image", "image": encode(picture(140, 112, 77))}
    prompt = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    before, seconds = read(), metric("triward_preprocess_seconds_total", "reward_preprocess")
    scores = client.score_responses(prompt, ["It is a picture."] * 4 + ["No idea."] * 4)
    once = read()
    client.score_responses(prompt, ["Other."])
    twice = read()
    look = [{"type": "text", "text": "Look: "}, part]
    client.score_responses([{"role": "user", "content": look}], ["Yes."])
    thrice = read()
    gained = {name: once[name] - before[name] for name in once}
    later = {name: twice[name] - once[name] for name in once}
    last = {name: thrice[name] - twice[name] for name in once}

    assert gained["triward_conversations_total"] == gained["triward_score_count"] == 8
    assert gained["triward_score_sum"] == pytest.approx(sum(scores), rel=1e-4)
    assert gained["triward_forward_passes_total"] == 1
    assert gained["triward_forward_capacity_tokens_total"] == 32_768
    assert gained["triward_images_encoded_total"] == 1
    assert gained["triward_images_cached_total"] == 0
    assert later["triward_images_encoded_total"] == 0
    assert later["triward_prefix_tokens_reused_total"] > later["triward_tokens_computed_total"]
    assert later["triward_images_cached_total"] == 0, "nor looked up: its tokens are cached"
    assert last["triward_images_cached_total"] == 1
    assert thrice["triward_prefix_cache_bytes"] > 0
    # Two different responses behind one prompt: the other seven prompts were saved.
    assert gained["triward_tokens_saved_total"] > 3 * gained["triward_tokens_computed_total"]
    assert gained["triward_tokens_computed_total"] > 20
    assert gained["triward_vision_seconds_total"] > 0
    assert gained["triward_language_model_seconds_total"] > 0
    assert twice["triward_embedding_cache_bytes"] > 0
    assert metric("triward_preprocess_seconds_total", "reward_preprocess") > seconds


def test_errors_are_counted_by_code(client: RewardClient, page: Callable[[], str]) -> None:
    def read() -> float:
        line = rf'^{ERRORS}{{code="INVALID_ARGUMENT",model="reward_preprocess"[^}}]*}} (\S+)$'
        found = re.search(line, page(), re.MULTILINE)
        assert found
        return float(found[1])

    before = read()
    for _ in range(3):
        with pytest.raises(InvalidRequest):
            client.score_responses([{"role": "user", "content": "?"}], ["x" * 2**22, "y"])
    assert read() == before + 3


def test_health_checks_are_no_scores(
    server: TritonServer, repository: Path, metric: Metric
) -> None:
    def read() -> tuple[float, float]:
        names = ("triward_score_count", "triward_forward_passes_total")
        count, passes = (metric(name, "reward_forward") for name in names)
        return count, passes

    before = read()
    server.http.infer(Canary.of(repository, "1"), 20)
    count, passes = read()
    assert (count, passes) == (before[0], before[1] + 1)


class FakeTriton:
    """Remembers what a model tells Triton to count."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.calls = 0
        self.gone: list[str] = []
        triton = self

        class MetricFamily:
            COUNTER, GAUGE = "counter", "gauge"

            def __init__(self, name: str, description: str, kind: str) -> None:
                self.name = name

            def __del__(self) -> None:
                triton.gone.append("family")

            def Metric(self, labels: dict[str, str]) -> Any:
                kept = (labels[name] for name in ("le", "code", "response", "instance")
                        if name in labels)  # fmt: skip
                key = self.name, next(kept, "")
                triton.values.setdefault(key, 0.0)
                return Series(key)

        class Series:
            def __init__(self, key: tuple[str, str]) -> None:
                self.key = key

            def increment(self, amount: float) -> None:
                triton.calls += 1
                triton.values[self.key] += amount

            def set(self, value: float) -> None:
                triton.values[self.key] = value

            def __del__(self) -> None:
                triton.gone.append("series")

        self.MetricFamily = MetricFamily


def test_the_histogram_is_prometheus_cumulative() -> None:
    fake = FakeTriton()
    metrics = ForwardMetrics(fake, {"model": "m", "version": "1"}, "m_0_0", ["INTERNAL"])
    scores = [-99.0, -30.0, -29.9, 0.0, 0.1, 2.5, 23.9, 31.0]
    metrics.observe(scores[:5])
    metrics.observe(scores[5:])
    metrics.observe([])
    for bound in SCORE_BOUNDS:
        label = "+Inf" if bound == float("inf") else str(bound)
        assert fake.values[SCORES, label] == sum(score <= bound for score in scores), bound
    assert fake.values["triward_score_count", ""] == len(scores)
    assert fake.values["triward_score_sum", ""] == pytest.approx(sum(scores))


def test_series_go_before_their_families() -> None:
    """The other way round Triton's stub crashes when the model is unloaded."""
    fake = FakeTriton()
    metrics = ForwardMetrics(fake, {"model": "m", "version": "1"}, "m_0_0", ["INTERNAL", "OK"])
    metrics.close()
    assert fake.gone == sorted(fake.gone, reverse=True)
    assert fake.gone.count("series") == len(fake.values) > fake.gone.count("family") > 10


def test_nothing_is_sent_for_what_did_not_happen() -> None:
    fake = FakeTriton()
    metrics = ForwardMetrics(fake, {"model": "m", "version": "1"}, "m_0_0", ["INTERNAL"])
    metrics.add(oom_retries=0, tokens_saved=0, tokens_computed=5)
    assert fake.calls == 1


def test_an_instance_shows_its_own_canaries() -> None:
    fake = FakeTriton()
    metrics = ForwardMetrics(fake, {"model": "m", "version": "1"}, "m_0_1", ["INTERNAL"])
    metrics.checked([1.5, -2.0])
    metrics.checked([1.5, -3.0])
    assert [fake.values[CANARY, place] for place in "01"] == [1.5, -3.0]
    assert fake.values[CANARIES, "m_0_1"] == 2
    metrics.close()
    assert fake.gone == sorted(fake.gone, reverse=True)


def test_work_shows_while_it_lasts() -> None:
    fake = FakeTriton()
    metrics = ForwardMetrics(fake, {"model": "m", "version": "1"}, "m_0_0", ["INTERNAL"])
    with pytest.raises(ZeroDivisionError), metrics.working():
        first = fake.values[WORKING, "m_0_0"]
        metrics.progress()
        assert time.monotonic() >= fake.values[WORKING, "m_0_0"] >= first > 0
        raise ZeroDivisionError
    assert fake.values[WORKING, "m_0_0"] == 0


def test_a_pass_that_ran_out_of_memory_is_a_retry(checkpoint: Path) -> None:
    scorer = Scorer(checkpoint, ForwardConfig(dtype="float32", device="cpu"))
    passes: list[Pass] = []
    real = scorer._model.forward

    def forward(batch: Any, *rest: Any) -> Any:
        if len(batch.scored) > 1:
            raise torch.OutOfMemoryError("no")
        return real(batch, *rest)

    scorer._model.forward = forward
    scorer.score([request(5, 3, 4)], observe=passes.append)
    assert [done.out_of_memory for done in passes] == [True, True, False, False], (
        "whole, whole without a prefix cache, in halves"
    )


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OpenTelemetry collector that keeps what it is sent."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1/traces", bodies
        httpd.shutdown()
        thread.join()


def test_traces_reach_a_collector(
    echo_repository: Path, collector: tuple[str, list[bytes]], tmp_path: Path
) -> None:
    url, bodies = collector
    with brief(echo_repository, tmp_path / "triton.log", trace_endpoint=url) as server:
        with RewardClient(server.endpoints.grpc, timeout=60) as client:
            client.score([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        end = time.monotonic() + 30
        while not any(b"reward_forward" in body for body in bodies):
            assert time.monotonic() < end, "no span of the forward model arrived"
            time.sleep(0.05)
    together = b"".join(bodies)
    assert b"reward_preprocess" in together and b"InferRequest" in together


def test_dashboards_are_valid_json() -> None:
    for path in (ROOT / "docker" / "grafana").rglob("*.json"):
        json.loads(path.read_text())
