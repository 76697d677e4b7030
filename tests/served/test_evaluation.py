"""`triward eval` against the real server: published files in, scores and a report out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarkdata import BENCHMARKS, Data, write
from tests.commands import BIN, Command
from tests.conftest import Served
from triward import RewardClient
from triward_tools.evaluation.results import GroupResult

Run = Callable[..., Command]

# Each benchmark in the form in which it is published.
SUFFIX = {
    "rewardbench": ".parquet",
    "vl-rewardbench": ".parquet",
    "multimodal-rewardbench": ".json",
    "rewardbench-2": ".parquet",
}
PAIRS = 24


@pytest.fixture(scope="module")
def model(served: Callable[..., Served]) -> Served:
    """One whose scores do not depend on company, which a run that goes on has another of."""
    return served("exact", "--deterministic")


@pytest.fixture(scope="module")
def client(model: Served) -> RewardClient:
    return model.client


@pytest.fixture
def evaluate(command: Callable[..., Command], model: Served) -> Run:
    """Starts the real command."""

    def run(
        benchmark: str, data: Path, output: Path, *options: object,
        url: str = model.server.endpoints.grpc, name: str = model.names.ensemble,
    ) -> Command:  # fmt: skip
        return command(
            BIN / "triward", "eval", benchmark, "--data", data, "--output", output,
            "--url", url, "--model", name, "--timeout=120", "--no-progress", *options,
        )  # fmt: skip

    return run


def lines(output: Path) -> list[bytes]:
    try:
        return (output / "results.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []


def kill_at(run: Command, output: Path, count: int) -> None:
    """End the command without a warning once so many rows are finished."""
    while len(lines(output)) < count:
        assert run.process.poll() is None, f"it ended before: {run.wait()} {run.output}"
        time.sleep(0.001)
    run.process.kill()
    run.process.wait()


def check_scores(client: RewardClient, data: Data, output: Path) -> None:
    """Every row is there: with the scores of its conversations, or with its problem."""
    rows = [json.loads(line) for line in lines(output)]
    assert [row["index"] for row in rows] == list(range(len(data.pairs) + len(data.problems)))
    for pair in data.pairs:
        scores = [
            client.score([*pair.prompt, {"role": "assistant", "content": text}])
            for text in pair.responses.values()
        ]
        row, result = rows[pair.index], pair.result(scores)
        assert (row["id"], row["subset"]) == (pair.id, pair.subset)
        if isinstance(result, GroupResult):
            assert row["chosen"] + row["rejected"] == scores
        else:
            assert [row["chosen"], row["rejected"]] == scores
        assert (row["margin"], row["correct"]) == (result.margin, result.correct)
    for index, said in data.problems.items():
        assert said in rows[index]["error"]["reason"]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_run_that_was_killed_ends_like_one_that_was_not(
    benchmark: str, evaluate: Run, client: RewardClient, tmp_path: Path
) -> None:
    data = write(benchmark, tmp_path / "data", SUFFIX[benchmark], pairs=PAIRS)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = evaluate(benchmark, data.path.parent, whole)
    assert done.wait() == 0, done.output
    assert f"4 of {PAIRS + 4} rows have no scores; the first: {data.path.name}: row 2: " in (
        done.output
    )
    check_scores(client, data, whole)

    kill_at(evaluate(benchmark, data.path.parent, resumed, "--concurrency=1"), resumed, 5)
    left = lines(resumed)
    assert 5 <= len(left) < PAIRS, "it was not in the middle"
    assert not (resumed / "report.json").exists()
    again = evaluate(benchmark, data.path.parent, resumed)
    assert again.wait() == 0, again.output
    assert again.output == done.output
    for name in ("manifest.json", "results.jsonl", "report.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in whole.iterdir()} >= {"report.html", "report.md"}


def test_the_server_refuses_a_picture_and_scores_the_others(
    evaluate: Run, client: RewardClient, tmp_path: Path
) -> None:
    data = write("multimodal-rewardbench", tmp_path / "data", ".jsonl", pairs=6)
    spoilt = data.pairs[2]
    spoilt.prompt[0]["content"][0]["image"].write_bytes(b"no picture")
    done = evaluate("multimodal-rewardbench", data.path, tmp_path / "out")
    assert done.wait() == 0, done.output
    row = json.loads(lines(tmp_path / "out")[spoilt.index])
    assert row["error"]["place"] == f"all_data.jsonl: row {spoilt.index + 1}"
    assert "image" in row["error"]["reason"]
    others = [pair for pair in data.pairs if pair is not spoilt]
    check_scores(
        client,
        Data(data.path, others, {**data.problems, spoilt.index: row["error"]["reason"]}),
        tmp_path / "out",
    )


def test_a_finished_run_needs_no_server(evaluate: Run, tmp_path: Path) -> None:
    data = write("rewardbench", tmp_path / "data", pairs=4)
    first = evaluate("rewardbench", data.path, tmp_path / "out")
    assert first.wait() == 0, first.output
    before = (tmp_path / "out" / "report.json").read_bytes()
    (tmp_path / "out" / "report.json").unlink()
    again = evaluate("rewardbench", data.path, tmp_path / "out", url="127.0.0.1:1")
    assert again.wait() == 0, again.output
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    other = evaluate("rewardbench", data.path, tmp_path / "out", name="other")
    assert other.wait() == 2
    assert "was begun with model = 'exact', now it is 'other'" in other.output
