"""The benchmarks' published files -> pairs, or groups of responses.

Nothing is guessed: a row that is none is a problem, which says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triward.conversation import Message
from triward.errors import InvalidRequest

from triward_tools.evaluation.images import picture
from triward_tools.evaluation.results import Labelled, LabelledGroup, LabelledPair, Problem
from triward_tools.evaluation.rewardbench2 import TIES, TIES_ID
from triward_tools.evaluation.sections import MULTIMODAL_CATEGORIES, REWARDBENCH, REWARDBENCH_2
from triward_tools.evaluation.tables import Columns, DataRow, data_files, read_rows

_REWARDBENCH_SUBSETS = [subset for section in REWARDBENCH.values() for subset in section]

# What the id of a VL-RewardBench row begins with -> subset. These are all beginnings that the
# published ids have: vl-rewardbench/VL_RewardBench, data/data.jsonl at commit e492d65, where the
# folder of `image_path` names the subset, too. Of its 1,250 rows 10 are VLFeedback's, 173
# wildvision's, 448 POVID's, 233 RLAIF-V's, 68 RLHF-V's, 167 MathVerse's and 151 MMMU-Pro's.
_VL_PREFIXES = {
    "LRVInstruction": "vlfeedback",
    "jailbreak": "vlfeedback",
    "politics": "vlfeedback",
    "svit": "vlfeedback",
    "wildvision": "wildvision",
    "hallucination": "povid",
    "RLAIF": "rlaif-v",
    "RLHF": "rlhf-v",
    "mathverse": "mathverse",
    "mmmu": "mmmu",
}

_MARKER = "<image>"


@dataclass(frozen=True)
class Format:
    """Publication format of a benchmark.

    Attributes:
        columns: what a file must have; alternatives stand together.
        split: if a folder has files whose names begin with it, the others are not read.
        pair: a row -> its pair or group; an InvalidRequest says why it is none.
    """

    columns: Columns
    split: str
    pair: Callable[[DataRow], Labelled]


def files_of(benchmark: str, data: Path) -> list[Path]:
    """Return the files that are read, in order.

    Raises:
        InvalidRequest: there are none, or they have several formats.
    """
    files = data_files(data)
    split = [path for path in files if path.name.startswith(FORMATS[benchmark].split)]
    return split or files


def read_pairs(benchmark: str, data: Path) -> Iterator[Labelled | Problem]:
    """Yield every row of the files, in order: a pair or group, or the problem why it is none.

    Args:
        benchmark: one of `FORMATS`.
        data: a file, or a folder; see `tables.data_files`.

    Raises:
        InvalidRequest: the files cannot be read, or lack a column.
    """
    return (row for _, row in placed_pairs(benchmark, data))


def placed_pairs(benchmark: str, data: Path) -> Iterator[tuple[str, Labelled | Problem]]:
    """Yield the same, each with its file and row in front."""
    format_ = FORMATS[benchmark]
    for row in read_rows(files_of(benchmark, data), format_.columns):
        try:
            if row.error:
                raise InvalidRequest(row.error)
            yield row.place, format_.pair(row)
        except InvalidRequest as error:
            yield row.place, Problem(row.index, row.place, str(error))


def _rewardbench(row: DataRow) -> LabelledPair:
    """Read a row of allenai/reward-bench, which has no pictures.

    `prompt`, `chosen`, `rejected` and `subset` are texts, `id` is a number. In some variants
    `prompt` is a list of messages. The published scores are of the split `filtered`; `raw` has
    more rows of the same subsets.
    """
    subset = _known(_text(row, "subset"), "subset", _REWARDBENCH_SUBSETS)
    return LabelledPair(
        row.index, _id(row, "id"), subset, _prompt(row), _text(row, "chosen"),
        _text(row, "rejected"),
    )  # fmt: skip


def _rewardbench_2(row: DataRow) -> LabelledGroup:
    """Read a row of allenai/reward-bench-2, which has no pictures.

    `prompt`, `subset` and `id` are texts, `chosen` and `rejected` lists of texts, which
    `num_correct`, `num_incorrect` and `total_completions` count. Ids of Ties are as ref:3 or
    tied:3; a prompt of another subset has one correct response.
    """
    subset = _known(_text(row, "subset"), "subset", REWARDBENCH_2)
    name = _id(row, "id")
    chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
    counts = {
        "num_correct": len(chosen),
        "num_incorrect": len(rejected),
        "total_completions": len(chosen) + len(rejected),
    }
    for column, count in counts.items():
        if row.values.get(column) != count:
            got = _shown(row.values.get(column))
            raise InvalidRequest(f"{column}: the row has {count} such responses, got {got}")
    if subset == TIES and not TIES_ID.fullmatch(name):
        raise InvalidRequest(f"id: in {TIES} it must be as ref:3 or tied:3, got {_shown(name)}")
    if subset == TIES and name.startswith("tied") and len(chosen) < 2:
        raise InvalidRequest("chosen: a tied row must have at least 2 responses, got 1")
    if subset != TIES and len(chosen) > 1:
        raise InvalidRequest(f"chosen: in {subset} there is 1 response, got {len(chosen)}")
    return LabelledGroup(row.index, name, subset, _prompt(row), chosen, rejected)


def _vl_rewardbench(row: DataRow) -> LabelledPair:
    """Read a row of MMInstruction/VL-RewardBench, or of vl-rewardbench/VL_RewardBench's data.jsonl.

    `response` has two texts and `human_ranking` their ranks, 0 for the better one. The picture
    stands in `image`, in data.jsonl as a path in `image_path`. `query` has the marker `<image>` in
    some rows; the benchmark's own script takes it out, too.
    """
    responses, ranking = row.values.get("response"), row.values.get("human_ranking")
    if not isinstance(responses, (list, tuple)) or [*map(type, responses)] != [str, str]:
        raise InvalidRequest(f"response: must be a list of 2 texts, got {_shown(responses)}")
    if not isinstance(ranking, (list, tuple)) or [*ranking] not in ([0, 1], [1, 0]):
        raise InvalidRequest(f"human_ranking: must be [0, 1] or [1, 0], got {_shown(ranking)}")
    chosen, rejected = responses if ranking[0] == 0 else reversed(responses)
    beside = row.values.get("image") is None and "image_path" in row.values
    column = "image_path" if beside else "image"
    prompt = _illustrated(row, column, _text(row, "query"))
    return LabelledPair(row.index, _id(row, "id"), _vl_subset(row), prompt, chosen, rejected)


def _vl_subset(row: DataRow) -> str:
    """Return the subset, which is told by what stands before the id's first hyphen or underscore.

    As the benchmark's cal.py at commit 91b241e does it, but that there an id of any other beginning
    counts as VLFeedback's.
    """
    name = _id(row, "id")
    prefix = name.replace("_", "-").partition("-")[0]
    if prefix not in _VL_PREFIXES:
        known = ", ".join(_VL_PREFIXES)
        raise InvalidRequest(f"id: {_shown(name)} names no subset; its beginning must be {known}")
    return _VL_PREFIXES[prefix]


def _multimodal_rewardbench(row: DataRow) -> LabelledPair:
    """Read a row of all_data.json, as facebookresearch/multimodal_rewardbench's scripts write it.

    `Text`, `Output1`, `Output2` and `Category` are texts, `Better` is "Output1" or "Output2", and
    `Image` is a path that starts at the file's folder.
    """
    better = row.values.get("Better")
    outputs = [_text(row, "Output1"), _text(row, "Output2")]
    if not isinstance(better, str) or better.lower() not in ("output1", "output2"):
        raise InvalidRequest(f"Better: must be 'output1' or 'output2', got {_shown(better)}")
    chosen, rejected = outputs if better.lower() == "output1" else reversed(outputs)
    category = _known(_text(row, "Category"), "Category", MULTIMODAL_CATEGORIES)
    prompt = _illustrated(row, "Image", _text(row, "Text"))
    return LabelledPair(row.index, _id(row, "ID"), category, prompt, chosen, rejected)


def _illustrated(row: DataRow, column: str, text: str) -> list[Message]:
    """Return the user's message: the picture, then the text without markers for a picture."""
    shown = picture(row.values.get(column), row.folder, column)
    text = text.replace(f"{_MARKER}\n", "").replace(_MARKER, "")
    parts = [{"type": "image", "image": shown}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def _prompt(row: DataRow) -> list[Message]:
    """Return a text as the user's message, and messages as they are."""
    prompt = row.values.get("prompt")
    return _messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def _messages(value: object) -> list[Message]:
    """Messages; keys whose value is None are the table's, not the row's."""
    if not isinstance(value, (list, tuple)) or not value:
        raise InvalidRequest(f"prompt: must be a text or a list of messages, got {_shown(value)}")
    for message in value:
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"prompt: a message must be an object, got {_shown(message)}")
    return [{key: each for key, each in message.items() if each is not None} for message in value]


def _text(row: DataRow, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise InvalidRequest(f"{column}: must be a text, got {_shown(value)}")
    return value


def _texts(row: DataRow, column: str) -> tuple[str, ...]:
    value = row.values.get(column)
    if not isinstance(value, (list, tuple)) or not value:
        raise InvalidRequest(f"{column}: must be a list of texts, got {_shown(value)}")
    for text in value:
        if not isinstance(text, str):
            raise InvalidRequest(f"{column}: must be a list of texts, one is {_shown(text)}")
    return tuple(value)


def _id(row: DataRow, column: str) -> str:
    value = row.values.get(column)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise InvalidRequest(f"{column}: must be a text or a number, got {_shown(value)}")
    return str(value)


def _known(value: str, column: str, known: Sequence[str]) -> str:
    if value not in known:
        raise InvalidRequest(f"{column}: must be one of {', '.join(known)}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return "no value" if value is None else f"{value!r:.100}"


FORMATS = {
    "rewardbench": Format(
        [("prompt",), ("chosen",), ("rejected",), ("subset",), ("id",)], "filtered", _rewardbench
    ),
    "vl-rewardbench": Format(
        [("id",), ("query",), ("response",), ("image", "image_path"), ("human_ranking",)],
        "test",
        _vl_rewardbench,
    ),
    "multimodal-rewardbench": Format(
        [("ID",), ("Text",), ("Image",), ("Output1",), ("Output2",), ("Better",), ("Category",)],
        "all_data.",
        _multimodal_rewardbench,
    ),
    "rewardbench-2": Format(
        [
            ("id",),
            ("prompt",),
            ("chosen",),
            ("rejected",),
            ("num_correct",),
            ("num_incorrect",),
            ("total_completions",),
            ("subset",),
        ],
        "test",
        _rewardbench_2,
    ),
}
