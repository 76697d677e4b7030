"""The benchmarks' sections and subsets, as their own sources name them."""

from __future__ import annotations

# Section -> subset -> published count, which is its weight.
REWARDBENCH = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    # Before commit 6552e93 allenai/reward-bench's constants.py had XSTest's two counts the other
    # way round (250 and 154). These are the rows of the data: the published 0.284 for
    # `should-respond` is 71 of 250, and no n of 154.
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    # 447 pairs of mathematics weigh as much as the 984 of code.
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}

VL_REWARDBENCH = {
    "General": ("vlfeedback", "wildvision"),
    "Hallucination": ("povid", "rlaif-v", "rlhf-v"),
    "Reasoning": ("mathverse", "mmmu"),
}

# Each is a section of its own. The published file has 475, 160, 183, 450, 495 and 102 rows of them
# (Malik et al. 2025, arXiv:2506.01937, table 2).
REWARDBENCH_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")

# `Category` and, in two of them, what the ID tells: see `multimodal_part`.
MULTIMODAL_REWARDBENCH = {
    "Correctness": ("open_generation/correctness_task",),
    "Preference": ("open_generation/preference_task",),
    "Knowledge": ("knowledge",),
    "Reasoning": ("reasoning/math", "reasoning/coding"),
    "Safety": ("safety/bias", "safety/toxicity"),
    "VQA": ("vqa",),
}

# The values of `Category`.
MULTIMODAL_CATEGORIES = (
    "open_generation/correctness_task",
    "open_generation/preference_task",
    "knowledge",
    "reasoning",
    "safety",
    "vqa",
)


def multimodal_part(subset: str, pair_id: str) -> str:
    """Tell safety's and reasoning's two parts apart, as scripts/2_get_accuracy.py does."""
    name = pair_id.lower()
    if subset == "safety":
        return "safety/bias" if name.startswith("pairs") else "safety/toxicity"
    if subset == "reasoning":
        return "reasoning/math" if name.startswith("math") else "reasoning/coding"
    return subset
