"""Speeds from results files: what the package carries, and how well one row predicts another."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import costs
from benchmarks.perf_analyzer.inputs import Scale
from tests.conftest import ROOT
from triward_server.errors import ConfigError
from triward_server.sizing.gpus import GPUS
from triward_server.sizing.measured import carried, carried_rates, read_rates
from triward_server.sizing.models import Subject
from triward_server.sizing.speed import from_rates

RESULTS = ROOT / "benchmarks" / "results"
COMPARED, QWEN3 = costs.COMPARED


def others(rows: dict[str, float], name: str) -> float:
    return statistics.median(rate for other, rate in rows.items() if other != name)


def blank(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw as `photo` does, but no picture: work depends on its size alone."""
    rng.uniform(size=6)
    rng.normal(size=(height, width, 3))
    return Image.new("RGB", (width, height))


class TestCarried:
    """The installed server has no `benchmarks/`: it carries what it needs, and no more."""

    def test_results_are_those_of_the_files(self) -> None:
        assert carried()["results"] == costs.reduced()

    def test_work_is_what_the_planner_counts(self, tmp_path: Path) -> None:
        """`python -m benchmarks.costs` makes it anew after a change of planner or workloads."""
        made, brought = costs.make(tmp_path, [Scale.SHORT]), carried()
        assert made["models"] == brought["models"]
        assert made["work"]["compare"] == brought["work"]["compare"]
        assert made["work"]["perf"]["short"] == brought["work"]["perf"]["short"]

    @pytest.mark.slow
    def test_the_mixes_at_full_scale(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("benchmarks.perf_analyzer.inputs.photo", blank)
        made = costs.make(tmp_path, [Scale.FULL])
        assert made["work"]["perf"]["full"] == carried()["work"]["perf"]["full"]


class TestPredictions:
    """Seconds of each row by the rate of the other rows of its file, over those measured."""

    @pytest.mark.parametrize(
        ("file", "least", "most"),
        [(COMPARED, 0.9, 1.1), (QWEN3, 0.8, 1.25), (costs.PERF, 0.9, 1.15)],
    )
    def test_a_row_by_the_others(self, file: str, least: float, most: float) -> None:
        rows = dict(carried_rates(file).rows)
        # Eight requests at once do not share all that they could (docs/benchmarks.md).
        late = rows.pop("separate-8", None)
        found = {name: rate / others(rows, name) for name, rate in rows.items()}
        assert {n: r for n, r in found.items() if not least < r < most} == {}
        if late is not None:
            assert 0.6 < late / statistics.median(rows.values()) < 0.8

    def test_seconds_are_predicted_better_than_by_counting_conversations(self) -> None:
        """What a plan without the planner would do: the same time for every conversation."""
        workloads = json.loads((RESULTS / COMPARED).read_text())["workloads"]
        rows = carried_rates(COMPARED).rows
        each = {
            name: workload["paths"]["served, over gRPC"]["median_s"] / workload["conversations"]
            for name, workload in workloads.items()
            if name in rows
        }
        assert max(each.values()) / min(each.values()) > 3
        assert max(rows.values()) / min(rows.values()) < 1.6


class TestFiles:
    def test_a_results_file_gives_what_is_carried_of_it(self, small: Subject) -> None:
        for file in (COMPARED, QWEN3, costs.PERF):
            assert read_rates(RESULTS / file, small.cost).rows == carried_rates(file).rows

    def test_an_empty_gpu_file_says_so(self, small: Subject) -> None:
        with pytest.raises(ConfigError, match="no GPU was at hand; nothing was measured"):
            read_rates(RESULTS / "2026-11-22-gpu.json", small.cost)

    @pytest.mark.parametrize("file", ["2026-11-22-soak-5.json", "2026-11-27-doors.json"])
    def test_another_benchmarks_file_is_refused(self, file: str, small: Subject) -> None:
        with pytest.raises(ConfigError, match=f"--measured {file}: "):
            read_rates(RESULTS / file, small.cost)

    def test_a_file_that_is_none_is_refused(self, tmp_path: Path, small: Subject) -> None:
        (tmp_path / "list.json").write_text("[1]")
        (tmp_path / "text.json").write_text("no")
        for name in ("list.json", "text.json", "gone.json"):
            with pytest.raises(ConfigError, match=rf"--measured .*{name}: "):
                read_rates(tmp_path / name, small.cost)


def gpu_file(folder: Path, **more: Any) -> Path:
    """Results as `benchmarks.gpu` writes them."""
    row = {"conversations": 8, "paths": {}}
    results = {
        "size": "7b", "dtype": "bfloat16", "device": "cuda", "seconds": {},
        "versions": {
            "machine": {"gpu": "NVIDIA H200", "cpu": "x", "cores": 16}, "memory": [140, 150 * 10**9]
        },
        "eager": {"group-8": row | {"scorer_tflops": 300.0}},
        "compiled": {
            "graphs": 12,
            "group-8": row | {"scorer_tflops": 480.0},
            "singles": row | {"scorer_tflops": 390.0},
            "group-64": row | {"scorer_tflops": 520.0},
        },
        "timings_of_a_model_that": "agrees with float32 as the card does",
        **more,
    }  # fmt: skip
    path = folder / "gpu.json"
    path.write_text(json.dumps(results))
    return path


class TestGpu:
    """A measured GPU takes the place of every assumption about it."""

    def test_the_compiled_model_counts(self, tmp_path: Path, large: Subject) -> None:
        rates = read_rates(gpu_file(tmp_path), large.cost)
        assert (rates.gpu, rates.typical, rates.bounds) == ("NVIDIA H200", 480e12, (390e12, 520e12))
        speed = from_rates(rates, "bfloat16", None)
        assert (speed.kind, speed.memory, speed.measured) == ("gpu", 150 * 10**9, True)
        assert not any("ASSUMPTION" in note for note in speed.notes)
        assert any("agrees with float32" in note for note in speed.notes)

    def test_without_it_the_eager_one(self, tmp_path: Path, large: Subject) -> None:
        path = gpu_file(tmp_path, compiled={"failed": "RuntimeError: no compiler"})
        assert read_rates(path, large.cost).typical == 300e12

    def test_a_step_that_failed_is_no_measurement(self, tmp_path: Path, large: Subject) -> None:
        path = gpu_file(tmp_path, compiled={"failed": "x"}, eager={"failed": "y"})
        with pytest.raises(ConfigError, match="neither step compiled nor eager was measured"):
            read_rates(path, large.cost)

    def test_another_device_or_dtype_is_refused(self, tmp_path: Path, large: Subject) -> None:
        rates = read_rates(gpu_file(tmp_path), large.cost)
        with pytest.raises(ConfigError, match=r"--gpus A100: .* on NVIDIA H200"):
            from_rates(rates, "bfloat16", GPUS["A100"])
        with pytest.raises(ConfigError, match=r"--dtype float8: .* in bfloat16"):
            from_rates(rates, "float8", None)

    def test_a_server_at_a_url_has_the_model_that_is_planned(
        self, tmp_path: Path, large: Subject
    ) -> None:
        machine = {"gpu": None, "cpu": "the client's", "cores": 16}
        results = {
            "machine": machine, "plan": {"scale": "full"},
            "mixes": {"group8": {"capacity_per_s": 8.0}, "text": {"capacity_per_s": None}},
        }  # fmt: skip
        path = tmp_path / "perf.json"
        path.write_text(json.dumps(results))
        rates = read_rates(path, large.cost)
        assert 30e12 < rates.typical / 8 < 100e12, "8 responses of 250 tokens and an image"
        speed = from_rates(rates, "bfloat16", GPUS["H100"])
        assert (speed.kind, speed.memory) == ("gpu", GPUS["H100"].memory)
        with pytest.raises(ConfigError, match="the server's device needs --gpus NAME"):
            from_rates(rates, "bfloat16", None)
