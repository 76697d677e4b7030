"""TRL's own GRPOTrainer: with a buffer, samples with a gradient do not run out."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_share_of_samples_with_a_gradient(checkpoint: Path, tmp_path: Path) -> None:
    from benchmarks.advantages import shares, trained

    plain = shares(trained("GRPO", 56, checkpoint, tmp_path))
    chosen = shares(trained("buffer", 56, checkpoint, tmp_path))
    assert plain["with a gradient"][0] > 0.9
    assert plain["with a gradient"][-1] < 0.6
    assert chosen["with a gradient"][-1] > plain["with a gradient"][-1] + 0.3
    assert plain["from the buffer"] == [0.0] * 4
    assert chosen["from the buffer"][-1] > 0.2
    assert chosen["reward"][-1] > chosen["reward"][0]
