"""Reading the benchmarks' public files: every row is a pair, or a problem that says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.benchmarkdata import (
    BENCHMARKS,
    BESIDE,
    EMBEDDED,
    SUFFIXES,
    WITH_PICTURES,
    png,
    write,
)
from tests.rowfiles import write_rows
from triward import InvalidRequest
from triward_tools import cli_evaluation
from triward_tools.evaluation.arithmetic import BENCHMARKS as ARITHMETIC
from triward_tools.evaluation.formats import FORMATS, placed_pairs, read_pairs
from triward_tools.evaluation.published import VL_PAIRS
from triward_tools.evaluation.results import LabelledGroup, LabelledPair, Problem

REWARDBENCH = {
    "prompt": "q", "chosen": "yes", "rejected": "no", "subset": "hep-go", "id": 7,
}  # fmt: skip
VL = {
    "id": "RLAIF-V-14", "query": "q", "response": ["yes", "no"], "image_path": "a.png",
    "human_ranking": [0, 1],
}  # fmt: skip
MULTIMODAL = {
    "ID": "nocaps_1", "Text": "q", "Image": "a.png", "Output1": "yes", "Output2": "no",
    "Better": "Output1", "Category": "safety",
}  # fmt: skip
REWARDBENCH_2 = {
    "id": "12", "prompt": "q", "chosen": ["yes"], "rejected": ["no", "nay", "never"],
    "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "subset": "Math",
}  # fmt: skip
TIED = {"id": "tied:3", "subset": "Ties", "num_correct": 2, "total_completions": 5}
ROWS = dict(zip(BENCHMARKS, (REWARDBENCH, VL, MULTIMODAL, REWARDBENCH_2), strict=True))


def check(benchmark, path, data):
    """Each row of what was written is there once, in its place."""
    found = list(read_pairs(benchmark, path))
    assert [row.index for row in found] == list(range(len(data.pairs) + len(data.problems)))
    assert [row for row in found if not isinstance(row, Problem)] == list(data.pairs)
    problems = {row.index: row for row in found if isinstance(row, Problem)}
    assert problems.keys() == data.problems.keys()
    for index, said in data.problems.items():
        assert said in problems[index].reason
        assert problems[index].place == f"{data.path.name}: row {index + 1}"


def read(tmp_path, benchmark, *changes, suffix=".jsonl"):
    """What is read of rows that differ from a good one."""
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [
        {**ROWS[benchmark], **change} if isinstance(change, dict) else change
        for change in ({}, *changes)
    ]
    path = write_rows(tmp_path / f"data{suffix}", rows)
    good, *found = read_pairs(benchmark, path)
    assert not isinstance(good, Problem)
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_published_forms(benchmark, suffix, tmp_path):
    data = write(benchmark, tmp_path, suffix)
    assert (len(data.pairs), len(data.problems)) == (12, 4)
    check(benchmark, data.path, data)
    check(benchmark, tmp_path, data)  # the pictures beside it are no data


@pytest.mark.parametrize("images", [*EMBEDDED, *BESIDE])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("benchmark", WITH_PICTURES)
def test_where_pictures_are(benchmark, suffix, images, tmp_path):
    data = write(benchmark, tmp_path, suffix, images=images, pairs=4)
    check(benchmark, data.path, data)


def test_picture_first_then_the_text_without_its_marker(tmp_path):
    [pair] = read(tmp_path, "vl-rewardbench", {"query": "<image>\nWhat is <image>this?\n"})
    assert pair.prompt == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": tmp_path / "a.png"},
                {"type": "text", "text": "What is this?\n"},
            ],
        }
    ]
    [pair] = read(tmp_path, "rewardbench", {"prompt": "<image>\nof HTML"})
    assert pair.prompt == [{"role": "user", "content": "<image>\nof HTML"}]


def test_a_prompt_of_messages(tmp_path):
    turns = [{"role": role, "content": role, "name": None} for role in ("user", "assistant")]
    [pair] = read(tmp_path, "rewardbench", {"prompt": turns})
    assert pair.prompt == [{"role": role, "content": role} for role in ("user", "assistant")]


@pytest.mark.parametrize(
    ("name", "subset"),
    [
        ("LRVInstruction-000000007746", "vlfeedback"),
        ("jailbreak-typo-HateSpeech-70", "vlfeedback"),
        ("politics-Gov_Decision-26", "vlfeedback"),
        ("svit-complex_reasoning-7", "vlfeedback"),
        ("wildvision-battle-226", "wildvision"),
        ("hallucination_pair-7997", "povid"),
        ("RLAIF-V-14", "rlaif-v"),
        ("RLHF-V-3", "rlhf-v"),
        ("mathverse_2028", "mathverse"),
        ("mmmu_pro_test_Computer_Science_334", "mmmu"),
    ],
)
def test_subset_from_the_id(name, subset, tmp_path):
    [pair] = read(tmp_path, "vl-rewardbench", {"id": name})
    assert (pair.id, pair.subset) == (name, subset)
    assert subset in ARITHMETIC["vl-rewardbench"].subsets


def test_published_beginnings_of_ids_give_the_published_counts(tmp_path):
    """The beginnings of the ids in data.jsonl of the benchmark's repository, with their counts."""
    counts = {
        "hallucination_pair": 448, "mathverse": 167, "mmmu_pro_test": 151, "RLAIF-V": 233,
        "RLHF-V": 68, "LRVInstruction": 1, "jailbreak-typo": 7, "politics-Gov_Decision": 1,
        "svit-complex_reasoning": 1, "wildvision-battle": 173,
    }  # fmt: skip
    names = [f"{start}-{n}" for start, count in counts.items() for n in range(count)]
    pairs = read(tmp_path, "vl-rewardbench", *({"id": name} for name in names))
    sections = ARITHMETIC["vl-rewardbench"].sections
    found = {name: sum(p.subset in parts for p in pairs) for name, parts in sections.items()}
    assert found == VL_PAIRS


@pytest.mark.skipif("TRIWARD_VL_REWARDBENCH" not in os.environ, reason="has the published file")
def test_the_published_file():
    """`TRIWARD_VL_REWARDBENCH` names it: data.jsonl with its images, or the Parquet file."""
    rows = list(read_pairs("vl-rewardbench", Path(os.environ["TRIWARD_VL_REWARDBENCH"])))
    assert [row.reason for row in rows if isinstance(row, Problem)] == []
    assert 1247 <= len(rows) <= 1250
    sections = ARITHMETIC["vl-rewardbench"].sections
    for name, parts in sections.items():
        assert 0 <= VL_PAIRS[name] - sum(row.subset in parts for row in rows) <= 1250 - len(rows)


def test_a_group_of_responses(tmp_path):
    [group, tied] = read(tmp_path, "rewardbench-2", {}, {**TIED, "chosen": ["yes", "aye"]})
    assert group == LabelledGroup(
        1, "12", "Math", [{"role": "user", "content": "q"}], ("yes",), ("no", "nay", "never")
    )
    assert list(group.responses) == ["chosen[0]", "rejected[0]", "rejected[1]", "rejected[2]"]
    assert list(tied.responses.values()) == ["yes", "aye", "no", "nay", "never"]


@pytest.mark.parametrize(
    ("benchmark", "column"),
    [
        ("rewardbench", "subset"),
        ("multimodal-rewardbench", "Category"),
        ("rewardbench-2", "subset"),
    ],
)
def test_subsets_are_what_the_arithmetic_counts(benchmark, column, tmp_path):
    known = sorted(ARITHMETIC[benchmark].subsets)
    ids = {"id": "ref:1"} if benchmark == "rewardbench-2" else {}
    found = read(tmp_path, benchmark, *({column: name, **ids} for name in known))
    assert [pair.subset for pair in found] == known


def test_benchmarks_have_one_name_everywhere():
    assert tuple(FORMATS) == tuple(ARITHMETIC) == BENCHMARKS == cli_evaluation.BENCHMARKS


@pytest.mark.parametrize("better", ["output2", "Output2"])
def test_the_better_output(better, tmp_path):
    [pair] = read(tmp_path, "multimodal-rewardbench", {"Better": better})
    assert (pair.chosen, pair.rejected) == ("no", "yes")


def test_the_better_response(tmp_path):
    [pair] = read(tmp_path, "vl-rewardbench", {"human_ranking": [1, 0]})
    assert (pair.chosen, pair.rejected) == ("no", "yes")


@pytest.mark.parametrize(
    ("benchmark", "change", "said"),
    [
        ("rewardbench", {"prompt": 5}, "prompt: must be a text or a list of messages, got 5"),
        ("rewardbench", {"prompt": []}, "prompt: must be a text or a list of messages, got []"),
        ("rewardbench", {"prompt": ["q"]}, "prompt: a message must be an object, got 'q'"),
        ("rewardbench", {"rejected": ["no"]}, "rejected: must be a text, got ['no']"),
        ("rewardbench", {"subset": "HEP-GO"}, "subset: must be one of alpacaeval-easy, "),
        ("rewardbench", {"id": True}, "id: must be a text or a number, got True"),
        ("rewardbench", {"id": ""}, "id: must be a text or a number, got ''"),
        ("vl-rewardbench", {"response": ["a", "b", "c"]}, "response: must be a list of 2 texts"),
        ("vl-rewardbench", {"response": ["a", 5]}, "response: must be a list of 2 texts"),
        ("vl-rewardbench", {"response": "ab"}, "response: must be a list of 2 texts"),
        ("vl-rewardbench", {"human_ranking": [1, 1]}, "human_ranking: must be [0, 1] or [1, 0]"),
        ("vl-rewardbench", {"human_ranking": [0]}, "human_ranking: must be [0, 1] or [1, 0]"),
        ("vl-rewardbench", {"human_ranking": [1, 2]}, "human_ranking: must be [0, 1] or [1, 0]"),
        ("vl-rewardbench", {"human_ranking": "01"}, "human_ranking: must be [0, 1] or [1, 0]"),
        ("vl-rewardbench", {"human_ranking": None}, "got no value"),
        ("vl-rewardbench", {"id": "17"}, "its beginning must be LRVInstruction, jailbreak, "),
        ("vl-rewardbench", {"id": "povid-17"}, "id: 'povid-17' names no subset"),
        ("vl-rewardbench", {"id": "rlaif-V-14"}, "id: 'rlaif-V-14' names no subset"),
        ("vl-rewardbench", {"id": "-17"}, "id: '-17' names no subset"),
        ("vl-rewardbench", {"query": None}, "query: must be a text, got no value"),
        ("vl-rewardbench", {"image_path": "b.png"}, "image_path: there is no file 'b.png'"),
        ("vl-rewardbench", {"image_path": "\0.png"}, "image_path: there is no file"),
        ("vl-rewardbench", {"image_path": "x" * 400 + ".png"}, "image_path: there is no file"),
        ("vl-rewardbench", {"image": ""}, "image: holds 0 bytes"),
        ("vl-rewardbench", {"image": "AAA"}, "image: 'AAA' is neither a path"),
        ("vl-rewardbench", {"image": "AA*AA"}, "image: 'AA*AA' is neither a path"),
        ("vl-rewardbench", {"image": "data:image/png,xyz"}, "image: a data URL must hold"),
        ("vl-rewardbench", {"image": "data:image/png;base64,A"}, "image: a data URL holds invalid"),
        ("vl-rewardbench", {"image": {"bytes": None, "path": None}}, "image: has neither bytes"),
        ("vl-rewardbench", {"image": [1]}, "image: must be bytes, base64, a data: URL or a path"),
        ("multimodal-rewardbench", {"Better": 1}, "Better: must be 'output1' or 'output2', got 1"),
        ("multimodal-rewardbench", {"Better": None}, "got no value"),
        ("multimodal-rewardbench", {"Category": "Safety"}, "Category: must be one of "),
        ("multimodal-rewardbench", {"Output1": 1.5}, "Output1: must be a text, got 1.5"),
        ("multimodal-rewardbench", {"Text": {}}, "Text: must be a text, got {}"),
        ("rewardbench-2", {"chosen": "yes"}, "chosen: must be a list of texts, got 'yes'"),
        ("rewardbench-2", {"rejected": ["a", 5, "b"]}, "rejected: must be a list of texts, one is"),
        ("rewardbench-2", {"rejected": []}, "rejected: must be a list of texts, got []"),
        ("rewardbench-2", {"prompt": 5}, "prompt: must be a text or a list of messages, got 5"),
        ("rewardbench-2", {"num_correct": 2}, "num_correct: the row has 1 such responses, got 2"),
        ("rewardbench-2", {"num_incorrect": None}, "num_incorrect: the row has 3 such responses"),
        ("rewardbench-2", {"total_completions": 5}, "total_completions: the row has 4 such"),
        ("rewardbench-2", {"subset": "ties"}, "subset: must be one of Factuality, Precise IF, "),
        ("rewardbench-2", {"id": None}, "id: must be a text or a number, got no value"),
        (
            "rewardbench-2",
            {"subset": "Ties"},
            "id: in Ties it must be as ref:3 or tied:3",
        ),
        ("rewardbench-2", {**TIED, "chosen": ["a", "b"], "id": "tied:x"}, "got 'tied:x'"),
        (
            "rewardbench-2",
            {"subset": "Ties", "id": "tied:3"},
            "chosen: a tied row must have at least 2 responses, got 1",
        ),
        (
            "rewardbench-2",
            {"chosen": ["a", "b"], "num_correct": 2, "total_completions": 5},
            "chosen: in Math there is 1 response, got 2",
        ),
    ],
)
def test_a_malformed_row_is_a_problem_and_ends_nothing(benchmark, change, said, tmp_path):
    problem, good = read(tmp_path, benchmark, change, {})
    assert isinstance(problem, Problem)
    assert said in problem.reason
    assert (problem.index, problem.place) == (1, "data.jsonl: row 2")
    assert not isinstance(good, Problem)


def test_long_values_are_shown_in_part(tmp_path):
    [problem] = read(tmp_path, "rewardbench", {"subset": "x" * 10_000})
    assert len(problem.reason) < 700
    [problem] = read(tmp_path, "vl-rewardbench", {"image": "*" * 10_000})
    assert len(problem.reason) < 300


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "q", ', "not JSON: "),
        ("[1]", "must be an object, got list"),
        ('{"a": ' + "[" * 100_000, "not JSON: "),
    ],
)
def test_a_damaged_line_is_a_problem(line, said, tmp_path):
    problem, good = read(tmp_path, "rewardbench", line, {"id": 8})
    assert said in problem.reason
    assert (good.index, good.id) == (2, "8")


def test_a_line_that_is_no_text(tmp_path):
    line = json.dumps(REWARDBENCH).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\n\n" + b"\xff\n" + line)
    first, problem, last = placed_pairs("rewardbench", path)
    assert isinstance(first[1], LabelledPair)
    assert "not JSON: 'utf-8' codec" in problem[1].reason
    # Rows have the numbers of their lines, so that they are found; indices have no gaps.
    assert [first[0], problem[0], last[0]] == [f"data.jsonl: row {n}" for n in (1, 3, 4)]
    assert last[1].index == 2


def test_an_element_of_an_array_that_is_no_row(tmp_path):
    [problem] = read(tmp_path, "rewardbench", ["prompt"], suffix=".json")
    assert problem.reason == "must be an object, got list"


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize(
    "shape",
    [
        lambda rows: {"data": rows},
        columns,
        lambda rows: {
            name: {str(i): value for i, value in enumerate(values)}
            for name, values in columns(rows).items()
        },
    ],
)
def test_objects_of_json(shape, tmp_path):
    rows = [{**REWARDBENCH, "id": number} for number in range(3)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(shape(rows)))
    assert [pair.id for pair in read_pairs("rewardbench", path)] == ["0", "1", "2"]


def test_several_files_are_numbered_through(tmp_path):
    for name in ("b/1", "a", "b/0", ".hidden", "_part", "_drafts/0"):
        write_rows(tmp_path / f"{name}.jsonl", [{**REWARDBENCH, "id": name}, "{"])
    (tmp_path / "notes.txt").write_text("no data")
    found = list(read_pairs("rewardbench", tmp_path))
    assert [row.index for row in found] == list(range(6))
    assert [row.id for row in found[::2]] == ["a", "b/0", "b/1"]
    assert [row.place for row in found[1::2]] == [f"{n}.jsonl: row 2" for n in ("a", "0", "1")]


@pytest.mark.parametrize(
    ("benchmark", "read", "left"),
    [
        ("rewardbench", "filtered-00000-of-00001", "raw-00000-of-00001"),
        ("vl-rewardbench", "test-00000-of-00001", "train-00000-of-00001"),
        ("multimodal-rewardbench", "all_data", "all_data_release"),
        ("rewardbench-2", "test-00000-of-00001", "train-00000-of-00001"),
    ],
)
def test_the_split_that_counts(benchmark, read, left, tmp_path):
    (tmp_path / "data" / "a.png").parent.mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png(1))
    write_rows(tmp_path / "data" / f"{left}.json", [ROWS[benchmark]] * 3)
    assert len(list(read_pairs(benchmark, tmp_path))) == 3
    write_rows(tmp_path / "data" / f"{read}.json", [ROWS[benchmark]] * 2)
    assert len(list(read_pairs(benchmark, tmp_path))) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_missing_column_ends_the_run(benchmark, suffix, tmp_path):
    for missing in ROWS[benchmark]:
        row = {name: value for name, value in ROWS[benchmark].items() if name != missing}
        path = write_rows(tmp_path / f"data{suffix}", [row] * 3)
        with pytest.raises(InvalidRequest, match=rf"has no column .*'{missing}', it has .*"):
            list(read_pairs(benchmark, path))


def test_a_value_that_one_row_lacks_is_no_missing_column(tmp_path):
    rows = [{"id": 1}, REWARDBENCH]
    for suffix in (".json", ".jsonl"):
        problem, pair = read_pairs("rewardbench", write_rows(tmp_path / f"a{suffix}", rows))
        assert problem.reason == "subset: must be a text, got no value"
        assert isinstance(pair, LabelledPair)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1 and no more", "a.parquet: cannot be read as Parquet"),
        ("a.parquet", b"", "a.parquet: cannot be read as Parquet"),
        ("a.json", b"[", "a.json: not JSON"),
        ("a.json", b"\xff", "a.json: not JSON"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.json", b"5", "a.json: must be an array of rows, got int"),
        ("a.json", b'{"prompt": "q"}', "a.json: 'prompt' is neither rows"),
        ("a.json", b'{"prompt": ["q"], "id": []}', "a.json: columns of several lengths"),
        ("a.json", b"[]", "a.json: has no column 'prompt', it has none"),
        ("a.jsonl", b"", "a.jsonl: has no column 'prompt', it has none"),
        ("a.csv", b"prompt", "the suffix must be one of .parquet, .json, .jsonl, got '.csv'"),
        ("gone/a.json", None, "there is no such file or folder"),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_run(name, content, said, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=said.replace("[", r"\[")):
        list(read_pairs("rewardbench", path))


def test_a_parquet_file_that_is_damaged_inside(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{**REWARDBENCH, "chosen": f"{n} " * 50} for n in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[300:2000] = bytes(1700)
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match="cannot be read as Parquet"):
        list(read_pairs("rewardbench", path))


def test_a_folder_of_nothing_or_of_several_formats(tmp_path):
    with pytest.raises(InvalidRequest, match=r"holds no file of \.parquet, \.json, \.jsonl"):
        list(read_pairs("rewardbench", tmp_path))
    write_rows(tmp_path / "x" / "a.json", [REWARDBENCH])
    write_rows(tmp_path / "b.parquet", [REWARDBENCH])
    with pytest.raises(InvalidRequest, match=r"several formats, as b\.parquet and x/a\.json"):
        list(read_pairs("rewardbench", tmp_path))


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(REWARDBENCH) + "\n"
    path.write_text(line * 3)
    pairs = read_pairs("rewardbench", path)
    assert next(pairs).index == 0
    with path.open("a") as file:
        file.write(line * 100_000)  # more than a reader holds
    assert sum(1 for _ in pairs) > 90_000
