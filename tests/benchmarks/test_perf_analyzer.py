"""Input files, what the runner makes of perf_analyzer's raw export, the sizing and the report."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer import BadParameter

import benchmarks.perf_analyzer.__main__ as perf
from benchmarks.perf_analyzer import inputs, report, runner
from benchmarks.perf_analyzer.inputs import MIXES, Scale, encode, requests
from benchmarks.perf_analyzer.runner import Load, Target, Tool, find_perf_analyzer, measure_point
from benchmarks.perf_analyzer.sizing import Objective, capacity, replicas
from tests.conftest import ROOT
from triward.conversation import RewardRequest
from triward_server.serving.launch import TritonServer
from triward_server.serving.triton_http import GRPC_ADMIN_HEADER

MILLISECOND = 10**6
COMMITTED = max((ROOT / "benchmarks" / "results").glob("*-perf-cpu-*.json"))


def strings(tensor: dict[str, Any]) -> list[bytes]:
    """The values of a BYTES tensor in an input file, read as perf_analyzer's server does."""
    if tensor["shape"] == [0]:
        assert tensor["content"] == []
        return []
    raw = base64.b64decode(tensor["content"]["b64"], validate=True)
    values = []
    while raw:
        length = int.from_bytes(raw[:4], "little")
        values.append(raw[4 : 4 + length])
        assert len(values[-1]) == length
        raw = raw[4 + length :]
    assert tensor["shape"] == [len(values)]
    return values


# --- Input files


@pytest.mark.parametrize("mix", MIXES)
def test_equal_seeds_give_equal_files(mix: str) -> None:
    assert encode(requests(mix, seed=3, count=11)) == encode(requests(mix, seed=3, count=11))
    assert encode(requests(mix, seed=3, count=11)) != encode(requests(mix, seed=4, count=11))


@pytest.mark.parametrize("scale", Scale)
def test_an_entry_is_exactly_the_request(scale: Scale) -> None:
    batch = requests("mixed", seed=1, count=10, scale=scale)
    steps = json.loads(encode(batch))["data"]
    assert len(steps) == len(batch)
    shapes = inputs.SHAPES[scale]
    for step, request in zip(steps, batch, strict=True):
        assert step.keys() == {"messages", "responses", "media"}
        assert strings(step["messages"]) == [request.messages]
        assert strings(step["responses"]) == list(request.responses)
        media = strings(step["media"])
        assert media == list(request.media)
        (message,) = json.loads(request.messages)
        images = [part for part in message["content"] if part == {"type": "image"}]
        assert len(images) == len(media)
        for file in media:
            picture = Image.open(io.BytesIO(file))
            picture.load()
            assert picture.size in shapes.images and picture.format in inputs.FORMATS


def test_a_mix_holds_its_shares() -> None:
    batch = requests("mixed", count=100)
    kinds = [(len(request.responses), len(request.media)) for request in batch]
    assert {kind: kinds.count(kind) for kind in kinds} == {(1, 1): 50, (1, 0): 30, (8, 1): 20}
    assert kinds != sorted(kinds), "shuffled, not one kind behind the other"


def test_no_two_requests_are_alike() -> None:
    """The server computes equal prompts and images once: such a file would flatter it."""
    batch = requests("mixed")
    assert len({request.messages for request in batch}) == len(batch)
    media = [file for request in batch for file in request.media]
    assert len(set(media)) == len(media)
    assert all(len(batch) % n for n in range(2, len(batch))), "prime; see REQUESTS"


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    inputs.main(tmp_path / "text.json", mix="text", seed=2, count=5)
    assert (tmp_path / "text.json").read_text() == encode(requests("text", seed=2, count=5))
    with pytest.raises(BadParameter, match="no mix 'txt'; there are single"):
        inputs.main(tmp_path / "x.json", mix="txt")


# --- Runs of the real perf_analyzer against a real server


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Copies of the raw exports of all runs, in order."""
    copies: list[Path] = []
    run = runner._run

    def keep(tool: Tool, target: Target, file: Path, load: Load, export: Path) -> tuple[int, str]:
        result = run(tool, target, file, load, export)
        copies.append(tmp_path / f"export-{len(copies)}.json")
        if export.exists():
            shutil.copy(export, copies[-1])
        return result

    monkeypatch.setattr(runner, "_run", keep)
    return copies


def recompute(export: Path) -> dict[str, Any] | None:
    """Counts and percentiles in plain Python, by definition; None if there is no export."""
    if not export.exists():
        return None
    experiment = json.loads(export.read_text(errors="replace"))["experiments"][0]
    begin, *_, end = experiment["window_boundaries"]
    begin += (end - begin) // 10
    rows = experiment["requests"]
    pairs = [(r["timestamp"], r["response_timestamps"][0]) for r in rows]
    values = sorted((b - a) / MILLISECOND for a, b in pairs if begin <= b <= end)

    def percentile(p: float) -> float:
        place = p / 100 * (len(values) - 1)
        below = int(place)
        above = min(below + 1, len(values) - 1)
        return values[below] + (place - below) * (values[above] - values[below])

    return {
        "mode": experiment["experiment"]["mode"],
        "mix": "mixed" if any(r["request_inputs"]["media"] for r in rows) else "text",
        "all": len(pairs),
        "requests": len(values),
        "requests_per_s": len(values) / (end - begin) * 1e9,
        "latency_ms": {"mean": sum(values) / len(values)}
        | {f"p{p}": percentile(p) for p in (50, 95, 99)},
    }


@pytest.mark.slow
def test_results_are_what_the_export_says(
    server: TritonServer, exports: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    perf.main(
        output, url=server.endpoints.grpc, mix=["text"], open_mix=["mixed"], concurrency=[2],
        fraction=[0.5], closed_seconds=4.5, open_seconds=6, count=13, p99_ms=60_000, peak=1000,
        header=[f"{GRPC_ADMIN_HEADER}:{server.admin_key}"],
    )  # fmt: skip
    results = json.loads(output.read_text())
    mixes = results["mixes"]
    assert mixes.keys() == {"text", "mixed"}, "an open loop needs a closed one first"
    assert mixes["text"]["open"] == []
    points = [mixes["text"]["closed"][0], mixes["mixed"]["closed"][0], mixes["mixed"]["open"][0]]
    page = output.with_suffix(".html").read_text()
    # Each mix warms up first; where a window was empty, its longer repetition follows.
    truths = {(t["mode"], t["mix"]): t for t in map(recompute, exports) if t}
    for mix, point in zip(("text", "mixed", "mixed"), points, strict=True):
        mode = "request_rate" if point["loop"] == "open" else "concurrency"
        truth = truths[mode, mix]
        assert point["requests"] == truth["requests"] > 5
        assert point["requests_per_s"] == pytest.approx(truth["requests_per_s"], rel=1e-3)
        assert point["latency_ms"] == pytest.approx(truth["latency_ms"], abs=2e-3)
        assert point["failed"] == 0 and point["error"] is None
        # All that were sent passed both models, those that the export lacks included.
        counts = {model: row["requests"] for model, row in point["server"].items()}
        assert set(counts.values()) == {truth["all"] + point["unfinished"]}
        split, forward = point["server"]["reward"], point["server"]["reward_forward"]
        assert 0 < forward["compute_infer_ms"] < split["total_ms"]
        assert 0 < forward["executions"] <= forward["requests"]
        for name in ("p50", "p95", "p99"):
            assert f"<td>{point['latency_ms'][name]:,.0f}</td>" in page
        assert f"<td>{point['requests']}</td><td>{point['requests_per_s']:.2f}</td>" in page
    closed, opened = points[1:]
    assert mixes["mixed"]["capacity_per_s"] == closed["requests_per_s"]
    assert opened["value"] == pytest.approx(closed["requests_per_s"] / 2, abs=1e-3)
    assert closed["unfinished"] >= 2, "each of two callers waits for an answer at the end"
    sizing = results["sizing"]["mixed"]
    if not opened["overloaded"]:
        assert sizing["working"] == -(-1000 * 1.3 // opened["arrivals_per_s"])
        assert f"<b>{sizing['replicas']} replicas</b>" in page
    assert {"cpu", "commit", "packages", "load_average"} <= results["machine"].keys()


@pytest.mark.slow
def test_a_failure_is_a_failure(server: TritonServer, exports: list[Path], tmp_path: Path) -> None:
    good = requests("text", count=6)
    bad = RewardRequest(b"{", (b"yes",), ())
    (tmp_path / "inputs.json").write_text(encode([*good, bad]))
    load = Load("closed", 2, 6)
    with find_perf_analyzer() as tool:
        point = measure_point(
            tool,
            Target(server.endpoints.grpc, {GRPC_ADMIN_HEADER: server.admin_key}),
            tmp_path / "inputs.json",
            load,
        )
    assert point["failed"] >= 1
    assert "messages: Invalid JSON" in point["error"]
    assert not {"requests_per_s", "latency_ms"} & point.keys()
    assert capacity([point]) is None
    row = report._row(point, {"responses_per_request": 1})
    assert f"<td>{point['failed']}</td>" in row and "class=bad" in row
    assert row.count("<td>–</td>") == 8 and "Invalid JSON" in row


@pytest.mark.slow
def test_a_server_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text(encode(requests("text", count=2)))
    load = Load("closed", 1, 3)
    with find_perf_analyzer() as tool:
        code, text = runner._run(
            tool, Target("127.0.0.1:1"), tmp_path / "inputs.json", load, tmp_path / "export.json"
        )
    assert code != 0
    assert "failed to get model metadata" in runner._reason(text, code)


def test_a_window_without_answers_is_measured_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds: list[float] = []

    def empty(tool: Tool, target: Target, file: Path, load: Load, export: Path) -> tuple[int, str]:
        seconds.append(load.seconds)
        return 99, "Error: No valid requests recorded within time interval. Please use …"

    none = {"execution_count": 0} | {
        f"{name}.{unit}": 0
        for name in ("success", "fail", *runner.PARTS)
        for unit in ("count", "ns")
    }
    idle = dict.fromkeys(("reward", "reward_preprocess", "reward_forward"), none)
    monkeypatch.setattr(runner, "_run", empty)
    monkeypatch.setattr(Target, "statistics", lambda self: idle)
    point = measure_point(Tool("", {}), Target("host:1"), tmp_path, Load("closed", 1, 10))
    assert seconds == [10, 40]
    assert point["error"].startswith("No valid requests") and "requests_per_s" not in point


def test_headers_and_loads_become_flags(tmp_path: Path) -> None:
    """-H reaches gRPC calls too, whatever perf_analyzer's help says."""
    echo = tmp_path / "echo"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    target = Target("host:1", perf._headers(["admin-key: secret"]))
    file = tmp_path / "inputs.json"

    def flags(load: Load) -> list[str]:
        code, text = runner._run(Tool(str(echo), {}), target, file, load, tmp_path / "out")
        assert code == 0
        return text.splitlines()

    closed, opened = flags(Load("closed", 8, 36)), flags(Load("open", 2.5, 36))
    assert "-Hadmin-key:secret" in closed and "--async" in opened
    assert {"--concurrency-range=8", "--max-threads=8"} <= set(closed)
    assert {"--request-rate-range=2.5", "--request-distribution=poisson"} <= set(opened)
    assert "--measurement-interval=10000" in closed, "three windows, each 1.2 times as long"
    with pytest.raises(BadParameter, match="NAME:VALUE"):
        perf._headers(["admin-key"])


# --- Arithmetic


def experiment(times: Sequence[tuple[int, int]], mode: str = "request_rate") -> dict[str, Any]:
    """A raw export of requests from and to milliseconds, within ten seconds."""
    rows = [
        {"timestamp": a * MILLISECOND, "response_timestamps": [b * MILLISECOND]} for a, b in times
    ]
    bounds = [0, 5000 * MILLISECOND, 10_000 * MILLISECOND]
    return {"experiment": {"mode": mode}, "requests": rows, "window_boundaries": bounds}


def test_a_queue_that_grows_is_overload() -> None:
    # One arrival each 100 ms; answers each 100 ms or, too slow, each 200 ms.
    steady = [(at, at + 50) for at in range(0, 9950, 100)]
    fine = runner.summarize(experiment(steady), sent=100)
    assert (fine["requests"], fine["unfinished"], fine["overloaded"]) == (90, 0, False)
    assert fine["requests_per_s"] == fine["arrivals_per_s"] == 10
    assert fine["latency_ms"] == dict.fromkeys(("mean", "p50", "p95", "p99"), 50.0)
    slow = [(100 * n, 200 * n + 200) for n in range(50)]
    late = runner.summarize(experiment(slow), sent=100)
    assert late["unfinished"] == 50 and late["overloaded"]
    assert late["requests_per_s"] == pytest.approx(46 / 9, abs=1e-3)
    assert late["arrivals_per_s"] == pytest.approx(10, rel=0.02)
    assert late["latency_ms"]["p99"] > 4900
    # Closed-loop callers cannot make a queue grow.
    closed = runner.summarize(experiment(slow, mode="concurrency"), sent=100)
    assert not closed["overloaded"]


def test_the_warm_up_is_left_out() -> None:
    times = [(0, 900), (0, 999), (500, 1000), (1000, 1010)]
    assert runner.summarize(experiment(times), sent=4)["latency_ms"]["mean"] == 255.0
    nothing = runner.summarize(experiment(times[:2]), sent=2)
    assert nothing["requests"] == 0 and nothing["latency_ms"] is None


def test_late_departures_are_counted() -> None:
    text = "[WARNING] Perf Analyzer was not able to keep up with the desired request rate. "
    assert runner._delayed(text + "30.41% of the requests were delayed. ") == 30.41
    assert runner._delayed("Throughput: 3 infer/sec") == 0


def point(rate: float, p99: float, **values: Any) -> dict[str, Any]:
    """A measured open-loop point."""
    base = {"loop": "open", "value": rate, "arrivals_per_s": rate, "latency_ms": {"p99": p99}}
    return {**base, "failed": 0, "error": None, "overloaded": False, **values}


def test_replicas() -> None:
    objective = Objective(p99_ms=500, peak=40, headroom=1.25)
    points = [point(8, 450), point(2, 200), point(5, 300), point(9, 700)]
    bears = {"rate_per_s": 8, "p99_ms": 450, "working": 7, "replicas": 8}
    assert replicas(points, objective) == bears
    for spoiled in ({"failed": 1}, {"overloaded": True}, {"error": "died"}, {"latency_ms": None}):
        middle = [point(2, 200), point(5, 300, **spoiled), point(8, 450)]
        assert replicas(middle, objective)["rate_per_s"] == 2, "8 was lucky if 5 was not"
    none = dict.fromkeys(bears)
    assert replicas([point(2, 501)], objective) == replicas([], objective) == none


# --- The report


def test_results_are_sized_anew(tmp_path: Path) -> None:
    results = json.loads(COMMITTED.read_text())
    points = [point(2, 200), point(5, 300)]
    copy = tmp_path / "results.json"
    for measured, row in zip(points, results["mixes"]["mixed"]["open"], strict=False):
        row |= measured
        row["latency_ms"] = dict.fromkeys(("mean", "p50", "p95"), 1.0) | measured["latency_ms"]
    del results["mixes"]["mixed"]["open"][2:]
    copy.write_text(json.dumps(results))
    report.main(copy, p99_ms=250, peak=11, headroom=1.0)
    assert json.loads(copy.read_text())["sizing"]["mixed"]["replicas"] == 7
    assert "<b>7 replicas</b>" in copy.with_suffix(".html").read_text()


def test_the_report_stands_alone(tmp_path: Path) -> None:
    """Drawn from the committed results: nothing is loaded, and every point has its row."""
    results = json.loads(COMMITTED.read_text())
    report.write_perf_report(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<script|<link|<iframe|\bsrc=|@import|url\((?!#)", page)
    points = [p for mix in results["mixes"].values() for p in (*mix["closed"], *mix["open"])]
    assert page.count("<tr") == len(points) + len(results["mixes"])
    assert len(page) < 1_000_000
