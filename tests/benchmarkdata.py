"""Small data sets in the forms in which the benchmarks are published.

    data = write("vl-rewardbench", folder, ".parquet")
    data.path                     # of the file; pictures beside it lie in the same folder
    data.pairs                    # what is to be read from it, in order
    data.problems                 # index of a malformed row -> what its reason must say

The pictures are real ones, so a server can score the pairs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.rowfiles import write_rows
from triward_tools.evaluation.results import Labelled, LabelledGroup, LabelledPair

Rows = list[dict[str, Any]]

BENCHMARKS = ("rewardbench", "vl-rewardbench", "multimodal-rewardbench", "rewardbench-2")
WITH_PICTURES = BENCHMARKS[1:3]
SUFFIXES = (".parquet", ".json", ".jsonl")

# How a row may hold its picture. A Parquet file holds it in one way in all its rows.
EMBEDDED = ("struct", "bytes", "base64", "url")
BESIDE = ("path", "struct-path")


@dataclass(frozen=True)
class Data:
    """What was written, and what is to be read."""

    path: Path
    pairs: Sequence[Labelled]
    problems: dict[int, str]


def write(
    benchmark: str,
    folder: Path,
    suffix: str = ".parquet",
    *,
    images: str | None = None,
    pairs: int = 12,
) -> Data:
    """A file of `pairs` good rows with malformed ones among them.

    Args:
        benchmark: whose form the rows have.
        folder: made if it is not there.
        suffix: of the file.
        images: one of `EMBEDDED` or `BESIDE`; by default as the benchmark is published.
        pairs: how many rows are well formed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make, malformed, name, published = _FORMS[benchmark]
    if images is None:
        images = "struct" if suffix == ".parquet" and published == "struct" else "path"
    rows: Rows = []
    good: list[Labelled] = []
    problems: dict[int, str] = {}
    spoilt = iter(malformed)
    for number in range(pairs):
        row, pair = make(len(rows), number, folder, images, suffix)
        if number % 3 == 1 and (change := next(spoilt, None)) is not None:
            values, reason = change
            problems[len(rows)] = reason
            rows.append({**row, **values})
            row, pair = make(len(rows), number, folder, images, suffix)
        rows.append(row)
        good.append(pair)
    path = folder / f"{name}{suffix}"
    write_rows(path, rows, row_group_size=5)
    return Data(path, good, problems)


def png(number: int) -> bytes:
    """A picture unlike the others'."""
    image = Image.linear_gradient("L").resize((40 + 4 * (number % 5), 36))
    shade = Image.new("L", image.size, 37 * number % 256)
    buffer = io.BytesIO()
    Image.merge("RGB", (image, shade, image.rotate(180))).save(buffer, "PNG")
    return buffer.getvalue()


def _responses(number: int) -> tuple[str, str]:
    """The better one and the other. By length, one is right in two rows of three."""
    long = f"Answer {number} says at length why it is as it is, and what follows. 图"
    short = f"No {number}."
    return (short, long) if number % 3 == 2 else (long, short)


def _rewardbench(
    index: int, number: int, folder: Path, images: str, suffix: str
) -> tuple[dict[str, Any], LabelledPair]:
    subsets = ("alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm", "hep-rust")
    subset = subsets[number % len(subsets)]
    chosen, rejected = _responses(number)
    prompt = f"Question {number // 2} of {subset}?"  # some neighbours share theirs
    row = {
        "prompt": prompt,
        "chosen": chosen,
        "chosen_model": "a",
        "rejected": rejected,
        "rejected_model": "b",
        "subset": subset,
        "id": 30 + number,
    }
    messages = [{"role": "user", "content": prompt}]
    return row, LabelledPair(index, str(30 + number), subset, messages, chosen, rejected)


def _vl_rewardbench(
    index: int, number: int, folder: Path, images: str, suffix: str
) -> tuple[dict[str, Any], LabelledPair]:
    ids = {
        "LRVInstruction-0007{}": "vlfeedback",
        "wildvision-battle-2{}": "wildvision",
        "hallucination_pair-7{}": "povid",
        "RLAIF-V-1{}": "rlaif-v",
        "RLHF-V-5{}": "rlhf-v",
        "mathverse_10{}-1": "mathverse",
        "mmmu_pro_test_Marketing_{}": "mmmu",
    }
    form, subset = list(ids.items())[number % len(ids)]
    chosen, rejected = _responses(number)
    first = number % 2 == 0
    query = f"What does picture {number} show?"
    held, read = _picture(number, folder, images, suffix)
    row = {
        "id": form.format(number),
        "query": f"<image>\n{query}" if subset == "povid" else query,
        "response": [chosen, rejected] if first else [rejected, chosen],
        "image" if images != "path" else "image_path": held,
        "human_ranking": [0, 1] if first else [1, 0],
        "query_source": subset,
    }
    prompt = _message(read, query)
    return row, LabelledPair(index, form.format(number), subset, prompt, chosen, rejected)


def _multimodal_rewardbench(
    index: int, number: int, folder: Path, images: str, suffix: str
) -> tuple[dict[str, Any], LabelledPair]:
    sources = {
        "nocaps": "open_generation/correctness_task",
        "mathvista": "reasoning",
        "EMMA-Coding": "reasoning",
        "pairs": "safety",
        "MMBench": "vqa",
    }
    source, category = list(sources.items())[number % len(sources)]
    chosen, rejected = _responses(number)
    first = number % 2 == 1
    text = f"Describe picture {number}."
    held, read = _picture(number, folder, images, suffix)
    row = {
        "ID": f"{source}_{number}",
        "Text": text,
        "Image": held,
        "Output1": chosen if first else rejected,
        "Output2": rejected if first else chosen,
        "Better": "Output1" if first else "Output2",
        "Category": category,
    }
    return row, LabelledPair(
        index, f"{source}_{number}", category, _message(read, text), chosen, rejected
    )


def _rewardbench_2(
    index: int, number: int, folder: Path, images: str, suffix: str
) -> tuple[dict[str, Any], LabelledGroup]:
    """Two of seven rows are of Ties, the `ref` one and the `tied` one of a prompt."""
    subset = ("Factuality", "Precise IF", "Ties", "Math", "Safety", "Ties", "Focus")[number % 7]
    long, short = _responses(number)
    chosen, rejected = (long,), (short, f"{short} Or not.", "?" * (number + 5))
    name = str(number % 5)  # which other subsets have, too
    if subset == "Ties":
        kind = "ref" if number % 7 == 2 else "tied"
        chosen = chosen if kind == "ref" else (long, f"{long}!", f"Yes: {long}")
        name = f"{kind}:{number // 7}"
    prompt = f"Question {number // 2} of {subset}?"
    row = {
        "id": name,
        "prompt": prompt,
        "chosen": list(chosen),
        "rejected": list(rejected),
        "num_correct": len(chosen),
        "num_incorrect": 3,
        "total_completions": len(chosen) + 3,
        "models": ["a"],
        "subset": subset,
        "additional_metadata": {"category": None, "index": 1.5},
    }
    messages = [{"role": "user", "content": prompt}]
    return row, LabelledGroup(index, name, subset, messages, chosen, rejected)


def _message(image: object, text: str) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": text}],
        }
    ]


def _picture(number: int, folder: Path, images: str, suffix: str) -> tuple[Any, bytes | Path]:
    """What the row holds, and what is to be read from it."""
    content = png(number)
    packed = base64.b64encode(content).decode()
    name = f"images/{number % 3}/{number}.png"
    if images in BESIDE:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        held = name if images == "path" else {"bytes": None, "path": name}
        return held, path
    in_file: Any = content if suffix == ".parquet" else packed  # JSON has no bytes
    held = {
        "struct": {"bytes": in_file, "path": f"{number}.png"},
        "bytes": in_file,
        "base64": packed,
        "url": f"data:image/png;base64,{packed}",
    }[images]
    return held, content


# What a row has in place of its own -> what its problem must say. Parquet can hold all of them.
_REWARDBENCH: list[tuple[dict[str, Any], str]] = [
    ({"subset": "alpacaeval-simple"}, "got 'alpacaeval-simple'"),
    ({"chosen": None}, "chosen: must be a text, got no value"),
    ({"prompt": None}, "prompt: must be a text or a list of messages, got no value"),
    ({"id": None}, "id: must be a text or a number, got no value"),
]
_VL_REWARDBENCH: list[tuple[dict[str, Any], str]] = [
    ({"human_ranking": [0, 0]}, "human_ranking: must be [0, 1] or [1, 0], got [0, 0]"),
    ({"response": ["one"]}, "response: must be a list of 2 texts, got ['one']"),
    (
        {"image": None, "image_path": None},
        "must be bytes, base64, a data: URL or a path, got no value",
    ),
    ({"id": "17"}, "id: '17' names no subset"),
]
_MULTIMODAL_REWARDBENCH: list[tuple[dict[str, Any], str]] = [
    ({"Better": "Output3"}, "Better: must be 'output1' or 'output2', got 'Output3'"),
    ({"Category": None}, "Category: must be a text, got no value"),
    ({"Image": None}, "Image: must be bytes, base64, a data: URL or a path, got no value"),
    ({"Output2": None}, "Output2: must be a text, got no value"),
]

_REWARDBENCH_2: list[tuple[dict[str, Any], str]] = [
    (
        {"subset": "Chat"},
        "subset: must be one of Factuality, Precise IF, Math, Safety, Focus, Ties",
    ),
    ({"chosen": []}, "chosen: must be a list of texts, got []"),
    ({"total_completions": 9}, "total_completions: the row has 4 such responses, got 9"),
    ({"rejected": None}, "rejected: must be a list of texts, got no value"),
]

_Make = Callable[[int, int, Path, str, str], "tuple[dict[str, Any], Labelled]"]
_FORMS: dict[str, tuple[_Make, list[tuple[dict[str, Any], str]], str, str]] = {
    "rewardbench": (_rewardbench, _REWARDBENCH, "filtered-00000-of-00001", ""),
    "vl-rewardbench": (_vl_rewardbench, _VL_REWARDBENCH, "test-00000-of-00001", "struct"),
    "multimodal-rewardbench": (
        _multimodal_rewardbench, _MULTIMODAL_REWARDBENCH, "all_data", "path",
    ),
    "rewardbench-2": (_rewardbench_2, _REWARDBENCH_2, "test-00000-of-00001", ""),
}  # fmt: skip
