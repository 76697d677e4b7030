"""Scoring Parquet files, by one process and by a Ray cluster; and Ray datasets."""

from __future__ import annotations

import io
import json
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as Pil

from tests.commands import kill_all, named
from tests.fakeserver import Fault
from triward import RewardClient, ServerError, ServerUnavailable
from triward.integrations.rows import RowScorer
from triward_tools import offline
from triward_tools.jobs import whole_file
from triward_tools.offline import JobMismatch, OutputCounts, score_parquet


@pytest.fixture
def scorer(client):
    return RowScorer(client, prompt="prompt", responses="response", concurrency=4)


def write(folder, files=2, rows=25, row_group=10, response="{:05}"):
    """Rows of which each has its own response, in files with one unequal row group at the end."""
    for file in range(files):
        ids = range(file * rows, (file + 1) * rows)
        columns = {
            "id": list(ids),
            "prompt": [f"q{row}" for row in ids],
            "response": [response.format(row) + "x" * (row % 7) for row in ids],
        }
        path = folder / f"part{file}" / "rows.parquet"
        path.parent.mkdir(parents=True)
        # Not compressed: other values of the same lengths make a file of the same length.
        pq.write_table(pa.table(columns), path, row_group_size=row_group, compression="none")
    return folder


def read(output):
    """The rows of all files, in the order of their names."""
    paths = sorted(output.glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def assert_complete(output, rows):
    found = read(output)
    assert [row["id"] for row in found] == list(range(rows))
    for row in found:
        assert (row["score"], row["score_error"]) == (len(row["response"]), "")


def test_each_row_once_in_the_order_of_the_input(server, scorer, tmp_path):
    source = write(tmp_path / "in")
    done = score_parquet(source, tmp_path / "out", scorer, chunk_rows=4)
    assert done == OutputCounts(rows=50, failed=0)
    assert_complete(tmp_path / "out", 50)
    assert set(server.scored.values()) == {1}
    sizes = [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "out").glob("*.parquet"))]
    assert sizes == [4, 4, 2, 4, 4, 2, 4, 1] * 2
    schema = pq.read_schema(tmp_path / "out" / "000000-000000-000000000.parquet")
    assert schema.field("score").type == pa.float32()


def test_a_finished_job_asks_for_nothing(server, scorer, tmp_path):
    source = write(tmp_path / "in")
    first = score_parquet(source, tmp_path / "out", scorer)
    calls = server.calls
    assert score_parquet(source, tmp_path / "out", scorer) == first
    assert server.calls == calls


def test_one_file_and_some_columns(scorer, tmp_path):
    source = write(tmp_path / "in", files=1) / "part0" / "rows.parquet"
    score_parquet(source, tmp_path / "in" / "out", scorer, keep=["id"])
    rows = read(tmp_path / "in" / "out")
    assert rows[3] == {"id": 3, "score": 8.0, "score_error": ""}


def test_a_failure_keeps_what_is_finished(server, scorer, tmp_path):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    server.fault = lambda call: Fault.INTERNAL if b"00017xxx" in call.responses else None
    with pytest.raises(ServerError):
        score_parquet(source, output, scorer, chunk_rows=5)
    finished = read(output)
    assert [row["id"] for row in finished] == list(range(15))
    before = dict(server.scored)
    server.fault = lambda call: None
    score_parquet(source, output, scorer, chunk_rows=5)
    assert_complete(output, 50)
    again = [row["response"] for row in finished if server.scored[row["response"]] != 1]
    assert again == []
    assert len(before) < 50


def test_a_row_that_cannot_be_scored_has_an_error_and_no_score(server, client, tmp_path):
    rows = {"prompt": ["q"] * 3, "responses": [["a", "bb"], ["a", "bad"], []], "score": [1, 2, 3]}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    server.fault = lambda call: Fault.INVALID_ARGUMENT if b"bad" in call.responses else None
    scorer = RowScorer(client, prompt="prompt", responses="responses", score="reward")
    # One row a chunk: the last two hold no score to tell the column's type from.
    done = score_parquet(tmp_path / "in.parquet", tmp_path / "out", scorer, chunk_rows=1)
    assert done == OutputCounts(rows=3, failed=2)
    found = read(tmp_path / "out")
    assert [row["reward"] for row in found] == [[1.0, 2.0], None, None]
    good, refused, empty = [row["reward_error"] for row in found]
    assert good == ""
    assert refused.startswith("response 1: call ")
    assert empty == "responses: holds 0 responses, needs at least 1"
    kinds = {pq.read_schema(path).field("reward").type for path in (tmp_path / "out").glob("0*")}
    assert {str(kind) for kind in kinds} == {"list<element: float>"}


def test_images_that_hugging_face_datasets_wrote(server, client, tmp_path):
    media = []
    server.fault = lambda call: media.extend(call.media)
    buffer = io.BytesIO()
    Pil.new("RGB", (4, 3), "red").save(buffer, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    text, binary = Value("string"), Value("binary")
    features = Features(q=text, r=text, struct=Image(), bytes=binary, path=text)
    held = {"bytes": buffer.getvalue(), "path": None}
    row = {"q": "q", "r": "r", "struct": held, "bytes": held["bytes"], "path": str(path)}
    (tmp_path / "in").mkdir()
    Dataset.from_list([row], features).to_parquet(tmp_path / "in" / "rows.parquet")
    for column in ("struct", "bytes", "path"):
        scorer = RowScorer(client, prompt="q", responses="r", images=column)
        score_parquet(tmp_path / "in", tmp_path / column, scorer)
        assert read(tmp_path / column)[0]["score"] == 1.0
    assert media == [held["bytes"]] * 3
    files = str(tmp_path / "struct" / "*.parquet")
    scored = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "c"))
    assert scored.features["struct"] == Image()
    assert scored[0]["score"] == 1.0


def test_an_unavailable_server_is_waited_for_in_patience(server, tmp_path):
    source = write(tmp_path / "in", files=1)
    server.fault = lambda call: Fault.UNAVAILABLE
    with RewardClient(server.url, max_attempts=1) as client:
        names = {"prompt": "prompt", "responses": "response"}
        with pytest.raises(ServerUnavailable):
            score_parquet(source, tmp_path / "out", RowScorer(client, **names, patience=0.5))
        assert read(tmp_path / "out") == []
        server.fault = lambda call: Fault.UNAVAILABLE if call.number < 80 else None
        score_parquet(source, tmp_path / "out", RowScorer(client, **names, patience=60))
    assert_complete(tmp_path / "out", 25)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"chunk_rows": 9}, "begun with chunk_rows = 1000, now it is 9"),
        ({"keep": ["id"]}, "begun with keep = None, now it is ['id']"),
        ({"model": "other"}, "begun with model = 'reward', now it is 'other'"),
        ({"responses": "prompt"}, "begun with responses = 'response', now it is 'prompt'"),
    ],
)
def test_other_settings_are_another_job(server, scorer, tmp_path, change, difference):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    score_parquet(source, output, scorer)
    client = RewardClient(server.url, model=change.pop("model", "reward"))
    response = change.pop("responses", "response")
    other = RowScorer(client, prompt="prompt", responses=response)
    with pytest.raises(JobMismatch) as error:
        score_parquet(source, output, other, **change)
    assert difference in str(error.value)


@pytest.mark.parametrize("change", ["content", "more", "less"])
def test_other_input_is_another_job(scorer, tmp_path, change):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    score_parquet(source, output, scorer)
    path = source / "part1" / "rows.parquet"
    if change == "content":
        length = path.stat().st_size
        shutil.rmtree(source)
        write(source, response="{:04}y")
        assert path.stat().st_size == length
    elif change == "more":
        shutil.copy(path, source / "more.parquet")
    else:
        path.unlink()
    with pytest.raises(JobMismatch, match="was begun with file "):
        score_parquet(source, output, scorer)


def test_what_is_hidden_is_no_input(scorer, tmp_path):
    source = write(tmp_path / "in")
    shutil.copytree(source / "part0", source / "_temporary" / "part0")
    (source / ".part.parquet").touch()
    assert score_parquet(source, tmp_path / "out", scorer) == OutputCounts(rows=50, failed=0)


def test_a_folder_of_something_else_is_left_alone(scorer, tmp_path):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").touch()
    with pytest.raises(JobMismatch, match="is not empty"):
        score_parquet(source, output, scorer)
    assert [path.name for path in output.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("scores", "settings", "error"),
    [
        ({"responses": "answer"}, {}, "has no column 'answer', it has id, prompt, response"),
        ({}, {"keep": ["key"]}, "has no column 'key'"),
        ({"score": "id"}, {}, "has a column 'id' already"),
        ({}, {"chunk_rows": 0}, "chunk_rows must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_the_input(server, client, tmp_path, scores, settings, error):
    scorer = RowScorer(client, **{"prompt": "prompt", "responses": "response", **scores})
    with pytest.raises(ValueError, match=error):
        score_parquet(write(tmp_path / "in"), tmp_path / "out", scorer, **settings)
    assert not (tmp_path / "out").exists()
    assert server.calls == 0


def test_input_must_be_there_and_apart_from_the_output(scorer, tmp_path):
    with pytest.raises(ValueError, match=r"there is no \*.parquet file"):
        score_parquet(tmp_path, tmp_path.parent / "out", scorer)
    with pytest.raises(ValueError, match="lies in the input"):
        score_parquet(write(tmp_path / "in"), tmp_path / "in" / "out", scorer)


def test_an_output_that_was_changed_is_not_called_finished(scorer, tmp_path):
    source, output = write(tmp_path / "in"), tmp_path / "out"
    score_parquet(source, output, scorer)
    first, second = sorted(output.glob("*.parquet"))[:2]
    pq.write_table(pq.read_table(first).slice(1), first)
    with pytest.raises(RuntimeError, match="has 9 rows instead of 10"):
        score_parquet(source, output, scorer)
    first.unlink()
    second.rename(output / "other.parquet")
    with pytest.raises(RuntimeError, match=r"other\.parquet is no chunk of this job"):
        score_parquet(source, output, scorer)


def test_a_chunk_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "chunk"
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_batches_that_end_early_make_whole_chunks():
    table = pa.table({"n": list(range(23))})
    batches = [table.slice(start, 3).to_batches()[0] for start in range(0, 23, 3)]
    chunks = list(offline._cut(batches, 10))
    assert [chunk.num_rows for chunk in chunks] == [10, 10, 3]
    assert pa.concat_tables(chunks) == table


SCRIPT = """
import sys
from triward import RewardClient
from triward_tools.offline import score_parquet
from triward.integrations.rows import RowScorer

url, source, output = sys.argv[1:]
scorer = RowScorer(RewardClient(url), prompt="prompt", responses="response", concurrency=4)
score_parquet(source, output, scorer, chunk_rows=20)
"""


def wait_for_chunks(output, count):
    limit = time.monotonic() + 240
    while len(list(output.glob("*.parquet"))) < count:
        assert time.monotonic() < limit, "no chunk was finished"
        time.sleep(0.01)


def test_a_killed_process_is_resumed(server, scorer, tmp_path, command):
    source, output = write(tmp_path / "in", rows=200, row_group=100), tmp_path / "out"
    server.delay = 0.02
    running = command(sys.executable, "-c", SCRIPT, server.url, source, output)
    wait_for_chunks(output, 7)
    running.process.kill()
    running.process.wait()
    finished, before = read(output), dict(server.scored)
    assert 140 <= len(finished) < 400
    server.delay = 0
    score_parquet(source, output, scorer, chunk_rows=20)
    assert_complete(output, 400)
    assert all(server.scored[row["response"]] == before[row["response"]] for row in finished)
    assert list(output.glob(".*")) == []


DRIVER = """
import json
import sys

import pyarrow.parquet as pq
import ray

from triward import RewardClient, ServerError
from triward_tools.ray import RayScorer, score_parquet
from triward.integrations.rows import RowScorer

url, temporary, source, output, *more = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=temporary)
scorer = RowScorer(RewardClient(url), prompt="prompt", responses="response", concurrency=3)
print("done", score_parquet(source, output, scorer, actors=2, chunk_rows=20))

for fatal in more:
    try:
        score_parquet(fatal, fatal + "-out", scorer, actors=2)
    except ServerError as error:
        print("raised", error)
    dataset = ray.data.from_arrow(pq.read_table(source).slice(0, 50)).map_batches(
        RayScorer,
        fn_constructor_args=[scorer],
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_format="pyarrow",
        batch_size=20,
    )
    print("mapped", json.dumps(dataset.take_all()))
"""


@pytest.fixture
def driver(server, command):
    """Runs DRIVER with a small Ray of its own; nothing of it is left."""
    # Short, since Ray puts the paths of sockets below it.
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))
    family = []
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # A token of our own, or Ray writes one into the home directory.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }

    def run(*paths):
        arguments = (sys.executable, "-c", DRIVER, server.url, temporary, *paths)
        running = command(*arguments, **environment)
        running.wait_for("Started a local Ray instance")
        family.extend(running.family())
        return running

    def actors(running):
        members = running.family()
        family.extend(members)
        return named(members, "ray::", "MapWorker")

    def kill(running):
        """As when the driver's machine is lost; returns when no actor scores any more."""
        working = actors(running)
        assert len(working) == 2
        running.process.kill()
        running.process.wait()
        _, alive = psutil.wait_procs(working, timeout=120)
        assert alive == []

    run.actors, run.kill = actors, kill
    yield run
    kill_all(family)
    psutil.wait_procs(family, timeout=60)
    shutil.rmtree(temporary)


def test_a_killed_ray_job_is_resumed(server, driver, tmp_path):
    source, output = write(tmp_path / "in", rows=300, row_group=50), tmp_path / "out"
    fatal = write(tmp_path / "fatal", response="fatal{}")
    server.fault = lambda call: Fault.INTERNAL if call.responses[0][:5] == b"fatal" else None
    server.delay, server.capacity = 0.1, 5  # of the six at once some are refused

    first = driver(source, output)
    wait_for_chunks(output, 9)
    driver.kill(first)
    finished, before = read(output), dict(server.scored)
    assert 160 <= len(finished) < 600

    second = driver(source, output, fatal)
    wait_for_chunks(output, len(list(output.glob("*.parquet"))) + 3)
    driver.actors(second)[0].kill()
    server.delay = 0
    assert second.wait_for("^done (.*)$")[1] == "OutputCounts(rows=600, failed=0)"
    assert_complete(output, 600)
    assert all(server.scored[row["response"]] == before[row["response"]] for row in finished)
    assert server.peak <= 6
    assert list(output.glob(".*")) == []

    assert "was to fail" in second.wait_for("^raised (.*)$")[1]
    assert read(tmp_path / "fatal-out") == []
    mapped = json.loads(second.wait_for(r"^mapped (.*)$")[1])
    assert len(mapped) == 50
    assert all((row["score"], row["score_error"]) == (len(row["response"]), "") for row in mapped)
    assert second.wait() == 0


def test_a_ray_batch_must_be_a_table(scorer):
    from triward_tools.ray import RayScorer

    with pytest.raises(TypeError, match="batch_format='pyarrow', got a batch of type dict"):
        RayScorer(scorer)({"prompt": ["q"], "response": ["r"]})
