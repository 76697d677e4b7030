"""The best of N, a filter and pairs on Ray Datasets."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.commands import Command, kill_all
from tests.fakeserver import Fault
from triward import RewardClient
from triward_tools.selection import (
    Columns,
    Pairing,
    RobustOutliers,
    best_of_n_file,
    filter_file,
    pairs_file,
)

DRIVER = """
import sys

import ray

from triward import RewardClient
from triward_tools import ray as triward_ray
from triward.integrations.rows import RowScorer
from triward_tools.selection import Columns, Pairing, RobustOutliers

url, temporary, source, output = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=temporary)
scorer = RowScorer(
    RewardClient(url), prompt="prompt", responses="responses", images="images", score="scores"
)
scored = ray.data.read_parquet(source, override_num_blocks=3).map_batches(
    triward_ray.RayScorer,
    fn_constructor_args=[scorer],
    compute=ray.data.ActorPoolStrategy(size=1),
    batch_format="pyarrow",
    batch_size=16,
)
columns = Columns(prompt="prompt", responses="responses", images="images", scores="scores")
kept = triward_ray.filter_scored(scored, RobustOutliers(1.0), columns)
kept.write_parquet(output + "/filter")
held = ray.data.read_parquet(output + "/filter")
triward_ray.best_of_n(held, columns).write_parquet(output + "/best-of-n")
triward_ray.pairs(held, Pairing("all", length_penalty="auto"), columns).write_parquet(
    output + "/pairs"
)
print("done", flush=True)
"""


@pytest.fixture
def server(server):
    server.fault = lambda call: Fault.INVALID_ARGUMENT if b"bad" in call.responses else None
    return server


@pytest.fixture
def ray(server):
    """Runs DRIVER with a small Ray of its own; nothing of it is left."""
    # Short, since Ray puts the paths of sockets below it.
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))
    family = []

    def run(source, output):
        environment = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        arguments = (sys.executable, "-c", DRIVER, server.url, temporary, source, output)
        running = Command(*arguments, **environment)
        try:
            running.wait_for("Started a local Ray instance")
            family.extend(running.family())
            running.wait_for("^done$")
            family.extend(running.family())
            assert running.wait() == 0
        finally:
            running.kill()

    yield run
    kill_all(family)
    psutil.wait_procs(family, timeout=60)
    shutil.rmtree(temporary)


def rows():
    found = [
        {
            "id": n,
            "prompt": f"q{n}",
            # A score counts bytes, a length characters.
            "responses": [
                f"{n:03}" + "xé"[n * place % 3 == 1] * (7 * n * place % 50) for place in range(4)
            ],
            "images": [b"image"] * (n % 2),
        }
        for n in range(60)
    ]
    found[8]["responses"] = ["x" * 5000, "y" * 5000]  # goes
    found[9]["responses"] = ["fine", "bad"]
    return found


def read(folder):
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    found = pa.concat_tables(tables, promote_options="permissive").to_pylist()
    for row in found:
        row.pop("scores_error", None)
    return sorted(found, key=lambda row: (row["id"], -row.get("margin", 0.0)))


def test_the_same_as_with_files(server, ray, tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows()), source, row_group_size=20)
    ray(source, tmp_path / "ray")
    good = [row for row in rows() if "bad" not in row["responses"]]
    once = Counter(text for row in good for text in row["responses"])
    assert server.scored == {**once, "fine": 1}

    columns = Columns(prompt="prompt", responses="responses", images="images")
    held = Columns(**{**vars(columns), "scores": "scores"})
    kept = tmp_path / "kept.parquet"
    with RewardClient(server.url) as client:
        done = filter_file(source, kept, RobustOutliers(1.0), client, columns=columns)
    assert (done.failed, done.figures["rows without a response left"]) == (1, 1)
    assert read(tmp_path / "ray" / "filter") == pq.read_table(kept).to_pylist()
    best_of_n_file(kept, tmp_path / "best.parquet", columns=held)
    best = pq.read_table(tmp_path / "best.parquet").to_pylist()
    assert read(tmp_path / "ray" / "best-of-n") == best
    pairing = Pairing("all", length_penalty="auto")
    pairs_file(kept, tmp_path / "pairs.parquet", pairing, columns=held)
    pairs = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert json.dumps(read(tmp_path / "ray" / "pairs"), default=repr) == json.dumps(
        sorted(pairs, key=lambda row: (row["id"], -row["margin"])), default=repr
    )
    assert len(pairs) > 60
