"""Predicted FLOPs of requests that begin like earlier ones are those of the tokens that are new."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prefixes import flops


@pytest.fixture(scope="module")
def predicted(checkpoint: Path) -> dict[str, tuple[float, float]]:
    """FLOPs of one round's rows, with the prefix cache and without."""
    return flops(checkpoint, 1)


def test_a_first_wave_costs_the_same_with_a_cache(
    predicted: dict[str, tuple[float, float]],
) -> None:
    with_cache, without = predicted["first wave of 8, an image"]
    assert with_cache == without > 0


def test_a_second_wave_costs_its_responses_alone(predicted: dict[str, tuple[float, float]]) -> None:
    first, _ = predicted["first wave of 8, an image"]
    with_cache, without = predicted["second wave of 8, the same image"]
    assert without == pytest.approx(first, rel=0.1), "other responses, as long on average"
    short, _ = predicted["second wave of 8 short ones, the same image"]
    assert short < with_cache < 0.7 * without


def test_each_turn_of_a_dialogue_costs_what_it_adds(
    predicted: dict[str, tuple[float, float]],
) -> None:
    with_cache, without = predicted["a dialogue of 10 turns, scored after each"]
    assert 3 < without / with_cache < 10


def test_what_nobody_has_asked_before_costs_nearly_the_same(
    predicted: dict[str, tuple[float, float]],
) -> None:
    with_cache, without = predicted["16 requests that begin like none before"]
    assert 0.9 * without < with_cache <= without, "the template's first tokens are everyone's"
