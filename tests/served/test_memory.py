"""A forward pass stays within its budget of bytes, as the operating system counts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from triward_server.export.random_checkpoint import make_checkpoint

BUDGET = 200 * 2**20

# A process of its own: what other tests left in the heap must not count.
MEASURE = """
import json, re, sys
from pathlib import Path
import numpy as np
from triward_server.engine import attention, layers
from triward_server.config import ForwardConfig
from triward_server.schema import Features
from triward_server.engine.scoring import Scorer

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

checkpoint, budget = Path(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "cuda":  # the whole row at once, which takes the most, by torch's own products
    attention._CPU_BLOCK, layers._ONEDNN = 10**9, False
config = ForwardConfig(dtype="float32", device="cpu", max_batch_bytes=budget,
                       embedding_cache_bytes=0, prefix_cache_bytes=0, threads=2)
scorer = Scorer(checkpoint, config)
scorer.warm_up()
rng = np.random.default_rng(0)
draw = lambda n: rng.integers(0, 2000, n).astype(np.int32)
image = lambda: rng.integers(0, 256, (504, 672, 3), dtype=np.uint8)
pads = np.full(18 * 24, scorer.geometry.image_token_id, np.int32)
batch = [Features(np.concatenate([draw(300), pads]), (draw(200), draw(200)), (image(),))
         for _ in range(8)]
batch.append(Features(draw(2000), tuple(draw(100) for _ in range(24))))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
results = scorer.score(batch)
assert all(np.isfinite(result.scores).all() for result in results)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    make_checkpoint("small", 0, folder)
    return folder


def peak(checkpoint: Path, budget: int, like: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(checkpoint), str(budget), like]
    output = subprocess.check_output(command, text=True, cwd=ROOT, timeout=300)
    return int(json.loads(output))


@pytest.mark.slow
@pytest.mark.parametrize("like", ["cpu", "cuda"])
def test_peak_stays_within_the_budget(small: Path, like: str) -> None:
    assert peak(small, BUDGET, like) <= BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("like", ["cpu", "cuda"])
def test_control_without_a_budget_the_peak_is_higher(small: Path, like: str) -> None:
    assert peak(small, 2**40, like) > BUDGET
