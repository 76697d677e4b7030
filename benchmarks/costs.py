"""What the benchmarks' workloads compute, for `triward-server plan`.

    python -m benchmarks.costs

writes triward_server/sizing/carried.json. The server's package has no `benchmarks/`, and results
files have seconds but no FLOPs. So it carries what its planner counts in each workload, the costs
of the small models that were measured, and the results that it plans with. A test compares the file
with what this makes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from torch import float32

from benchmarks.commands import run_main
from benchmarks.measure import ROOT, features
from benchmarks.perf_analyzer.inputs import MIXES, Scale, requests
from benchmarks.workloads import SMALL_IMAGE, TEXT, GroupSizes, workloads
from triward_server.config import PreprocessConfig
from triward_server.engine.checkpoint import check_tensors, empty_model
from triward_server.engine.packing import sort_batch
from triward_server.engine.planning import Cost
from triward_server.export.random_checkpoint import Size, make_checkpoint
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features
from triward_server.sizing.measured import SERVED
from triward_server.sizing.request import Counts, count

CARRIED = ROOT / "triward_server" / "sizing" / "carried.json"
RESULTS = ROOT / "benchmarks" / "results"
COMPARED = ("2026-11-22-cpu-small.json", "2026-11-22-cpu-small-qwen3.json")
PERF = "2026-11-22-perf-cpu-small.json"


class Model:
    """A random checkpoint: what it costs, and what it makes of requests.

    Args:
        architecture: `qwen2_5_vl`, or a text model's.
        size: of the checkpoint.
        folder: where it is made.
    """

    def __init__(self, architecture: str, size: Size, folder: Path) -> None:
        checkpoint = folder / f"{architecture}-{size}"
        if architecture == "qwen2_5_vl":
            make_checkpoint(size, 0, checkpoint)
        else:
            make_text_checkpoint(architecture, size, 0, checkpoint)
        blueprint = check_tensors(checkpoint).aligned()
        self._geometry = blueprint.geometry
        self._preprocessor = Preprocessor(checkpoint, PreprocessConfig())
        # Bytes are of the dtype; FLOPs, which is all that rates need, are not.
        self.cost: Cost = empty_model(blueprint, float32).cost

    def compared(self, shape: GroupSizes) -> dict[str, Counts]:
        """Count each workload of `benchmarks.compare`, as if it were one batch."""
        return {
            name: self._count([features(self._preprocessor, group) for group in workload.groups])
            for name, workload in workloads(shape).items()
        }

    def mix(self, name: str, scale: Scale) -> Counts:
        """Count the mean request of a mix; each is computed for itself."""
        batch = [
            self._preprocessor.features(r.messages, r.responses, r.media)
            for r in requests(name, scale=scale)
        ]
        counts = [asdict(self._count([item])) for item in batch]
        return Counts(**{key: sum(c[key] for c in counts) / len(counts) for key in counts[0]})

    def _count(self, batch: Sequence[Features]) -> Counts:
        return count(sort_batch(dict(enumerate(batch)), self._geometry))


def make(folder: Path, scales: Sequence[Scale] = tuple(Scale)) -> dict[str, Any]:
    """Return what the package carries.

    Args:
        folder: for checkpoints.
        scales: of the mixes; `full` takes a minute.
    """
    small, qwen3 = Model("qwen2_5_vl", "small", folder), Model("qwen3", "small", folder)
    compare = {"image": small.compared(SMALL_IMAGE), "text": qwen3.compared(TEXT)}
    perf = {scale.value: {mix: small.mix(mix, scale) for mix in MIXES} for scale in scales}
    return {
        "models": {"qwen2_5_vl-small": asdict(small.cost), "qwen3-small": asdict(qwen3.cost)},
        "work": {"compare": _plain(compare), "perf": _plain(perf)},
        "results": reduced(),
    }


def reduced() -> dict[str, Any]:
    """Return the results files that plans are made with, without what these do not read."""
    found = {name: _reduced(json.loads((RESULTS / name).read_text())) for name in COMPARED}
    perf = json.loads((RESULTS / PERF).read_text())
    mixes = {name: {"capacity_per_s": mix["capacity_per_s"]} for name, mix in perf["mixes"].items()}
    plan = {"scale": perf["plan"]["scale"]}
    found[PERF] = {**_machine(perf), "served": perf["served"], "plan": plan, "mixes": mixes}
    return found


def _reduced(results: dict[str, Any]) -> dict[str, Any]:
    rows = {
        name: {"paths": {SERVED: {"median_s": workload["paths"][SERVED]["median_s"]}}}
        for name, workload in results["workloads"].items()
    }
    known = [key for key in ("architecture", "size", "dtype") if key in results]
    kept: dict[str, Any] = {key: results[key] for key in known}
    return {**_machine(results), **kept, "workloads": rows}


def _machine(results: dict[str, Any]) -> dict[str, Any]:
    machine = results["machine"]
    return {"machine": {key: machine[key] for key in ("date", "commit", "cpu", "cores", "gpu")}}


def _plain(groups: dict[str, dict[str, Counts]]) -> dict[str, Any]:
    return {key: {name: asdict(c) for name, c in group.items()} for key, group in groups.items()}


def main() -> None:
    """Write the file that the package carries."""
    with tempfile.TemporaryDirectory() as folder:
        CARRIED.write_text(json.dumps(make(Path(folder)), indent=1) + "\n")
    typer.echo(f"written to {CARRIED}")


if __name__ == "__main__":
    run_main(main)
