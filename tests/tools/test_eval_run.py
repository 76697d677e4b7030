"""Scoring a benchmark's pairs into a folder: order, problems, failures, and going on."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import triward.cli
from tests.benchmarkdata import BENCHMARKS, png, write
from tests.fakeserver import Fault
from tests.rowfiles import write_rows
from triward import InvalidRequest, RewardClient, ServerError, ServerUnavailable
from triward_tools.evaluation import run
from triward_tools.evaluation.asking import results_of
from triward_tools.evaluation.ledger import Ledger
from triward_tools.evaluation.results import LabelledPair, Problem, Result
from triward_tools.evaluation.run import evaluate
from triward_tools.jobs import JobMismatch

# Of RewardBench.
ROW = {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 1}


class Report:
    """Stands for the report, which has tests of its own."""

    def __init__(self, results, problems, pair_of):
        self.results, self.problems, self.pair_of = results, problems, pair_of
        self.facts = SimpleNamespace(pairs=len(results), problems=problems)

    def lines(self):
        return [f"{len(self.results)} scored", f"{len(self.problems)} not"]


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """How the report was asked for, each time."""
    made = []

    def write_report(folder, benchmark, results, problems, pair_of, *, model, seed):
        made.append({"folder": folder, "benchmark": benchmark, "model": model, "seed": seed})
        counts = {"scored": len(results), "problems": len(problems)}
        (folder / "report.json").write_text(json.dumps(counts))
        return Report(results, problems, pair_of)

    monkeypatch.setattr(run, "write_report", write_report)
    return made


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("triward.retries._PAUSE", 0.01)


@pytest.fixture
def client(server):
    with RewardClient(server.url, timeout=20, max_attempts=1) as client:
        yield client


@pytest.fixture
def data(tmp_path):
    return write("vl-rewardbench", tmp_path / "data", ".jsonl")


def lines(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def length(text):
    """A text's score here, or the list of several ones'."""
    return list(map(length, text)) if isinstance(text, tuple) else float(len(text.encode()))


def content(output):
    return (output / "results.jsonl").read_bytes()


@pytest.fixture
def whole(client, data, tmp_path):
    """results.jsonl of a run that nothing interrupted."""
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "whole")
    return content(tmp_path / "whole")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_line_for_each_row_in_order(benchmark, client, tmp_path, reports):
    data, output = write(benchmark, tmp_path / "data"), tmp_path / "out"
    report = evaluate(client, benchmark, data.path, output, concurrency=3, seed=5)
    found = lines(output)
    assert [line["index"] for line in found] == list(range(16))
    for pair in data.pairs:
        chosen, rejected = map(length, (pair.chosen, pair.rejected))
        low, high = np.min(chosen), np.max(rejected)
        assert found[pair.index] == {
            "index": pair.index,
            "id": pair.id,
            "subset": pair.subset,
            "chosen": chosen,
            "rejected": rejected,
            "margin": low - high,
            "correct": low > high,
        }
    for index, said in data.problems.items():
        assert found[index].keys() == {"index", "error"}
        assert found[index]["error"]["place"] == f"{data.path.name}: row {index + 1}"
        assert said in found[index]["error"]["reason"]
    assert reports == [{"folder": output, "benchmark": benchmark, "model": "reward", "seed": 5}]
    assert [result.index for result in report.results] == [pair.index for pair in data.pairs]
    assert [problem.index for problem in report.problems] == list(data.problems)
    assert report.results[2].correct is (report.results[2].margin > 0) is False
    asked = [data.pairs[0].index, data.pairs[-1].index, next(iter(data.problems))]
    assert report.pair_of(asked) == {pair.index: pair for pair in (data.pairs[0], data.pairs[-1])}


def test_a_pair_is_one_request_and_neighbours_share_one(server, client, tmp_path):
    media = []
    server.fault = lambda call: media.append((len(call.responses), call.media))
    data = write("vl-rewardbench", tmp_path / "vl")
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    assert sorted(media) == sorted((2, [png(number)]) for number in range(12))
    calls = server.calls
    rows = [
        {"prompt": "q", "chosen": f"{n}", "rejected": f"{n} ", "subset": "hep-go", "id": n}
        for n in range(20)
    ]
    path = write_rows(tmp_path / "same.json", rows)
    evaluate(client, "rewardbench", path, tmp_path / "same")
    assert server.calls - calls == 2  # 40 responses, at most 32 in a request
    assert [line["id"] for line in lines(tmp_path / "same")] == [f"{n}" for n in range(20)]


def fail_at(server, pair, fault):
    """Answer the pair with a fault; return how to stop that."""
    text = pair.chosen.encode()
    server.fault = lambda call: fault if text in call.responses else None
    return lambda: setattr(server, "fault", lambda call: None)


@pytest.mark.parametrize("fault", [Fault.INTERNAL, Fault.NAN])
def test_a_failure_keeps_what_is_finished_and_the_run_goes_on(
    fault, server, client, data, tmp_path, whole
):
    server.scored.clear()
    output = tmp_path / "out"
    mend = fail_at(server, data.pairs[7], fault)
    with pytest.raises(ServerError):
        evaluate(client, "vl-rewardbench", data.path, output, concurrency=2)
    kept = content(output)
    assert whole.startswith(kept)
    assert len(lines(output)) == data.pairs[6].index + 1
    assert not (output / "report.json").exists()
    mend()
    evaluate(client, "vl-rewardbench", data.path, output)
    assert content(output) == whole
    for pair in data.pairs[:7]:
        assert server.scored[pair.chosen] == 1, "a finished row was sent again"


def test_what_a_kill_left_of_a_line_is_done_again(server, client, data, tmp_path, whole):
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    path = tmp_path / "out" / "results.jsonl"
    start = whole[:-1].rindex(b"\n") + 1  # of the last line
    for end in (0, start, start + 1, len(whole) - 20, len(whole) - 1):
        path.write_bytes(whole[:end])
        server.scored.clear()
        evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
        assert path.read_bytes() == whole, end
        assert server.scored[data.pairs[-1].chosen] == 1
        assert server.scored[data.pairs[0].chosen] == (end == 0)


@pytest.mark.parametrize("left", [bytes(40) + b"\n", b'{"index": 2\n\0\n\n', bytes(40)])
def test_what_a_power_cut_left_of_lines_is_done_again(left, client, data, tmp_path, whole):
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    path = tmp_path / "out" / "results.jsonl"
    kept = b"".join(whole.splitlines(keepends=True)[:9])
    path.write_bytes(kept + left)
    with Ledger(tmp_path / "out") as ledger:
        assert len(ledger.entries) == 9
    assert content(tmp_path / "out") == kept
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_a_damaged_line_in_the_middle_is_an_error(client, data, tmp_path, whole):
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    found = whole.splitlines(keepends=True)
    spoilt = b"".join([*found[:4], bytes(40) + b"\n", *found[5:]])
    (tmp_path / "out" / "results.jsonl").write_bytes(spoilt)
    with pytest.raises(JobMismatch, match=r"line 5 is no result of row 4; remove the folder, or"):
        evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    assert content(tmp_path / "out") == spoilt


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: b"{}\n" + text,
        lambda text: text.partition(b"\n")[2],
        lambda text: b"\n" + text,
        lambda text: text.replace(b'"subset"', b'"group"', 1),
        lambda text: b"[1]\n" + text,
    ],
)
def test_results_that_are_not_this_runs(spoil, client, data, tmp_path, whole):
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    path = tmp_path / "out" / "results.jsonl"
    path.write_bytes(spoil(whole))
    with pytest.raises(JobMismatch, match=r"results\.jsonl: line 1 is no result of row 0"):
        evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    assert path.read_bytes() == spoil(whole)


def test_another_run_is_refused(server, client, data, tmp_path, whole):
    output = tmp_path / "whole"

    def refused(said, *, benchmark="vl-rewardbench", path=data.path, client=client):
        with pytest.raises(JobMismatch, match=said):
            evaluate(client, benchmark, path, output)
        assert content(output) == whole

    with RewardClient(server.url, model="other") as other:
        said = (
            "was begun with model = 'reward', now it is 'other'; remove it, or name another output"
        )
        refused(said, client=other)
    same = write("multimodal-rewardbench", tmp_path / "other")
    refused("was begun with benchmark = 'vl-rewardbench', now it is 'multi", path=same.path,
            benchmark="multimodal-rewardbench")  # fmt: skip
    shutil.copy(data.path, data.path.with_name("test-00001.jsonl"))
    refused(r"was begun with file test-00001\.jsonl = None, now", path=data.path.parent)
    text = data.path.read_text()
    data.path.write_text(text.replace("picture 3", "picture 4"))
    refused(r"was begun with file test-00000-of-00001\.jsonl = '\d+ bytes, sha256 ")
    data.path.write_text(text)
    # Servers and concurrency may be others each time.
    with RewardClient([server.url, "127.0.0.1:1"], timeout=5) as other:
        evaluate(other, "vl-rewardbench", data.path, output, concurrency=1)


def test_a_mistake_blocks_nothing_while_nothing_is_finished(server, client, data, tmp_path, whole):
    output = tmp_path / "out"
    server.fault = lambda call: Fault.INTERNAL
    with RewardClient(server.url, model="other") as other, pytest.raises(ServerError):
        evaluate(other, "vl-rewardbench", data.path, output)
    assert content(output) == b""
    server.fault = lambda call: None
    (output / ".manifest.json.1.tmp").write_text("of a job that was killed")
    evaluate(client, "vl-rewardbench", data.path, output)
    assert content(output) == whole
    manifest = (output / "manifest.json").read_text()
    assert json.loads(manifest)["model"] == "reward"
    assert manifest == (tmp_path / "whole" / "manifest.json").read_text()


def test_a_manifest_of_something_else_is_left_alone(client, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "a page"}')
    with pytest.raises(JobMismatch, match="was begun with name = 'a page', now it is None"):
        evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == '{"name": "a page"}'


def test_a_folder_of_something_else_is_left_alone(client, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(JobMismatch, match=r"is not empty, and has no manifest\.json"):
        evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("mine")
    with pytest.raises(JobMismatch, match="is no manifest"):
        evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"thesis.txt", "manifest.json"}


def test_data_without_a_row(client, tmp_path):
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected", "subset")])
    pq.write_table(schema.append(pa.field("id", pa.int64())).empty_table(), tmp_path / "a.parquet")
    with pytest.raises(InvalidRequest, match="holds no row"):
        evaluate(client, "rewardbench", tmp_path / "a.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_read_leave_no_folder(client, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["{}"])
    with pytest.raises(InvalidRequest, match="has no column"):
        evaluate(client, "rewardbench", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_lies_apart_from_the_data(client, data):
    with pytest.raises(InvalidRequest, match="lies in the input"):
        evaluate(client, "vl-rewardbench", data.path.parent, data.path.parent / "out")
    # Beside a file it may lie.
    evaluate(client, "vl-rewardbench", data.path, data.path.parent / "out")


@pytest.mark.parametrize("way", ["dots", "link to the data", "link to the output"])
def test_no_way_around_leads_the_output_into_the_data(way, client, data, tmp_path):
    folder = data.path.parent
    source, output = folder, folder / "out"
    if way == "dots":
        source = tmp_path / "data" / ".." / "data"
    elif way == "link to the data":
        source = tmp_path / "link"
        source.symlink_to(folder)
    else:
        (tmp_path / "link").symlink_to(folder)
        output = tmp_path / "link" / "out"
    with pytest.raises(InvalidRequest, match="lies in the input"):
        evaluate(client, "vl-rewardbench", source, output)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_output_beside_a_file_is_never_read_as_data(suffix, client, tmp_path):
    path = write("rewardbench", tmp_path / "data", suffix).path
    path = path.rename(path.with_name(f"rows{suffix}"))
    evaluate(client, "rewardbench", path, path.parent / "out")
    with pytest.raises(InvalidRequest, match=r"out/manifest\.json"):
        evaluate(client, "rewardbench", path.parent, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_data_behind_links_are_read_by_their_own_names(client, tmp_path, data, whole):
    blob = data.path.rename(tmp_path / "0f3a")  # as in the cache of a hub
    data.path.symlink_to(blob)
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_a_server_that_is_away_for_a_while_is_waited_for(server, client, data, tmp_path, whole):
    begun = server.calls
    # Whichever are asked at once, some of each pass find nobody, and the next pass goes on.
    server.fault = lambda call: Fault.UNAVAILABLE if (call.number - begun) % 7 in (3, 4) else None
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out", concurrency=3)
    assert content(tmp_path / "out") == whole


def test_a_server_that_starts_again_in_the_middle_is_waited_for(
    server, client, data, tmp_path, whole
):
    begun = server.calls

    def fault(call):
        server.ready = not 4 <= call.number - begun < 20
        return None if server.ready else Fault.UNAVAILABLE

    server.fault = fault
    evaluate(client, "vl-rewardbench", data.path, tmp_path / "out", concurrency=1)
    assert content(tmp_path / "out") == whole


def test_patience_ends(server, client, data, tmp_path, whole):
    texts = [pair.chosen.encode() for pair in data.pairs[5:]]
    server.fault = lambda call: (
        Fault.UNAVAILABLE if any(text in call.responses for text in texts) else None
    )
    calls = server.calls
    with pytest.raises(ServerUnavailable):
        evaluate(client, "vl-rewardbench", data.path, tmp_path / "out", patience=0.2)
    assert server.calls - calls > 12, "it was not asked again"
    assert len(lines(tmp_path / "out")) == data.pairs[4].index + 1
    assert whole.startswith(content(tmp_path / "out"))


def test_nobody_at_the_address_is_not_waited_for(server, client, data, tmp_path):
    server.ready, server.fault = False, lambda call: Fault.UNAVAILABLE
    with pytest.raises(ServerUnavailable):
        evaluate(client, "vl-rewardbench", data.path, tmp_path / "out", patience=1e6)
    assert content(tmp_path / "out") == b""


def pair_of(index, chosen, rejected="r", image=None):
    content = [{"type": "text", "text": f"{index}"}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    prompt = [{"role": "user", "content": content}]
    return f"f: row {index}", LabelledPair(index, f"{index}", "s", prompt, chosen, rejected)


def test_a_pair_that_is_refused_is_a_problem(server, client, tmp_path):
    server.fault = lambda call: (
        Fault.INVALID_ARGUMENT if any(b"bad" in text for text in call.responses) else None
    )
    rows = [
        pair_of(0, "good"),
        pair_of(1, "bad"),
        pair_of(2, "good", "bad"),
        pair_of(3, "bad", "bad too"),
        pair_of(4, "good", image=tmp_path / "gone.png"),
        pair_of(5, "half \ud800"),
        pair_of(6, "good"),
    ]
    with closing(results_of(client, rows)) as found:
        first, chosen, rejected, both, image, half, last = found
    assert (first, last) == (Result(0, "0", "s", 4, 1), Result(6, "6", "s", 4, 1))
    problems = [chosen, rejected, both, image, half]
    assert [type(row) for row in problems] == [Problem] * 5
    assert [(row.index, row.place) for row in problems] == [(n, f"f: row {n}") for n in range(1, 6)]
    assert chosen.reason.startswith("the chosen response: call ")
    assert rejected.reason.startswith("the rejected response: call ")
    assert "the chosen response: call " in both.reason
    assert "; the rejected response: call " in both.reason
    assert image.reason.startswith("messages[0].content[0]: cannot read ")
    assert half.reason.startswith("the chosen response: ")
    assert "half of a character" in half.reason


def test_problems_only_are_wrong_input_for_the_command(server, tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [{**ROW, "subset": name} for name in "xyz"])
    code = command(server, path, tmp_path / "out", "--no-progress", benchmark="rewardbench")
    out, err = capsys.readouterr()
    assert (code, out) == (2, "0 scored\n3 not\n")
    assert err.startswith("triward: 3 of 3 rows have no scores; the first: a.jsonl: row 1: subset")


def test_problems_only(server, client, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{**ROW, "subset": name} for name in "xyz"])
    report = evaluate(client, "rewardbench", path, tmp_path / "out")
    assert (len(report.results), len(report.problems), server.calls) == (0, 3, 0)


def test_rows_are_taken_as_earlier_ones_finish(client):
    taken = []

    def rows():
        for index in range(1000):
            taken.append(index)
            yield pair_of(index, "c")

    with closing(results_of(client, rows(), concurrency=2)) as found:
        next(found)
        assert len(taken) < 20


def command(server, data, output, *options, benchmark="vl-rewardbench"):
    return triward.cli.main(
        [
            "eval", benchmark, "--data", str(data), "--output", str(output),
            "--url", server.url, *options,
        ]
    )  # fmt: skip


def test_the_command(server, data, tmp_path, capsys, reports):
    assert command(server, data.path, tmp_path / "out", "--seed", "3") == 0
    out, err = capsys.readouterr()
    assert out == "12 scored\n4 not\n"
    assert "16/16" in err
    said = err.splitlines()[-1]
    assert said.startswith("triward: 4 of 16 rows have no scores; the first: test-00000-of-00001")
    assert "jsonl: row 2: human_ranking: must be [0, 1] or [1, 0], got [0, 0]" in said
    assert [report["seed"] for report in reports] == [3]


def test_a_finished_folder_needs_no_server(server, data, tmp_path, capsys, reports):
    command(server, data.path, tmp_path / "out")
    before = content(tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    calls, server.ready = server.calls, False
    server.fault = lambda call: Fault.INTERNAL
    assert command(server, data.path, tmp_path / "out", "--json", "--no-progress") == 0
    assert (server.calls, content(tmp_path / "out")) == (calls, before)
    assert len(reports) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"scored": 12, "problems": 4}


def test_the_bar_begins_at_what_is_done(server, data, tmp_path, capsys):
    command(server, data.path, tmp_path / "out")
    path = tmp_path / "out" / "results.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
    capsys.readouterr()
    assert command(server, data.path, tmp_path / "out") == 0
    bars = capsys.readouterr().err.split("\r")
    assert " 7/16 " in next(bar for bar in bars if bar.strip())
    assert " 16/16 " in bars[-1]
    shutil.rmtree(tmp_path / "out")
    assert command(server, data.path, tmp_path / "out", "--no-progress") == 0
    assert "/16" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "code"), [(Fault.INTERNAL, 5), (Fault.NAN, 5), (Fault.WRONG_COUNT, 5)]
)
def test_a_failure_is_the_commands(fault, code, server, data, tmp_path, capsys):
    server.fault = lambda call: fault
    assert command(server, data.path, tmp_path / "out", "--no-progress") == code
    said = capsys.readouterr().err
    assert said.startswith("triward: ")
    assert "conversations[" not in said


def test_nobody_at_the_address_is_the_commands(server, data, tmp_path, capsys):
    server.ready, server.fault = False, lambda call: Fault.UNAVAILABLE
    assert command(server, data.path, tmp_path / "out", "--no-progress") == 3
    assert capsys.readouterr().err.startswith(f"triward: {server.url}: ")


def test_a_deadline_is_the_commands(server, data, tmp_path, capsys):
    server.delay = 1
    options = ("--no-progress", "--timeout", "0.2")
    assert command(server, data.path, tmp_path / "out", *options) == 4


def test_wrong_data_are_the_callers(server, data, tmp_path, capsys):
    gone = tmp_path / "gone.parquet"
    assert command(server, gone, tmp_path / "out") == 2
    assert capsys.readouterr().err == f"triward: {gone}: there is no such file or folder\n"
    assert command(server, data.path, tmp_path / "out", benchmark="rewardbench") == 2
    assert "has no column 'prompt'" in capsys.readouterr().err
    assert command(server, data.path, tmp_path / "out") == 0
    assert command(server, data.path, tmp_path / "out", "--model", "x") == 2
    assert "was begun with model = 'reward', now it is 'x'" in capsys.readouterr().err
    assert command(server, data.path, data.path) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rewardbench"],
        ["rewardbench", "--data", "d"],
        ["rewardbench-3", "--data", "d", "--output", "o"],
        ["rewardbench", "--data", "d", "--output", "o", "--concurrency", "0"],
        ["rewardbench", "--data", "d", "--output", "o", "--seed", "-1"],
        ["rewardbench", "--data", "d", "--output", "o", "--url", "http://host:1"],
    ],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        triward.cli.main(["eval", *arguments])
    assert caught.value.code == 2
    assert "usage: triward eval" in capsys.readouterr().err


def test_the_ledger_is_on_disk_line_by_line(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.append(Result(0, "a", "s", 1.5, 0.25))
        assert len(lines(tmp_path)) == 1
        ledger.append(Problem(1, "f: row 2", "no\ud800"))
        assert len(lines(tmp_path)) == 2
    with Ledger(tmp_path) as again:
        assert again.entries == [Result(0, "a", "s", 1.5, 0.25), Problem(1, "f: row 2", "no\ud800")]


def test_a_full_disk_is_named(tmp_path):
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        Ledger(tmp_path) as ledger,
    ):
        ledger._file.close()
        ledger._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the ledger closes it
        ledger.append(Result(0, "a", "s", 1.5, 0.25))
    assert caught.value.filename == str(tmp_path / "results.jsonl")
