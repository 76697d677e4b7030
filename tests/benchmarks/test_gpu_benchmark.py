"""The GPU's script on a CPU: every step, what it records, and what it needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer import BadParameter

import benchmarks.gpu.__main__ as gpu
from benchmarks import plot
from benchmarks.gpu import bench, kernels, rehearsal
from benchmarks.gpu.bench import Bench, judge
from benchmarks.gpu.card import Card
from benchmarks.gpu.record import Record
from benchmarks.gpu.speed import busy_time, intervals
from benchmarks.gpu.steps import TIMED, Steps
from benchmarks.measure import PredictedWork, work
from tests.conftest import ROOT
from tests.engine.test_pages import take_pages
from triward_server.engine import pages
from triward_server.engine.attention import varlen
from triward_server.engine.geometry import Geometry
from triward_server.engine.planning import Cost
from triward_server.errors import DeviceFault
from triward_server.schema import Features
from triward_server.testing.oracle import Oracle

CPU = torch.device("cpu")


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every step with a bare GPU machine's packages, which are installed for it."""
    output = tmp_path / "results.json"
    done = subprocess.run(
        [ROOT / ".ci/gpu-rehearsal", f"--checkpoint-dir={tmp_path}", f"--output={output}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "Python 3.12 is not here" in done.stderr:
        pytest.skip("Python 3.12 is not here")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert set(gpu.STEPS) <= results["seconds"].keys()
    assert [name for name in gpu.STEPS if "failed" in results[name]] == []
    wanted = dict(line.split("==") for line in rehearsal.listed(rehearsal.MACHINE) if "==" in line)
    there = results["versions"]["packages"]
    assert {name: wanted[name] for name in there if name in wanted} == {
        name: version for name, version in there.items() if name in wanted
    }
    assert results["versions"]["tritonserver"] is None
    for checked in ("kernels", "tiny", "gate"):
        assert results[checked]["passed"], results[checked]
    assert results["timings_of_a_model_that"] == "agrees with float32 as the card does"
    paths = results["eager"]["group-8"]["paths"]
    assert paths.keys() == {
        "card, one by one", "card, padded batches of 8", "features and Scorer, eager",
        "Scorer, eager", "transformers, sdpa, compiled",
    }  # fmt: skip
    assert results["compiled"]["group-64"]["paths"]["Scorer, compiled"]["conversations_per_s"] > 0
    assert 0 < results["compiled"]["graphs_after"] == results["compiled"]["graphs"] <= 12
    for name in ("group-8", "singles", "group-64"):
        device = results["compiled"][name]["device"]
        # On a CPU there are no kernels whose time could be missing.
        assert device["executed_s"] > 0 and device["executed_idle_share"] is None
    assert results["determinism"]["bitwise_equal"] and results["resizing"]["max_levels"] <= 2
    # What only a GPU or a Triton can tell is named.
    for name in ("small", "memory", "synchronisations", "served", "bounded"):
        assert results[name].keys() == {"skipped"}
    assert "aten::" in output.with_suffix(".profile.txt").read_text()


def test_it_needs_what_a_bare_machine_has() -> None:
    code = (
        "from benchmarks.gpu import rehearsal\n"
        "rehearsal.hide(); rehearsal.check_hidden()\n"
        "import benchmarks.gpu.__main__\n"
        "import triward_server.intake.codec_worker  # which decodes, in a process of its own\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_is_not_hidden_is_noticed() -> None:
    with pytest.raises(AssertionError, match="accelerate can be imported"):
        rehearsal.check_hidden()


def test_what_is_carried_is_what_is_tested() -> None:
    pinned = set((ROOT / "constraints.txt").read_text().splitlines())
    assert set(rehearsal.listed(rehearsal.CARRIED)) <= pinned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_card_without_trl_is_the_card(checkpoint: Path, dtype: torch.dtype) -> None:
    oracle, card = Oracle(checkpoint, dtype), Card(checkpoint, dtype, CPU)
    group = Bench("tiny", "cpu", "bfloat16", checkpoint).workloads["group-2"]
    rows = group.conversations()
    assert card.score_inputs(card.inputs(rows)) == oracle.score_inputs(oracle.inputs(rows))
    assert card.score(rows[0]) == oracle.score(rows[0])
    assert card.model.v_head["summary"].weight.dtype == torch.float32


def test_the_verdict() -> None:
    random = np.random.default_rng(0)
    truth = np.linspace(-4, 4, 16)
    noise = random.normal(0, 0.02, 16)
    card = truth + noise
    assert judge(truth, card, truth - noise)["passed"]
    near, far = judge(truth, card, truth + 1.19 * noise), judge(truth, card, truth + 1.21 * noise)
    assert near["passed"] and not far["passed"] and far["ratio"] == pytest.approx(1.21)
    swapped = truth.copy()
    swapped[[0, 15]] = swapped[[15, 0]]
    assert judge(truth, truth + 5 * noise.max(), swapped)["swapped_pairs"] > 0
    lost = truth.copy()
    lost[3] = np.nan
    assert not judge(truth, card, lost)["passed"]
    # In float32 the card is its own truth, and only rounding is allowed.
    assert judge(truth, truth, truth + 1e-5)["passed"]
    assert not judge(truth, truth, truth + 1e-3)["passed"]


def test_kernels_pass_and_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.check_kernels(CPU, torch.float32)["passed"]

    def top_left(query: Any, key: Any, value: Any, layout: Any) -> Any:
        """Causal from the wrong corner: queries see no shared keys but the first ones."""
        return varlen(query, key, value, replace(layout, key_rows=layout.key_rows.flip(0)))

    monkeypatch.setattr(kernels, "varlen", top_left)
    found = kernels.check_kernels(CPU, torch.float32)
    assert not found["passed"] and found["decoder, shared prefix"]["relative_rms"] > 0.1


def test_pages_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel takes them; the check notices one that is not the sequence's."""
    assert kernels.time_pages(CPU, torch.float32, 2) == {
        "skipped": "the varlen kernel takes no pages here"
    }
    take_pages(monkeypatch)
    shared = replace(kernels.CASES["decoder, shared prefix"], heads=4, kv_heads=2)
    monkeypatch.setattr(kernels, "CASES", {"shared": shared, "apart": replace(shared, shared=0)})
    monkeypatch.setattr(kernels, "takes_pages", lambda device: True)
    found = kernels.check_kernels(CPU, torch.float32)
    assert found["passed"] and "relative_rms_by_pages" in found["shared"]
    assert "relative_rms_by_pages" not in found["apart"], "nothing is there twice"
    times = kernels.time_pages(CPU, torch.float32, 1, prompt=520, responses=2)
    assert times["all tokens"]["rows_gathered"] == 520 + 2 * 720
    assert times["all tokens"]["rows_of_pages"] == 256 * 5
    assert times["last tokens"]["paths"].keys() == {"gathered", "pages"}
    find_pages = pages.find_pages

    def stale(*args: Any) -> Any:
        rows, table = find_pages(*args)
        rows[-1] = rows[0]
        return rows, table

    monkeypatch.setattr(pages, "find_pages", stale)
    found = kernels.check_kernels(CPU, torch.float32)
    assert not found["passed"] and found["shared"]["relative_rms_by_pages"] > 0.01
    assert found["shared"]["relative_rms"] < kernels.BOUNDS[torch.float32]


def test_how_long_a_device_is_busy() -> None:
    assert busy_time([]) == 0.0
    assert busy_time([(5, 7), (0, 2), (1, 3), (6, 6.5), (10, 12)]) == 7.0
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(device_type=kind, is_user_annotation=named, time_range=span)
        for kind, named, span in (
            (cuda, False, SimpleNamespace(start=1, end=3)),
            (cpu, False, SimpleNamespace(start=0, end=9)),
            # A compiled graph's name spans the gaps between its kernels.
            (cuda, True, SimpleNamespace(start=0, end=9)),
        )
    ]
    assert intervals(events) == [(1, 3)]


@pytest.mark.slow
def test_how_long_a_busy_server_has_no_pass_on_its_device(tmp_path: Path) -> None:
    """The step that no rehearsal runs: it needs a Triton."""
    tiny = Bench("tiny", "cpu", "float32", tmp_path, compile_=False)
    found = Steps(tiny, lambda size: tiny, 1, None).served()
    for rows in (found, found["overlapping"]):
        for name in TIMED:
            assert 0 < rows[name]["no_pass_share"] < 1 and rows[name]["median_s"] > 0


def test_a_checkpoint_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(size: str, seed: int, output: Path, device: str) -> None:
        output.mkdir()
        made.append(output)

    monkeypatch.setattr(bench, "make_checkpoint", make)
    half = tmp_path / "tiny-cpu.new"
    half.mkdir()  # of a run that was stopped
    (half / "half").touch()
    first, again = (Bench("tiny", "cpu", "bfloat16", tmp_path).checkpoint for _ in range(2))
    assert first == again == tmp_path / "tiny-cpu"
    assert made == [half] and list(first.iterdir()) == []


def steps(**methods: Callable[[], Any]) -> Any:
    return SimpleNamespace(**methods)


def test_a_failure_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "results.json"

    def fail() -> None:
        raise RuntimeError("no kernel")

    def on_disk() -> list[str]:
        return sorted(json.loads(output.read_text()))

    some = steps(versions=lambda: {"torch": "2"}, kernels=fail, tiny=on_disk)
    gpu.run_all(some, ["versions", "kernels", "tiny"], Record(output, {"size": "7b"}), 60)
    results = json.loads(output.read_text())
    assert results["versions"] == {"torch": "2"}
    assert results["kernels"]["failed"] == "RuntimeError: no kernel"
    assert "in fail" in "".join(results["kernels"]["traceback"])
    assert {"versions", "kernels"} <= set(results["tiny"]), "what ended was not on disk"
    # A second call goes on with the same file, and its timings say what the gate had said.
    Record(output, {}).keep("gate", {"passed": False})
    gpu.run_all(steps(eager=lambda: {}), ["eager"], Record(output, {"size": "7b"}), 60)
    results = json.loads(output.read_text())
    assert results["versions"] == {"torch": "2"}
    assert results["timings_of_a_model_that"] == "FAILED the gate"


def test_no_step_begins_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow() -> None:
        clock[0] += 400

    record = Record(None, {})
    gpu.run_all(steps(a=slow, b=slow, c=slow, d=slow), ["a", "b", "c", "d"], record, 540)
    assert record.results["not_reached"] == ["c", "d"]
    assert time.monotonic() != clock[0]


def test_after_a_fault_a_new_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(BaseException):
        pass

    def execute(path: str, arguments: list[str]) -> None:
        raise Replaced(arguments)

    def fault() -> None:
        raise DeviceFault(torch.AcceleratorError("CUDA error: unspecified launch failure"))

    monkeypatch.setattr(gpu.os, "execv", execute)
    monkeypatch.setattr(sys, "argv", ["gpu", "--size=7b", "--steps=kernels,tiny,small"])
    output = tmp_path / "results.json"
    ran: list[str] = []
    some = steps(kernels=fault, tiny=lambda: ran.append("tiny"), small=lambda: ran.append("small"))
    with pytest.raises(Replaced) as caught:
        gpu.run_all(some, ["kernels", "tiny", "small"], Record(output, {}), 60)
    [arguments] = caught.value.args
    assert arguments[1:5] == ["-m", "benchmarks.gpu", "--size=7b", "--steps=kernels,tiny,small"]
    assert arguments[5] == "--steps=tiny,small"
    assert re.fullmatch(r"--minutes=\d\.\d\d", arguments[6])
    assert ran == [] and "unspecified launch" in json.loads(output.read_text())["kernels"]["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    gpu.main(output=output)
    results = json.loads(output.read_text())
    assert "no GPU" in results["empty"] and not set(gpu.STEPS) & results.keys()


def test_unknown_steps_are_refused() -> None:
    with pytest.raises(BadParameter, match="no step 'kernel'; there are versions, kernels"):
        gpu.main(steps="versions,kernel")


def test_work_counts_what_is_shared() -> None:
    geometry = Geometry(image_token_id=9, patch_size=14, merge_size=2, vocab_size=99, max_tokens=99)
    cost = Cost(
        per_token=10, per_score=3, per_pair=0, per_patch=0, token_bytes=1, key_bytes=0,
        patch_bytes=0,
    )  # fmt: skip
    prompt = np.arange(1, 9, dtype=np.int32)
    answers = tuple(np.array([20 + n, 30], np.int32) for n in range(4))
    assert work([Features(prompt, answers)], geometry, cost) == PredictedWork(172, 412, 16)


def test_the_plot_shows_every_workload(tmp_path: Path) -> None:
    paths = {path: {"speedup": 2.0} for path in plot.COLORS}
    results = {
        "machine": {"cpu": "some CPU", "cores": 2, "gpu": None}, "size": "tiny",
        "dtype": "float32", "repeats": 5,
        "workloads": {
            "group-8": {"paths": paths, "ideal_speedup": 4.2},
            "epoch": {"paths": {"served, over gRPC": {"speedup": 1.5}}},
        },
    }  # fmt: skip
    plot.draw_speedups(results, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    for words in ("group-8", "epoch", "some CPU", *plot.COLORS):
        assert f"<!-- {words}" in drawn or words in drawn, words
