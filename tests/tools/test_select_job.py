"""The three commands and functions on files: formats, errors, and jobs that are killed."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset

import triward.cli
from tests.client.helpers import png
from tests.commands import Command
from tests.fakeserver import Fault
from tests.rowfiles import read_rows, write_rows
from triward import InvalidRequest, RewardClient, ServerError, ServerUnavailable
from triward_tools.jobs import JobMismatch
from triward_tools.selection import (
    Columns,
    Pairing,
    RobustOutliers,
    Threshold,
    best_of_n_file,
    filter_file,
    pairs_file,
)
from triward_tools.selection import job as job_module
from triward_tools.selection.picture import _edges

TABLE = Columns(prompt="prompt", responses="responses")


def made(count=30):
    """Rows of three responses; of row n the longest is number n % 3, of n + 3 characters."""
    return [
        {
            "id": n,
            "messages": [{"role": "user", "content": f"q{n}"}],
            "responses": ["x" * (n + 3 if place == n % 3 else place) for place in range(3)],
        }
        for n in range(count)
    ]


def run(*arguments):
    return triward.cli.main([*map(str, arguments)])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("out", [".jsonl", ".parquet"])
def test_best_of_n(server, tmp_path, capsys, suffix, out):
    source, output = write_rows(tmp_path / f"in{suffix}", made()), tmp_path / f"out{out}"
    options = ["--url", server.url, "--input", source, "--output", output, "--chunk-rows", 7]
    assert run("best-of-n", *options) == 0
    for row, before in zip(read_rows(output), made(), strict=True):
        n = before["id"]
        best = {"response": "x" * (n + 3), "score": n + 3.0, "index": n % 3}
        scores = [float(len(text)) for text in before["responses"]]
        assert row == {**before, **best, "scores": scores}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "best-of-n: 30 rows in, 30 rows out"
    # Of three the highest is n + 3; the other two are 0 to 2.
    assert "expected best of k: 1 6.5  2 12.22  3 17.5" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [source.name, output.name, f"{output.name}.svg"]
    )
    assert b"<svg" in (tmp_path / f"{output.name}.svg").read_bytes()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("out", [".jsonl", ".parquet"])
def test_filter(server, tmp_path, capsys, suffix, out):
    source, output = write_rows(tmp_path / f"in{suffix}", made()), tmp_path / f"out{out}"
    dropped = tmp_path / f"dropped{out}"
    options = ["--url", server.url, "--input", source, "--output", output, "--dropped", dropped]
    assert run("filter", *options, "--min", 10, "--max", 30, "--json", "--no-picture") == 0
    kept = read_rows(output)
    assert [row["id"] for row in kept] == list(range(7, 28))
    for row in kept:
        n = row["id"]
        assert (row["responses"], row["scores"]) == (["x" * (n + 3)], [n + 3.0])
    gone = read_rows(dropped)
    assert [row["id"] for row in gone] == list(range(30))
    assert gone[0]["reasons"] == [f"score {n} is below 10" for n in (3, 1, 2)]
    assert gone[29]["reasons"][1:] == ["score 1 is below 10", "score 32 is above 30"]
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["written"], told["failed"]) == (30, 21, 0)
    figures = told["figures"]
    assert (figures["responses"], figures["responses kept"]) == (90, 21)
    assert (figures["dropped for a low score"], figures["dropped for a high score"]) == (67, 2)
    assert figures["rows without a response left"] == 9
    assert not (tmp_path / f"{output.name}.svg").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("out", [".jsonl", ".parquet"])
def test_pairs(server, tmp_path, capsys, suffix, out):
    source, output = write_rows(tmp_path / f"in{suffix}", made()), tmp_path / f"out{out}"
    options = ["--url", server.url, "--input", source, "--output", output]
    assert run("pairs", *options, "--strategy", "all", "--max-pairs", 2, "--min-margin", 3) == 0
    rows = read_rows(output)
    assert len(rows) == 57  # rows 0 and 1 have fewer, with margins of 3 and more
    best, second = [row for row in rows if row["id"] == 10]
    prompt = [{"role": "user", "content": "q10"}]
    chosen, rejected = ({"role": "assistant", "content": "x" * n} for n in (13, 0))
    assert best == {
        "id": 10, "prompt": prompt, "chosen": [chosen], "rejected": [rejected],
        "score_chosen": 13.0, "score_rejected": 0.0, "margin": 13.0,
    }  # fmt: skip
    assert second["margin"] == 11.0
    out = capsys.readouterr().out
    assert "pairs: 57" in out
    assert "chosen is longer: 1" in out
    assert "slope of score per 1000 characters within prompts: 1000" in out


@pytest.mark.parametrize("out", [".jsonl", ".parquet"])
def test_the_shift_is_the_mean_of_all_scores_so_far(server, tmp_path, out):
    source, output = write_rows(tmp_path / "in.jsonl", made()), tmp_path / f"out{out}"
    options = ["--url", server.url, "--input", source, "--output", output, "--chunk-rows", 7]
    assert run("pairs", *options, "--min-margin", 3, "--score-shift") == 0
    rows = read_rows(output)
    seen = []
    for row in rows:
        seen += [row["score_chosen"], row["score_rejected"]]
        assert row["score_shift"] == pytest.approx(sum(seen) / len(seen))
    assert len({row["score_shift"] for row in rows}) > 20


def test_rows_that_are_one_conversation(client, server, tmp_path):
    rows = [
        {"id": n, "messages": [{"role": "user", "content": "q"},
                               {"role": "assistant", "content": "x" * n}]}
        for n in range(20)
    ]  # fmt: skip
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet"
    rule = Threshold(5, 9)
    done = filter_file(source, output, rule, client, dropped=tmp_path / "gone.jsonl")
    assert read_rows(output) == [{**rows[n], "score": float(n)} for n in range(5, 10)]
    assert read_rows(tmp_path / "gone.jsonl")[0] == {
        **rows[0], "score": 0.0, "reason": "score 0 is below 5",
    }  # fmt: skip
    assert (done.rows, done.written) == (20, 5)
    with pytest.raises(InvalidRequest, match="name the column of responses"):
        best_of_n_file(source, tmp_path / "best.jsonl", client)


def test_scores_that_are_there_are_used_and_nobody_is_asked(server, tmp_path, capsys):
    scored = [{**row, "reward": [1.0, -1.0, 0.5]} for row in made()]
    source, output = write_rows(tmp_path / "in.jsonl", scored), tmp_path / "out.jsonl"
    options = ["--url", server.url, "--input", source, "--output", output, "--scores", "reward"]
    assert run("best-of-n", *options) == 0
    assert {row["index"] for row in read_rows(output)} == {0}
    # Other thresholds, with the same output.
    assert run("filter", *options, "--min", 0, "--force") == 0
    assert [row["reward"] for row in read_rows(output)] == [[1.0, 0.5]] * 30
    assert [len(row["responses"]) for row in read_rows(output)] == [2] * 30
    assert run("pairs", *options, "--force") == 0
    assert [row["margin"] for row in read_rows(output)] == [2.0] * 30
    assert "reward" not in read_rows(output)[0]
    assert server.calls == 0


def test_a_filter_without_a_rule_scores_for_a_filter_with_one(client, server, tmp_path):
    rows = [*made(), {**made(1)[0], "responses": ["x" * 500, "y" * 10]}]
    source, scored = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "scored.jsonl"
    filter_file(source, scored, Threshold(), client)
    calls = server.calls
    held = Columns(scores="scores")
    done = filter_file(scored, tmp_path / "out.jsonl", RobustOutliers(50), columns=held)
    assert done.figures["dropped for a high score"] == 1
    assert read_rows(tmp_path / "out.jsonl")[-1]["responses"] == ["y" * 10]
    assert server.calls == calls


BAD = [
    "{",
    "[]",
    json.dumps({"id": "no responses", "messages": []}),
    json.dumps({**made()[3], "responses": ["fine", "bad"]}),
    json.dumps({**made()[3], "responses": []}),
    "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
]


def test_rows_that_cannot_be_used_are_kept_with_their_reason(server, tmp_path, capsys):
    server.fault = lambda call: Fault.INVALID_ARGUMENT if b"bad" in call.responses else None
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(made()[0]), *BAD, "", json.dumps(made()[1])]
    source.write_text("\n".join(lines), encoding="utf-8")
    options = ["--url", server.url, "--input", source, "--output", output]
    assert run("best-of-n", *options) == 2
    assert [row["id"] for row in read_rows(output)] == [0, 1]
    rejected = read_rows(tmp_path / "out.jsonl.rejected.jsonl")
    assert [row["place"] for row in rejected] == [f"line {n}" for n in range(2, 8)]
    assert all(row["error"] for row in rejected)
    assert rejected[0]["row"] == {"line": "{\n"}
    assert rejected[3]["row"]["responses"] == ["fine", "bad"]
    assert rejected[3]["error"].startswith("response 1: call ")
    out, err = capsys.readouterr()
    assert "without a score: 6" in out
    assert err.startswith("triward: 6 of 8 rows have no score; the first:\ntriward: line 2: not JS")
    # A later run that rejects nothing leaves no old file behind.
    write_rows(source, made())
    assert run("best-of-n", *options, "--force") == 0
    assert not (tmp_path / "out.jsonl.rejected.jsonl").exists()


def with_images(path):
    """Parquet as Hugging Face datasets write it."""
    text = Value("string")
    features = Features(prompt=text, responses=List(text), pictures=List(Image()), id=Value("int8"))
    held = [{"bytes": png(color), "path": None} for color in ("red", "blue")]
    rows = [
        {"prompt": "q", "responses": ["a", "bb", "ccc"], "pictures": held[:count], "id": count}
        for count in (0, 1, 2)
    ]
    Dataset.from_list(rows, features).to_parquet(path)
    return path, held


SHOWN = Columns(prompt="prompt", responses="responses", images="pictures")


def test_images_in_parquet(server, client, tmp_path):
    media = []
    server.fault = lambda call: media.append(call.media)
    source, held = with_images(tmp_path / "in.parquet")
    filter_file(source, tmp_path / "kept.parquet", Threshold(2), client, columns=SHOWN)
    assert sorted(map(len, media)) == [0, 1, 2]
    assert [each["bytes"] for each in held] == max(media, key=len)
    pairs_file(source, tmp_path / "pairs.parquet", Pairing(), client, columns=SHOWN)
    row = read_rows(tmp_path / "pairs.parquet")[2]
    text = {"type": "text", "text": "q"}
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "image", "text"]
    assert row["prompt"][0]["content"][2] == text
    assert row["images"] == held
    assert "pictures" not in row

    def load(name):
        files, cache = str(tmp_path / name), str(tmp_path / "cache")
        return load_dataset("parquet", data_files=files, split="train", cache_dir=cache)

    kept = load("kept.parquet")
    assert kept.features["pictures"] == List(Image())
    assert kept[2]["scores"] == [2.0, 3.0]
    loaded = load("pairs.parquet").cast_column("images", List(Image()))
    assert loaded[2]["images"][1].size == (4, 3)


def test_json_cannot_hold_bytes_and_says_so_before_anything_is_asked(server, client, tmp_path):
    source, _ = with_images(tmp_path / "in.parquet")
    with pytest.raises(InvalidRequest, match="pictures: JSON cannot hold a column of list"):
        filter_file(source, tmp_path / "out.jsonl", Threshold(), client, columns=SHOWN)
    with pytest.raises(InvalidRequest, match="pictures: JSON cannot hold a column of list"):
        pairs_file(source, tmp_path / "out.jsonl", Pairing(), client, columns=SHOWN)
    assert server.calls == 0


def test_parquet_cannot_hold_mixed_types_and_says_so_before_anything_is_asked(
    server, client, tmp_path
):
    rows = [{**made()[0], "note": 3}, {**made()[1], "note": "three"}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(InvalidRequest, match="note: Parquet cannot hold it"):
        filter_file(source, tmp_path / "out.parquet", Threshold(), client)
    assert server.calls == 0
    # Found in chunks of one row each, too.
    with pytest.raises(InvalidRequest, match="Parquet cannot hold the rows"):
        filter_file(source, tmp_path / "out.parquet", Threshold(), client, chunk_rows=1)
    filter_file(source, tmp_path / "out.jsonl", Threshold(), client)
    assert [row["note"] for row in read_rows(tmp_path / "out.jsonl")] == [3, "three"]


def test_columns_that_only_some_rows_have(client, tmp_path):
    rows = made()
    rows[20]["extra"] = {"a": 1}
    rows[25]["extra"] = {"b": 0.5}
    source = write_rows(tmp_path / "in.jsonl", rows)
    filter_file(source, tmp_path / "out.parquet", Threshold(), client, chunk_rows=4)
    found = read_rows(tmp_path / "out.parquet")
    assert found[20]["extra"] == {"a": 1, "b": None}
    assert found[0]["extra"] is None
    assert [row["id"] for row in found] == list(range(30))


def test_a_folder_of_parquet_files(client, tmp_path):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    write_rows(folder / "a.parquet", made()[:11], row_group_size=4)
    write_rows(folder / "b" / "a.parquet", made()[11:])
    done = best_of_n_file(folder, tmp_path / "out.parquet", client, chunk_rows=5)
    assert [row["id"] for row in read_rows(tmp_path / "out.parquet")] == list(range(30))
    assert done.rows == 30


JOBS = {
    "best-of-n": best_of_n_file,
    "filter": lambda source, output, client, **rest: filter_file(
        source, output, RobustOutliers(1.0), client, dropped=output.with_suffix(".gone.jsonl"),
        **rest,
    ),
    "pairs": lambda source, output, client, **rest: pairs_file(
        source, output, Pairing("all", length_penalty="auto"), client, **rest
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", JOBS)
def test_a_failure_keeps_what_is_finished(server, client, tmp_path, name, suffix):
    source = write_rows(tmp_path / f"in{suffix}", made())
    (tmp_path / "whole").mkdir()
    whole, output = tmp_path / "whole" / f"out{suffix}", tmp_path / f"out{suffix}"
    JOBS[name](source, whole, client, chunk_rows=4, picture=whole.with_suffix(".svg"))
    server.scored.clear()
    server.fault = lambda call: Fault.INTERNAL if b"x" * 23 in call.responses else None
    options = {"chunk_rows": 4, "picture": output.with_suffix(".svg")}
    with pytest.raises(ServerError):
        JOBS[name](source, output, client, **options)
    assert not output.exists()
    finished = {"x" * (n + 3) for n in range(20)}
    assert finished <= set(server.scored)
    server.fault = lambda call: None
    JOBS[name](source, output, client, **options)
    assert all(server.scored[text] == 1 for text in finished if len(text) > 2)
    expected = {path.name: path.read_bytes() for path in whole.parent.iterdir()}
    assert expected == {
        path.name: path.read_bytes()
        for path in tmp_path.iterdir()
        if path.is_file() and path != source
    }
    assert not output.with_name(f"{output.name}.parts").exists()


def test_a_killed_process_is_resumed(server, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", made(200))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run("pairs", "--url", server.url, "--input", source, "--output", whole) == 0
    server.scored.clear()
    server.delay = 0.02
    arguments = ["pairs", "--url", server.url, "--input", source, "--output", output]
    arguments += ["--chunk-rows", 10, "--concurrency", 4]
    running = Command(sys.executable, "-m", "triward", *arguments)
    parts = tmp_path / "out.jsonl.parts"
    limit = time.monotonic() + 120
    while len(list(parts.glob("0*.jsonl"))) < 5:
        assert time.monotonic() < limit, "no chunk was finished"
        time.sleep(0.01)
    running.process.kill()
    running.process.wait()
    finished = 10 * len(list(parts.glob("0*.jsonl")))
    assert 50 <= finished < 200
    assert not output.exists()
    before = dict(server.scored)
    server.delay = 0
    assert run(*arguments) == 0
    texts = ["x" * (n + 3) for n in range(finished)]
    assert all(server.scored[text] == before[text] for text in texts)
    assert output.read_bytes() == whole.read_bytes()
    pictures = [path.with_name(f"{path.name}.svg") for path in (output, whole)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert not parts.exists()


def test_a_job_that_differs_is_refused(server, client, tmp_path, capsys):
    source, output = write_rows(tmp_path / "in.jsonl", made()), tmp_path / "out.jsonl"
    server.fault = lambda call: Fault.INTERNAL
    with pytest.raises(ServerError):
        best_of_n_file(source, output, client)
    (tmp_path / "out.jsonl.parts" / "000000000.jsonl").write_text("{}\n")  # something is finished
    with pytest.raises(JobMismatch, match="begun with chunk_rows = 1000, now it is 9"):
        best_of_n_file(source, output, client, chunk_rows=9)
    with pytest.raises(JobMismatch, match="begun with task = 'BestOfN', now it is 'Pairs'"):
        pairs_file(source, output, Pairing(), client)
    other = RewardClient(server.url, model="other")
    with pytest.raises(JobMismatch, match="begun with model = 'reward', now it is 'other'"):
        best_of_n_file(source, output, other)
    write_rows(source, made()[:-1])
    assert run("best-of-n", "--url", server.url, "--input", source, "--output", output) == 2
    assert "was begun with file 0 in.jsonl = " in capsys.readouterr().err


def test_another_rule_goes_on_with_the_scores_of_the_first(server, client, tmp_path):
    source, output = write_rows(tmp_path / "in.jsonl", made(3)), tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequest, match="there are 9 scores"):
        filter_file(source, output, _by_length(), client)
    calls = server.calls
    assert filter_file(source, output, Threshold(4), client).written == 2
    assert server.calls == calls


def _by_length():
    from triward_tools.selection import LengthConditioned

    return LengthConditioned()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["best-of-n", "--input", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (["best-of-n", "--input", "in.txt"], "in.txt: must end with .jsonl or .parquet"),
        (["best-of-n", "--output", "out.csv"], "out.csv: must end with .jsonl or .parquet"),
        (["best-of-n", "--output", "no/out.jsonl"], "no/out.jsonl: there is no folder no"),
        (["best-of-n", "--output", "in.jsonl"], "in.jsonl: is the input, or another output, too"),
        (["best-of-n", "--picture", "a.gif"], "a.gif: a picture must end with .svg or .png"),
        (["best-of-n", "--scores", "s"], "scores: there is no column 's', there are id, messages"),
        (["filter", "--prompt", "id"], "name the column of messages, or those of prompt and"),
        (["pairs", "--messages", "messages"], "responses: name the column of responses"),
        (["filter", "--min", "2", "--max", "1"], "minimum 2.0 is above maximum 1.0"),
        (["filter", "--min", "2", "--outliers"], "--min and --max go with no other rule"),
        (["filter", "--quantiles", "0.9", "0.1"], "quantiles must be 0 <= low <= high <= 1"),
        (["filter", "--outliers", "0"], "limit must be above 0, got 0.0"),
        (["filter", "--dropped", "out.jsonl"], "out.jsonl: is the input, or another output, too"),
        (["pairs", "--min-margin", "-1"], "margins must be 0 <= min <= max"),
        (["pairs", "--max-length-ratio", "0.5"], "max_length_ratio must be at least 1"),
        (["pairs", "--length-penalty", "nan"], "length_penalty must be a number or 'auto'"),
    ],
)
def test_arguments_that_cannot_be_used(server, tmp_path, monkeypatch, capsys, arguments, error):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", made())
    (tmp_path / "in.txt").touch()
    given = ["--url", server.url]
    given += [] if "--input" in arguments else ["--input", "in.jsonl"]
    given += [] if "--output" in arguments else ["--output", "out.jsonl"]
    assert run(*arguments, *given) == 2
    assert capsys.readouterr().err.startswith(f"triward: {error}")
    assert server.calls == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "in.txt"]


@pytest.mark.parametrize(
    "arguments",
    [["filter", "--side", "left"], ["filter", "--side", "low", "--min", "2"],
     ["filter", "--bins", "5", "--outliers"], ["pairs", "--strategy", "best"],
     ["pairs", "--max-pairs", "0"],
     ["pairs", "--length-penalty", "much"], ["best-of-n"]],
)  # fmt: skip
def test_usage(arguments, capsys):
    given = ["--input", "in.jsonl", "--output", "out.jsonl"] if len(arguments) > 1 else []
    with pytest.raises(SystemExit) as caught:
        run(*arguments, *given)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_penalty_that_is_no_number_is_a_sentence(capsys):
    with pytest.raises(SystemExit):
        run("pairs", "--input", "in.jsonl", "--output", "out.jsonl", "--length-penalty", "much")
    assert "--length-penalty: must be a number or auto, got 'much'" in capsys.readouterr().err


def test_an_empty_table(client, tmp_path):
    schema = pa.schema({"prompt": pa.string(), "responses": pa.list_(pa.string())})
    pq.write_table(schema.empty_table(), tmp_path / "in.parquet")
    for name, job in JOBS.items():
        done = job(
            tmp_path / "in.parquet", tmp_path / f"{name}.parquet", client, columns=TABLE,
            picture=tmp_path / f"{name}.svg",
        )  # fmt: skip
        assert (done.rows, done.written, done.failed) == (0, 0, 0)
        assert read_rows(tmp_path / f"{name}.parquet") == []


@pytest.mark.parametrize(
    "values",
    [[0.1] * 3, [1.0, 1.0000000000000002, 1.0], [1e308, -1e308], [0.0], [-5e15, -5e15 + 1]],
)
def test_a_picture_of_scores_that_differ_by_rounding_or_by_all_that_a_float_holds(values):
    edges = _edges(np.array(values))
    assert len(edges) == 41
    assert np.isfinite(edges).all()
    assert (np.diff(edges) > 1e-12 * max(np.abs(values))).all()
    assert edges[0] <= min(values)
    assert max(values) <= edges[-1]


def test_files_of_other_jobs_are_left_alone(server, client, tmp_path):
    """Two outputs differ by their suffix, and a file of somebody else's looks like one of ours."""
    server.fault = lambda call: Fault.INVALID_ARGUMENT if b"bad" in call.responses else None
    bad = write_rows(tmp_path / "bad.jsonl", [made()[0], {**made()[1], "responses": ["bad"]}])
    good = write_rows(tmp_path / "good.jsonl", made(2))
    foreign = tmp_path / "out.rejected.jsonl"
    foreign.write_text("mine")
    assert best_of_n_file(bad, tmp_path / "out.jsonl", client).failed == 1
    assert best_of_n_file(good, tmp_path / "out.parquet", client).failed == 0
    assert len(read_rows(tmp_path / "out.jsonl.rejected.jsonl")) == 1
    assert not (tmp_path / "out.parquet.rejected.jsonl").exists()
    assert foreign.read_text() == "mine"


def test_what_was_rejected_before_stays_until_there_is_a_new_output(server, client, tmp_path):
    server.fault = lambda call: Fault.INVALID_ARGUMENT if b"bad" in call.responses else None
    output, rejected = tmp_path / "out.jsonl", tmp_path / "out.jsonl.rejected.jsonl"
    best_of_n_file(
        write_rows(tmp_path / "in.jsonl", [{**made()[0], "responses": ["bad"]}]), output, client
    )
    source = write_rows(tmp_path / "in.jsonl", made(3))
    server.fault = lambda call: Fault.INTERNAL
    with pytest.raises(ServerError):
        best_of_n_file(source, output, client)
    assert rejected.exists()
    server.fault = lambda call: None
    best_of_n_file(source, output, client)
    assert not rejected.exists()


def test_what_is_not_yet_an_output_lies_in_the_parts(client, tmp_path, monkeypatch):
    """So that nothing is left of a process that was killed while it wrote."""
    source, there = write_rows(tmp_path / "in.jsonl", made(3)), []

    def seen(*arguments):
        there.extend(path.name for path in tmp_path.iterdir())
        raise OSError("the disk is full")

    monkeypatch.setattr(job_module.Job, "_made", seen)
    with pytest.raises(OSError, match="disk"):
        best_of_n_file(source, tmp_path / "out.jsonl", client)
    assert sorted(there) == ["in.jsonl", "out.jsonl.parts"]


def test_no_server_at_all_is_said_at_once(tmp_path):
    source, start = write_rows(tmp_path / "in.jsonl", made(1)), time.monotonic()
    client = RewardClient("127.0.0.1:1", timeout=20, max_attempts=1)
    with (
        client,
        pytest.raises(ServerUnavailable, match=r"nothing listens on 127\.0\.0\.1:1; "),
    ):
        best_of_n_file(source, tmp_path / "out.jsonl", client)
    assert time.monotonic() - start < 15
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("column", ["response", "score", "index", "scores"])
def test_columns_of_the_input_are_not_replaced(server, client, tmp_path, column):
    taken = write_rows(tmp_path / "in.jsonl", [{**row, column: 7} for row in made(3)])
    with pytest.raises(InvalidRequest, match=f"{column}: the input has this column, and best-of"):
        best_of_n_file(taken, tmp_path / "out.jsonl", client)
    assert server.calls == 0
    # Where only a later row of JSONL has it, that row is rejected.
    later = write_rows(tmp_path / "later.jsonl", [made(2)[0], {**made(2)[1], column: 7}])
    done = best_of_n_file(later, tmp_path / "out.jsonl", client)
    assert (done.written, done.failed) == (1, 1)


def test_a_filter_replaces_no_column_but_the_one_that_is_named(server, client, tmp_path):
    rows = [{**row, "scores": [1.0, 2.0, 3.0], "reasons": "mine"} for row in made(3)]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequest, match="scores: the input has this column, and filter"):
        filter_file(source, output, Threshold(), client)
    held = Columns(scores="scores")
    with pytest.raises(InvalidRequest, match="reasons: the input has this column, and filter"):
        filter_file(source, output, Threshold(), columns=held, dropped=tmp_path / "gone.jsonl")
    filter_file(source, output, Threshold(2), columns=held)
    kept = [(row["scores"], row["reasons"]) for row in read_rows(output)]
    assert kept == [([2.0, 3.0], "mine")] * 3
    assert server.calls == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pairs_of_text_have_no_columns_of_images(client, tmp_path, suffix):
    rows = [{**row, "images": ["a.png"], "image": "b.png"} for row in made(3)]
    source = write_rows(tmp_path / f"in{suffix}", rows)
    pairs_file(source, tmp_path / f"out{suffix}", Pairing(), client)
    assert [{"image", "images"} & row.keys() for row in read_rows(tmp_path / f"out{suffix}")] == [
        set()
    ] * 3


def test_scores_that_no_float_holds_are_their_rows_error(tmp_path):
    rows = [{**row, "scores": [10**400, 1.0, 1e39]} for row in made(1)]
    source = write_rows(tmp_path / "in.jsonl", [*rows, {**made(1)[0], "scores": [1.0, 2, 3e38]}])
    done = best_of_n_file(source, tmp_path / "out.jsonl", columns=Columns(scores="scores"))
    assert (done.written, done.failed) == (1, 1)
    assert "scores[0]: must be a finite number, got 1000" in done.first_error


@pytest.mark.parametrize(
    ("note", "error"),
    [({}, "note: Parquet cannot hold {}"), ([{"a": {}}], "note: Parquet cannot hold {}"),
     ("\ud800", "note: Parquet cannot hold it"), (10**400, "note: Parquet cannot hold it")],
)  # fmt: skip
def test_what_parquet_cannot_hold(server, client, tmp_path, note, error):
    source = write_rows(tmp_path / "in.jsonl", [{**row, "note": note} for row in made(2)])
    with pytest.raises(InvalidRequest, match=error):
        filter_file(source, tmp_path / "out.parquet", Threshold(), client)
    assert server.calls == 0


def test_integers_that_a_column_of_floats_cannot_hold(client, tmp_path):
    rows = [{**row, "note": note} for row, note in zip(made(2), (2**60 + 1, 0.5), strict=True)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(InvalidRequest, match="note: Parquet cannot hold it"):
        filter_file(source, tmp_path / "out.parquet", Threshold(), client, chunk_rows=1)


def test_a_damaged_file_is_named(client, tmp_path):
    source = write_rows(tmp_path / "in.parquet", made(300), compression="gzip")
    content = bytearray(source.read_bytes())
    content[50:90] = b"?" * 40
    source.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"in\.parquet: "):
        best_of_n_file(source, tmp_path / "out.jsonl", client)


def test_lines_that_are_no_utf_8_and_a_byte_order_mark(client, tmp_path):
    source = tmp_path / "in.jsonl"
    text = json.dumps(made(1)[0]).encode()
    source.write_bytes(b"\xef\xbb\xbf" + text + b"\n" + text.replace(b"q0", b"\xff") + b"\n")
    done = best_of_n_file(source, tmp_path / "out.parquet", client)
    assert (done.written, done.failed, done.first_error) == (1, 1, "line 2: not UTF-8")


def test_a_column_that_the_first_line_lacks(tmp_path):
    rows = [made(3)[0], *({**row, "reward": [1.0, 2.0, 3.0]} for row in made(3)[1:])]
    source, held = write_rows(tmp_path / "in.jsonl", rows), Columns(scores="reward")
    done = best_of_n_file(source, tmp_path / "out.jsonl", columns=held)
    assert (done.written, done.failed) == (2, 1)


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_not_json_lines(client, tmp_path, indent):
    source = tmp_path / "in.json"
    source.write_text(json.dumps(made(3), indent=indent), encoding="utf-8")
    with pytest.raises(
        InvalidRequest, match=r"in\.json: is an array, needs an object in each line"
    ):
        best_of_n_file(source, tmp_path / "out.jsonl", client)


def test_outputs_that_cannot_be_written_are_found_before_anything_is_asked(
    server, client, tmp_path, monkeypatch
):
    folder = tmp_path / "in"
    folder.mkdir()
    source, output = write_rows(folder / "in.parquet", made(3)), tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequest, match="lies in the input"):
        filter_file(folder, output, Threshold(), client, dropped=folder / "gone.parquet")
    for name in ("out.jsonl", "gone.jsonl", "a.svg"):
        (tmp_path / name).mkdir()
        with pytest.raises(InvalidRequest, match=f"{name}: is a folder"):
            filter_file(source, output, Threshold(), client,
                        dropped=tmp_path / "gone.jsonl", picture=tmp_path / "a.svg")  # fmt: skip
        (tmp_path / name).rmdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InvalidRequest, match=r"out\.jsonl: the folder .* cannot be written to"):
        filter_file(source, output, Threshold(), client)
    assert server.calls == 0


def test_json_has_no_nan(tmp_path):
    rows = [{**row, "note": float("nan"), "scores": [1.0, 2.0, 3.0]} for row in made(2)]
    source = write_rows(tmp_path / "in.parquet", rows)
    with pytest.raises(InvalidRequest, match=r"note: .*; write Parquet"):
        best_of_n_file(source, tmp_path / "out.jsonl", columns=Columns(scores="scores"))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_filter_without_a_limit_tells_of_none(client, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", made(3))
    done = filter_file(source, tmp_path / "out.jsonl", Threshold(), client)
    assert done.figures["limits"] == {}
    assert done.figures["responses kept"] == 9


def test_a_server_that_is_away(tmp_path, capsys):
    source = write_rows(tmp_path / "in.jsonl", made(1))
    # RowScorer waits for servers for minutes; a timeout that is over ends the job at once.
    options = ["--url", "127.0.0.1:1", "--timeout", "0.001"]
    code = run("best-of-n", *options, "--input", source, "--output", tmp_path / "out.jsonl")
    assert code in (3, 4)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", JOBS)
def test_an_output_that_is_there_is_not_replaced(server, client, tmp_path, name):
    source, output = write_rows(tmp_path / "in.jsonl", made()), tmp_path / "out.jsonl"
    options = {"picture": tmp_path / "out.svg"}
    JOBS[name](source, output, client, **options)
    calls, there = server.calls, {path: path.read_bytes() for path in tmp_path.iterdir()}
    for gone in (None, output):  # what else is there counts, too
        if gone is not None:
            gone.unlink()
            there.pop(gone)
        with pytest.raises(InvalidRequest, match=r"is there already; --force \(force=True\) "):
            JOBS[name](source, output, client, **options)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == there
    assert server.calls == calls
    JOBS[name](source, output, client, **options, force=True)
    assert output.exists()


def test_a_job_that_may_replace_goes_on_without_being_told_again(server, client, tmp_path):
    source, output = write_rows(tmp_path / "in.jsonl", made()), tmp_path / "out.jsonl"
    best_of_n_file(source, output, client)
    server.fault = lambda call: Fault.INTERNAL
    with pytest.raises(ServerError):
        best_of_n_file(source, output, client, force=True)
    server.fault = lambda call: None
    assert best_of_n_file(source, output, client).rows == 30


def test_the_flag(server, tmp_path, capsys):
    source, output = write_rows(tmp_path / "in.jsonl", made(2)), tmp_path / "out.jsonl"
    command = ["best-of-n", "--url", server.url, "--input", source, "--output", output]
    assert [run(*command), run(*command), run(*command, "--force")] == [0, 2, 0]
    assert "--force" in capsys.readouterr().err
