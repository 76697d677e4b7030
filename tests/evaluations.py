"""Made-up evaluations: pairs with pictures and texts, and scores from a known distribution."""

from __future__ import annotations

import io
import random
from pathlib import Path

from PIL import Image, ImageDraw

from triward_tools.evaluation.arithmetic import BENCHMARKS
from triward_tools.evaluation.report import Report, write_report
from triward_tools.evaluation.results import (
    GroupResult,
    Labelled,
    LabelledGroup,
    LabelledPair,
    Problem,
    Result,
)

QUESTIONS = [
    "How many of the bars are taller than the one on the left?",
    "Describe the picture in one sentence, and name its dominant colour.",
    "Is the second value higher than the third?\nAnswer with the option's letter.\n(A) no\n(B) yes",
]
ANSWERS = [
    "Two of the four bars are taller than the first one; the last is the tallest.",
    "The answer is (B). The second bar ends above the third, which can be read off the axis.",
    "A chart with four bars of one colour on a light ground, without any labels.",
]


def bars(seed: int, size: tuple[int, int] = (640, 400)) -> bytes:
    """A PNG of four bars."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, "#f4f1ea")
    draw = ImageDraw.Draw(image)
    colour = rng.choice(["#35618f", "#8f4a35", "#3b7a57", "#6a4c93"])
    step = size[0] // 5
    for bar in range(4):
        top = rng.uniform(0.15, 0.8) * size[1]
        left = step // 2 + bar * step
        draw.rectangle((left, top, left + step * 0.7, size[1] * 0.92), fill=colour)
    packed = io.BytesIO()
    image.save(packed, "PNG")
    return packed.getvalue()


def pair(index: int, subset: str, **changes: object) -> LabelledPair:
    """A pair with a picture."""
    question = QUESTIONS[index % len(QUESTIONS)]
    values = {
        "index": index,
        "id": f"{subset.replace('/', '-')}-{index:04d}",
        "subset": subset,
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": bars(index)},
                    {"type": "text", "text": question},
                ],
            }
        ],
        "chosen": ANSWERS[index % len(ANSWERS)],
        "rejected": ANSWERS[(index + 1) % len(ANSWERS)],
    }
    return LabelledPair(**{**values, **changes})


def group(result: GroupResult, **changes: object) -> LabelledGroup:
    """A prompt without a picture, with as many responses as the result has scores."""
    prompt = [{"role": "user", "content": QUESTIONS[result.index % len(QUESTIONS)]}]
    texts = tuple(f"{ANSWERS[i % len(ANSWERS)]} ({i})" for i in range(len(result.scores)))
    correct = len(result.chosen_scores)
    values = {"prompt": prompt, "chosen": texts[:correct], "rejected": texts[correct:]}
    return LabelledGroup(
        **{"index": result.index, "id": result.id, "subset": result.subset, **values, **changes}
    )


def groups_of(prompts: int, seed: int = 0) -> list[GroupResult]:
    """RewardBench 2's results, with scores of a coarse grid: so that some are equal."""
    rng = random.Random(seed)
    names = list(BENCHMARKS["rewardbench-2"].sections)
    results = []
    for number in range(prompts):
        subset = names[number % len(names)]
        kinds = ("ref", "tied") if subset == "Ties" else ("",)
        for kind in kinds:
            correct = 1 if kind != "tied" else rng.randint(2, 6)
            scores = [rng.randint(0, 6) / 2 for _ in range(correct + rng.randint(3, 8))]
            name = f"{kind}:{number}" if kind else str(number)
            better = [score + 1.5 for score in scores[:correct]]
            worse = scores[correct:]
            results.append(GroupResult.of(len(results), name, subset, better, worse))
    return results


def results_of(benchmark: str, pairs: int, seed: int = 0) -> list[Result]:
    """Scores whose margins are normal around 1.2 with a deviation of 1.8; every 50th is a tie."""
    rng = random.Random(seed)
    parts = [s for group in BENCHMARKS[benchmark].sections.values() for s in group]
    if benchmark == "multimodal-rewardbench":
        parts = sorted(BENCHMARKS[benchmark].subsets)
    results = []
    for index in range(pairs):
        subset = parts[index % len(parts)]
        rejected = rng.gauss(0, 4)
        margin = 0.0 if index % 50 == 49 else rng.gauss(1.2, 1.8)
        results.append(
            Result(
                index,
                f"{subset.replace('/', '-')}-{index:04d}",
                subset,
                rejected + margin,
                rejected,
            )
        )
    return results


def write(
    folder: Path,
    benchmark: str,
    results: list[Result],
    problems: list[Problem] = (),
    model: str = "made-up-judge-7b",
    **changes: object,
) -> Report:
    """A report of these results, whose rows are made when they are asked for."""
    made = {r.index: r for r in results}

    def pair_of(indices: list[int]) -> dict[int, Labelled]:
        asked = (made[i] for i in indices)
        return {
            r.index: group(r, **changes)
            if isinstance(r, GroupResult)
            else pair(r.index, r.subset, **changes)
            for r in asked
        }

    return write_report(folder, benchmark, results, list(problems), pair_of, model=model)
