"""Shaping of scores before a policy learns from them, and choice of what it learns from.

docs/rewards.md says who does what.
"""

from __future__ import annotations

from triward.moments import RunningMoments
from triward.rewards.buffer import Drawn, SelectiveSampleBuffer
from triward.rewards.dynamic import Filled, SampleGroup, fill_batch, group_spreads, varied
from triward.rewards.shaping import (
    Shape,
    clip_rewards,
    group_advantages,
    leave_one_out,
    mix,
    shape_of,
    with_rules,
)

__all__ = [
    "Drawn",
    "Filled",
    "RunningMoments",
    "SampleGroup",
    "SelectiveSampleBuffer",
    "Shape",
    "clip_rewards",
    "fill_batch",
    "group_advantages",
    "group_spreads",
    "leave_one_out",
    "mix",
    "shape_of",
    "varied",
    "with_rules",
]
