"""Results that others published for their models, in percent, as in their tables.

Rounded sections must give their mean within 0.1. Where they do not, the row is shown as published
and marked (`doubtful`). The Scores of RewardBench and RewardBench 2 and VL-RewardBench's Macros all
follow. Of VL-RewardBench's Overall values, 11 of 16 do not follow from the row's own sections and
the benchmark's 183, 749 and 318 pairs: InternVL3-8B by 5.9 points, InternVL3-78B by 5.5, the others
by at most 0.8. The row of Skywork-VL Reward does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Three or four values that are rounded to 0.1 give a mean within 0.05, and it is rounded itself or
# cut off.
_ROUNDING = 0.1001

VL_PAIRS = {"General": 183, "Hallucination": 749, "Reasoning": 318}


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        model: its name there.
        source: the table.
        values: column -> percent.
        doubtful: columns that do not follow from the row's sections.
    """

    model: str
    source: str
    values: Mapping[str, float]
    doubtful: tuple[str, ...]


_VL_COLUMNS = ("General", "Hallucination", "Reasoning", "Overall", "Macro")
_VL_SOURCE = "model card of Skywork-VL-Reward-7B"
_VL_ROWS = """
Claude-3.5-Sonnet (2024-06-22)   | 43.4 55.0 62.3 55.3 53.6
Gemini-1.5-Flash (2024-09-24)    | 47.8 59.6 58.4 57.6 55.3
GPT-4o (2024-08-06)              | 49.1 67.6 70.5 65.8 62.4
Gemini-1.5-Pro (2024-09-24)      | 50.8 72.5 64.2 67.2 62.5
Gemini-2.0-flash-exp (2024-12)   | 50.8 72.6 70.1 68.8 64.5
Qwen2-VL-7B-Instruct             | 31.6 19.1 51.1 28.3 33.9
MAmmoTH-VL-8B                    | 36.0 40.0 52.0 42.2 42.7
Qwen2.5-VL-7B-Instruct           | 43.4 42.0 63.0 48.0 49.5
InternVL3-8B                     | 60.6 44.0 62.3 57.0 55.6
IXC-2.5-Reward-7B                | 80.3 65.3 60.4 66.3 68.6
Qwen2-VL-72B-Instruct            | 38.1 32.8 58.0 39.5 43.0
Molmo-72B-0924                   | 33.9 42.3 54.9 44.1 43.7
QVQ-72B-Preview                  | 41.8 46.2 51.2 46.4 46.4
Qwen2.5-VL-72B-Instruct          | 47.8 46.8 63.5 51.6 52.7
InternVL3-78B                    | 67.8 52.5 64.5 63.3 61.6
Skywork-VL Reward (7B)           | 66.0 80.0 61.0 73.1 69.0
"""

_RB_COLUMNS = ("Chat", "Chat Hard", "Safety", "Reasoning", "Score")
_RB_SOURCE = "model card of Skywork-VL-Reward-7B"
_RB_ROWS = """
InternLM2-7B-Reward              | 99.2 69.5 87.2 94.5 87.6
Skywork-Reward-Llama3.1-8B       | 95.8 87.3 90.8 96.2 92.5
Skywork-Reward-Llama-3.1-8B-v0.2 | 94.7 88.4 92.7 96.7 93.1
QRM-Llama3.1-8B-v2               | 96.4 86.8 92.6 96.8 93.1
Qwen2-VL-7B-Instruct             | 65.1 50.9 55.8 68.3 60.0
InternVL3-8B                     | 97.2 50.4 83.6 83.9 78.8
Qwen2.5-VL-7B-Instruct           | 94.3 63.8 84.1 86.2 82.1
IXC-2.5-Reward-7B                | 90.8 83.8 87.8 90.0 88.1
Skywork-VL Reward (7B)           | 90.0 87.5 91.1 91.8 90.1
"""

# Skywork-Reward-Llama-3.1-8B stands in both tables, with a Safety of 90.8 and of 90.6. Either
# gives the Score of 92.5.
_LEADERBOARD_SOURCE = "leaderboard of September 2024"
_LEADERBOARD_ROWS = """
Skywork-Reward-Gemma-2-27B       | 95.8 91.4 92.0 96.1 93.8
SFR-LLaMa-3.1-70B-Judge-r        | 96.9 84.8 92.2 97.6 92.8
Skywork-Reward-Llama-3.1-8B      | 95.8 87.3 90.6 96.2 92.5
Nemotron-4-340B-Reward           | 95.8 87.1 92.2 93.6 92.2
ArmoRM-Llama3-8B-v0.1            | 96.9 76.8 92.2 97.3 90.8
SFR-nemo-12B-Judge-r             | 97.2 82.2 87.5 95.1 90.5
internlm2-20b-reward             | 98.9 76.5 89.9 95.8 90.3
"""


_RB2_COLUMNS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties", "Score")
_RB2_SOURCE = "arXiv:2506.01937, table 3 (* asked as a judge)"
_RB2_ROWS = """
google/gemini-2.5-flash-preview-04-17*   | 65.7 55.3 81.1 90.9 86.7 83.4 77.2
nicolinho/QRM-Gemma-2-27B                | 78.5 37.2 69.9 95.8 95.4 83.2 76.7
infly/INF-ORM-Llama3.1-70B               | 74.1 41.9 69.9 96.4 90.3 86.2 76.5
anthropic/claude-opus-4-20250514*        | 82.7 41.9 74.9 89.5 86.2 83.7 76.5
allenai/Llama-3.1-70B-Instruct-RM-RB2    | 81.3 41.9 69.9 88.4 86.5 88.3 76.1
Skywork/Skywork-Reward-Gemma-2-27B       | 73.7 40.3 70.5 94.2 93.2 82.6 75.8
anthropic/claude-3-7-sonnet-20250219*    | 73.3 54.4 75.0 90.3 92.1 67.2 75.4
Skywork/Skywork-Reward-Gemma-2-27B-v0.2  | 76.7 37.5 67.2 96.9 91.7 81.8 75.3
LxzGordon/URM-LLaMa-3.1-8B               | 68.8 45.0 63.9 91.8 97.6 76.5 73.9
Skywork/Skywork-Reward-Llama-3.1-8B      | 69.9 42.5 62.8 93.3 96.2 74.1 73.1
allenai/Llama-3.1-8B-Instruct-RM-RB2     | 74.3 44.4 61.7 89.6 90.7 76.4 72.8
ShikaiChen/LDL-Reward-Gemma-2-27B-v0.1   | 75.6 35.0 64.5 92.2 91.3 76.3 72.5
openai/gpt-4.1-2025-04-14*               | 82.9 39.7 65.2 87.3 73.4 85.4 72.3
allenai/Llama-3.1-Tulu-3-70B-SFT-RM-RB2  | 80.8 36.9 67.8 86.9 77.8 83.1 72.2
Skywork/Skywork-Reward-Llama-3.1-8B-v0.2 | 69.7 40.6 60.1 94.2 94.1 71.7 71.7
anthropic/claude-sonnet-4-20250514*      | 76.1 35.9 70.5 89.1 76.0 79.4 71.2
nicolinho/QRM-Llama3.1-8B-v2             | 66.5 40.6 61.2 94.7 89.1 72.3 70.7
allenai/Llama-3.1-Tulu-3-8B-RL-RM-RB2    | 76.4 40.0 61.7 86.4 84.8 62.8 68.7
allenai/Llama-3.1-Tulu-3-8B-DPO-RM-RB2   | 75.2 38.8 62.8 86.0 85.5 64.0 68.7
allenai/Llama-3.1-Tulu-3-8B-SFT-RM-RB2   | 73.3 38.8 57.9 89.8 88.9 60.6 68.2
google/gemini-2.5-pro-preview-05-06*     | 65.3 46.9 53.4 88.1 83.1 69.7 67.7
Ray2333/GRM-Llama3-8B-rewardmodel-ft     | 62.7 35.0 58.5 92.2 89.3 68.2 67.7
RLHFlow/ArmoRM-Llama3-8B-v0.1            | 65.7 41.9 66.1 82.2 76.6 66.3 66.5
openai/gpt-4.1-mini-2025-04-14*          | 60.8 41.2 72.1 72.6 73.5 74.0 65.7
openai/gpt-4o-2024-08-06*                | 56.8 33.1 62.3 86.2 72.9 78.2 64.9
"""


def _expected(values: Mapping[str, float]) -> dict[str, float]:
    """Return the totals that a row's sections give, in percent."""
    if "Score" in values:
        sections = [value for name, value in values.items() if name != "Score"]
        return {"Score": sum(sections) / len(sections)}
    pooled = sum(values[c] * n for c, n in VL_PAIRS.items()) / sum(VL_PAIRS.values())
    return {"Overall": pooled, "Macro": sum(values[c] for c in VL_PAIRS) / 3}


def _rows(text: str, columns: tuple[str, ...], source: str) -> list[Published]:
    rows = []
    for line in text.strip().splitlines():
        model, _, numbers = line.partition("|")
        values = dict(zip(columns, map(float, numbers.split()), strict=True))
        off = (c for c, v in _expected(values).items() if abs(v - values[c]) > _ROUNDING)
        rows.append(Published(model.strip(), source, values, tuple(off)))
    return rows


# Multimodal RewardBench's leaderboard counts pairs that its public file leaves out (Hateful Memes),
# so none of its rows stands beside a score of that file.
PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "rewardbench": (
        *_rows(_RB_ROWS, _RB_COLUMNS, _RB_SOURCE),
        *_rows(_LEADERBOARD_ROWS, _RB_COLUMNS, _LEADERBOARD_SOURCE),
    ),
    "vl-rewardbench": tuple(_rows(_VL_ROWS, _VL_COLUMNS, _VL_SOURCE)),
    "multimodal-rewardbench": (),
    "rewardbench-2": tuple(_rows(_RB2_ROWS, _RB2_COLUMNS, _RB2_SOURCE)),
}
