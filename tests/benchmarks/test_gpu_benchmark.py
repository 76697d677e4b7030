"""The GPU's script, step by step on a CPU: what it would write there is what it writes here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer import BadParameter, Exit

from benchmarks import gpu, plot
from benchmarks.measure import PredictedWork, work
from benchmarks.workloads import PromptGroup, Workload, epochs
from triward_server.engine.geometry import Geometry
from triward_server.engine.planning import Cost
from triward_server.schema import Features


def short(*_: object) -> dict[str, Workload]:
    """The workloads' names with a few words each."""
    prompt = [{"role": "user", "content": [{"type": "text", "text": "which"}]}]
    groups = {
        n: PromptGroup(prompt, tuple(f"{'so ' * (i % 7)}{i}" for i in range(n)))
        for n in (2, 8, 16, 64)
    }
    unseen, _ = epochs(0)
    few = {f"group-{n}": Workload((group,)) for n, group in groups.items()}
    return {"singles": Workload(unseen.groups[:1]), **few}


@pytest.mark.slow
def test_every_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "workloads", short)
    output = tmp_path / "results.json"
    gpu.main(size="tiny", device="cpu", repeats=1, step=None, workload=None, output=output)
    results = json.loads(output.read_text())
    assert set(gpu.STEPS) <= results["seconds"].keys()
    parity = results["parity"]
    assert parity["responses"] == 64
    assert parity["max_distance"] < 1e-4 and parity["swapped_pairs"] == 0
    assert parity["clear_pairs"] > 1000
    assert results["timing"].keys() == short().keys()
    for row in results["timing"].values():
        assert row["ideal_speedup"] >= 1 and row["share_of_matmul_ceiling"] > 0
        assert row["paths"].keys() == {
            "card, one by one", "card, padded batches of 8", "features and Scorer", "Scorer",
            "Scorer, deterministic",
        }  # fmt: skip
    assert results["determinism"]["bitwise_equal"]
    assert results["resizing"]["max_levels"] <= 2
    assert results["warm_up"]["first_s"] > 0
    for row in results["served"].values():
        assert row["served"]["conversations_per_s"] > 0
    assert results["served"].keys() == short().keys()
    # What only a GPU can tell is empty here.
    assert results["memory"] is None and results["synchronisations"] is None
    assert results["machine"]["gpu"] is None


def test_parity_would_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: scores of another order are neither within noise nor in order."""
    monkeypatch.setattr(gpu, "workloads", short)
    bench = gpu.Bench("tiny", "cpu", 1, None, tmp_path)
    scores = gpu.scores
    monkeypatch.setattr(gpu, "scores", lambda *arguments: scores(*arguments)[::-1])
    parity = bench.parity()
    assert not parity["within_noise"] and parity["swapped_pairs"] > 0
    output = tmp_path / "results.json"
    with pytest.raises(Exit):
        gpu.main(size="tiny", device="cpu", repeats=1, step=None, workload=None, output=output)
    results = json.loads(output.read_text())
    assert results["parity"] == parity and results["timing"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rows_are_empty(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    gpu.main(size="7b", device="cuda", repeats=5, step=None, workload=None, output=output)
    results = json.loads(output.read_text())
    assert "no GPU" in results["empty"]
    assert {results[step] for step in gpu.STEPS} == {None}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BadParameter, match="no step 'paritty'; there are ceilings"):
        gpu.main(step=["paritty"])
    with pytest.raises(BadParameter, match="no workload 'group-9'"):
        gpu.main(workload=["group-9"])


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
