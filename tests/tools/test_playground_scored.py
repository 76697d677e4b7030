"""Files as the commands write them: the numbers of all rows, problems, and the worst pairs."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import triward.cli
from tests.evaluations import bars
from tests.fakeserver import FakeServer
from tests.rowfiles import write_rows
from triward import InvalidRequest
from triward.integrations.datasets import DatasetScorer
from triward_tools.evaluation.ledger import Ledger
from triward_tools.evaluation.results import GroupResult, Problem, Result
from triward_tools.playground import scored
from triward_tools.playground.figures import length_figures, length_steps, sampled_places
from triward_tools.playground.gallery import Gallery
from triward_tools.playground.page import file_page
from triward_tools.playground.scored import read_scored_file

QUESTION = [{"role": "user", "content": "q"}]
ROWS = [
    {"id": 0, "messages": QUESTION, "responses": ["four", "a", "seven!!"]},
    {"id": 1, "messages": QUESTION, "responses": ["bb", "ccc"]},
]
LENGTHS = [4, 1, 7, 2, 3]  # which are the scores of the fake server


def read(path, rows, column=""):
    return read_scored_file(write_rows(path, rows), column)


@pytest.fixture
def run(tmp_path):
    """Runs a command of `triward` on rows; its output is read."""

    def run(command, rows, suffix, *options, code=0):
        source = write_rows(tmp_path / f"in{suffix}", rows)
        output = tmp_path / f"out{suffix}"
        with FakeServer() as server:
            asked = ["--url", server.url] if "--scores" not in options else []
            paths = ["--input", str(source), "--output", str(output)]
            assert triward.cli.main([command, *paths, *asked, *options]) == code
        return read_scored_file(output)

    return run


class TestWhatTheCommandsWrite:
    @pytest.mark.parametrize("command", ["score", "rank"])
    def test_score_and_rank(self, run, command):
        found = run(command, ROWS, ".jsonl")
        assert found.scores.tolist() == found.characters.tolist() == LENGTHS
        assert found.counts.tolist() == [3, 2]
        assert (found.rows, found.without, found.unread, len(found.margins)) == (2, 0, 0, 0)

    def test_score_of_whole_conversations(self, run):
        whole = [*QUESTION, {"role": "assistant", "content": "five!"}]
        found = run("score", [{"messages": whole}], ".jsonl")
        assert (found.scores.tolist(), found.characters.tolist()) == ([5], [5])

    def test_rows_with_an_error_keep_its_sentence(self, run):
        rows = [ROWS[0], {"messages": "no list"}, "{", ROWS[1]]
        found = run("score", rows, ".jsonl", code=2)
        assert (found.rows, len(found.counts), found.without) == (4, 2, 2)
        assert [problem.place for problem in found.problems] == ["line 2", "line 3"]
        assert found.problems[0].reason == ("InvalidRequest: line 2: needs 'messages', a list")

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_best_of_n_counts_every_response(self, run, suffix):
        found = run("best-of-n", ROWS, suffix)
        assert sorted(found.scores) == sorted(LENGTHS)
        assert found.characters.tolist() == found.scores.tolist()

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_filter(self, run, suffix):
        found = run("filter", ROWS, suffix, "--min", "3")
        assert found.scores.tolist() == found.characters.tolist() == [4, 7, 3]

    def test_a_column_of_another_name_is_named(self, tmp_path):
        rows = [{**row, "reward": [1.0] * len(row["responses"])} for row in ROWS]
        assert read(tmp_path / "a.jsonl", rows).unread == 2
        assert read(tmp_path / "b.jsonl", rows, "reward").scores.tolist() == [1.0] * 5

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_pairs(self, run, suffix):
        found = run("pairs", ROWS, suffix, "--strategy=all")
        assert found.margins.tolist() == [6, 3, 3, 1]
        assert [pair.margin for pair in found.worst] == [1, 3, 3, 6]
        assert found.characters.tolist() == found.scores.tolist() == [7, 1, 7, 4, 4, 1, 3, 2]

    def test_rejected_rows(self, run, tmp_path):
        run("pairs", [*ROWS, {"id": 2, "messages": QUESTION}], ".jsonl", code=2)
        found = read_scored_file(tmp_path / "out.jsonl.rejected.jsonl")
        assert (found.without, len(found.counts)) == (1, 0)
        assert found.problems[0].reason.startswith("line 3: ")
        assert "responses" in found.problems[0].reason

    def test_results_of_an_evaluation(self, tmp_path):
        with Ledger(tmp_path) as ledger:
            ledger.append(Result(0, "a", "s", 1.0, 2.5))
            ledger.append(GroupResult.of(1, "b", "s", [3.0, 2.0], [1.0, 0.5, 1.5]))
            ledger.append(Problem(2, "x.parquet: row 3", "image: holds 0 bytes"))
        found = read_scored_file(tmp_path / "results.jsonl")
        assert found.margins.tolist() == [-1.5, 0.5]
        assert found.scores.tolist() == [1.0, 2.5, 3.0, 2.0, 1.0, 0.5, 1.5]
        assert len(found.characters) == 0 and length_figures(found) is None
        assert found.problems[0].reason == "x.parquet: row 3: image: holds 0 bytes"
        assert "a, subset s" in file_page(found, Gallery())

    def test_columns_of_a_dataset_have_any_name(self, tmp_path, client):
        scorer = DatasetScorer(client, prompt="p", responses="r", score="reward")
        table = {"p": ["q", "q", 3], "r": [["a", "bb"], ["ccc"], ["a"]]}
        path = tmp_path / "d.parquet"
        pq.write_table(pa.table({**table, "p": ["q"] * 3, **scorer(table)}), path)
        found = read_scored_file(path)
        assert (found.scores.tolist(), found.without) == ([1, 2, 3], 1)
        assert (found.problems[0].place, found.problems[0].reason[:3]) == ("row 2", "p: ")


class TestBadRows:
    @pytest.mark.parametrize(
        ("row", "sentence"),
        [
            ("{", "not JSON: "),
            ("[1]", "must be an object, got list"),
            ({"id": 3, "text": "a"}, "holds no score: needs scores, score, or score_chosen and"),
            ({"scores": [1.0], "responses": ["a", "b"]}, "scores: holds 1 scores for 2 responses"),
            ({"scores": []}, "scores: holds 0 scores, needs at least 1"),
            ({"scores": [1.0, "x"]}, "scores[1]: must be a finite number, got 'x'"),
            ('{"score": NaN}', "score[0]: must be a finite number, got nan"),
            ({"score": True}, "score[0]: must be a finite number, got True"),
            ({"score": None}, "score: has no value, and the row no error that says why"),
            (
                {"score_chosen": None, "score_rejected": 0},
                "score_chosen: has no value, and the row",
            ),
            ({"score_chosen": [1, 2], "score_rejected": 0}, "score_chosen: holds 2 scores for 1"),
        ],
    )
    def test_the_sentence_names_line_and_field(self, tmp_path, row, sentence):
        found = read(tmp_path / "a.jsonl", [{"score": 1.0}, row])
        assert (found.rows, len(found.counts), found.without, found.unread) == (2, 1, 0, 1)
        assert found.problems[0].place == "line 2"
        assert sentence in found.problems[0].reason

    @pytest.mark.parametrize("name", ["tokens", "tokens_chosen"])
    def test_a_count_that_no_server_makes(self, tmp_path, name):
        row = {"score": 1, "tokens": 10**30}
        if name != "tokens":
            row = {"score_chosen": 1, "score_rejected": 0, name: 10**30, "tokens_rejected": 1}
        found = read(tmp_path / "a.jsonl", [row, {"score": 2, "tokens": 2**31 - 1}])
        assert (found.unread, found.tokens.tolist()) == (1, [2**31 - 1])
        said = "tokens: must be at most 2147483647, got 1000000000000000000000000000000"
        assert [problem.reason for problem in found.problems] == [said]

    @pytest.mark.parametrize("name", ["prompt", "chosen", "role", "id"])
    def test_what_is_nested_deeply_is_a_sentence(self, tmp_path, name):
        depth = sys.getrecursionlimit() - 100
        deep = "[" * depth + "]" * depth
        held = {"score_chosen": 1.0, "score_rejected": 0.5, "chosen": "a", "rejected": "b"}
        if name == "role":
            held["prompt"] = [{"content": "q", "role": 0}]
            line = json.dumps(held).replace('"role": 0', f'"role": {deep}')
        else:
            line = json.dumps({**held, name: 0}).replace(f'"{name}": 0', f'"{name}": {deep}')
        page = file_page(read(tmp_path / "a.jsonl", [line]), Gallery())
        assert name == "id" or "is nested too deeply" in page

    def test_all_are_counted_and_the_first_are_listed(self, tmp_path):
        found = read(tmp_path / "a.jsonl", ["{"] * 250 + ['{"score": 1}'])
        assert (found.rows, found.unread, len(found.problems)) == (251, 250, scored.LISTED)
        assert "the first 100 of them here" in file_page(found, Gallery())
        assert "250 rows without a score" in file_page(found, Gallery())

    def test_a_file_without_a_score_has_a_page(self, tmp_path):
        page = file_page(read(tmp_path / "a.jsonl", ["{"]), Gallery())
        assert "No row has a score, so there is nothing to draw." in page


class TestLimits:
    @pytest.mark.parametrize(
        ("name", "content", "sentence"),
        [
            ("a.txt", b"{}", "a.txt: must end with .jsonl or .parquet"),
            ("a.jsonl", b"", "a.jsonl: holds no row"),
            ("a.jsonl", b"\n \n", "a.jsonl: holds no row"),
            ("a.parquet", b"PAR1 and no more", "a.parquet: cannot be read as Parquet"),
            ("a.parquet", b"", "a.parquet: "),
        ],
    )
    def test_another_file(self, tmp_path, name, content, sentence):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidRequest) as caught:
            read_scored_file(tmp_path / name)
        assert str(caught.value).startswith(sentence)
        assert str(tmp_path) not in str(caught.value)

    @pytest.mark.parametrize(
        "column",
        [
            pa.array([b"\xff"]).view(pa.string()),
            pa.array([2**62], pa.int64()).view(pa.timestamp("us")),
        ],
        ids=["not UTF-8", "a date far away"],
    )
    def test_values_that_python_lacks(self, tmp_path, column):
        pq.write_table(pa.table({"score": [1.0], "other": column}), tmp_path / "a.parquet")
        with pytest.raises(InvalidRequest, match=r"^a\.parquet: cannot be read as Parquet: "):
            read_scored_file(tmp_path / "a.parquet")

    def test_bytes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(scored, "FILE_BYTES", 12)
        assert read(tmp_path / "a.jsonl", ['{"score":1}']).rows == 1
        with pytest.raises(InvalidRequest, match=r"a\.jsonl: has 13 bytes, at most 12 are read"):
            read(tmp_path / "a.jsonl", ['{"score": 1}'])

    def test_rows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(scored, "ROWS", 3)
        assert read(tmp_path / "a.jsonl", [{"score": 1}] * 3).rows == 3
        with pytest.raises(InvalidRequest, match=r"a\.jsonl: has more than 3 rows"):
            read(tmp_path / "a.jsonl", [{"score": 1}] * 4)

    def test_what_a_parquet_file_unpacks_to(self, tmp_path, monkeypatch):
        monkeypatch.setattr(scored, "UNPACKED_BYTES", 10_000)
        rows = [{"score": 1.0, "text": f"{n}" + "x" * 1000} for n in range(100)]
        with pytest.raises(InvalidRequest, match=r"a\.parquet: has 10\d,\d{3} bytes when unpacked"):
            read(tmp_path / "a.parquet", rows)


class TestNumbers:
    def test_lengths_are_in_tokens_where_every_row_counts_them(self, tmp_path):
        rows = [
            {"scores": [1.0, 2.0], "responses": ["aaaa", "b"], "tokens": [9, 5]},
            {"score_chosen": 3.0, "score_rejected": 1.0, "chosen": "cc", "rejected": "d",
             "tokens_chosen": 7, "tokens_rejected": 6},
        ]  # fmt: skip
        found = read(tmp_path / "a.jsonl", rows)
        assert found.tokens.tolist() == [9, 5, 7, 6]
        assert length_figures(found).unit == "tokens"
        del rows[0]["tokens"]
        found = read(tmp_path / "b.jsonl", rows)
        assert found.tokens.tolist() == [] and found.characters.tolist() == [4, 1, 2, 1]
        assert length_figures(found).unit == "characters"

    @pytest.mark.parametrize("tokens", [[1, 2, 3], "many", [-1, 1], [1.5, 2], [True, 1]])
    def test_a_column_of_that_name_may_hold_something_else(self, tmp_path, tokens):
        row = {"scores": [1.0, 2.0], "responses": ["a", "b"], "tokens": tokens}
        found = read(tmp_path / "a.jsonl", [row])
        assert len(found.tokens) == 0 and len(found.scores) == 2

    def test_correlations_are_numpys(self, tmp_path):
        rng = np.random.default_rng(4)
        groups = [rng.integers(1, 90, size) for size in (5, 3, 8)]
        rows = [
            {"scores": (size / 40 + rng.normal(3 * n, 1, len(size))).tolist(),
             "responses": ["x" * k for k in size]}
            for n, size in enumerate(groups)
        ]  # fmt: skip
        figures = length_figures(read(tmp_path / "a.jsonl", rows))
        lengths, scores = np.concatenate(groups), np.concatenate([r["scores"] for r in rows])
        assert figures.overall == pytest.approx(np.corrcoef(lengths, scores)[0, 1])
        less = [
            np.concatenate([np.asarray(group) - np.mean(group) for group in each])
            for each in (groups, [r["scores"] for r in rows])
        ]
        assert figures.inside == pytest.approx(np.corrcoef(*less)[0, 1])

    @pytest.mark.parametrize(
        ("texts", "scores"),
        [((["a", "b"], ["c"]), ([0.1, 0.2], [0.3])), ((["a", "bb"], ["c"]), ([0.1, 0.1], [0.1]))],
    )
    def test_a_correlation_of_what_does_not_vary(self, tmp_path, texts, scores):
        rows = [{"responses": r, "scores": s} for r, s in zip(texts, scores, strict=True)]
        found = read(tmp_path / "a.jsonl", rows)
        lengths = length_figures(found)
        assert (lengths.overall, lengths.inside, lengths.several) == (None, None, True)
        page = " ".join(file_page(found, Gallery()).split())
        assert (
            "length: not defined over all responses, not defined within rows. It is not defined "
            "where all scores or all lengths are equal." in page
        )

    def test_worst_are_the_lowest_margins_of_all_in_the_files_order(self, tmp_path):
        rng = random.Random(1)
        margins = [round(rng.gauss(1, 1), 1) for _ in range(300)]
        rows = [{"score_chosen": m, "score_rejected": 0.0, "id": n} for n, m in enumerate(margins)]
        found = read(tmp_path / "a.jsonl", rows)
        expected = sorted(range(300), key=lambda n: (margins[n], n))[: scored.WORST]
        assert [pair.values["id"] for pair in found.worst] == expected
        wrong = sum(margin < 0 for margin in margins)
        assert wrong > 0
        assert f"scores below the rejected one in {wrong}, and" in file_page(found, Gallery())

    def test_what_is_drawn_of_many_is_said(self, tmp_path):
        rows = [{"scores": [1.0 * (n % 7)] * 5, "responses": ["a" * n] * 5} for n in range(500)]
        found = read(tmp_path / "a.jsonl", rows)
        assert "2,000 of 2,500 responses are drawn, chosen at random" in file_page(found, Gallery())
        assert length_figures(found).chart.count("<use") > 2000

    def test_a_sample_has_each_place_once(self):
        assert sampled_places(5, 5).tolist() == [0, 1, 2, 3, 4]
        chosen = sampled_places(1000, 10)
        assert len({*chosen.tolist()}) == 10 and chosen.tolist() == sorted(chosen.tolist())
        assert chosen.tolist() == sampled_places(1000, 10).tolist()

    def test_ranges_of_length_hold_whole_lengths(self):
        lengths = np.array([3, 1, 1, 1, 2, 2])
        scores = np.array([9.0, 1.0, 2.0, 3.0, 4.0, 8.0])
        assert [each.tolist() for each in length_steps(scores, lengths)] == [[1, 2, 3], [2, 6, 9]]
        mean_length, _ = length_steps(np.zeros(1000), np.arange(1000))
        assert mean_length.tolist() == [49.5 + 100 * n for n in range(10)]

    @pytest.mark.parametrize("score", [0.0, 3e38, -3e38, 1e-300])
    def test_equal_scores_are_drawn(self, tmp_path, score):
        rows = [{"score_chosen": score, "score_rejected": score, "chosen": "a", "rejected": "b"}]
        page = file_page(read(tmp_path / "a.jsonl", rows), Gallery())
        assert page.count("<svg") == 3

    def test_scores_of_both_ends_are_drawn(self, tmp_path):
        rows = [{"score_chosen": 3e38, "score_rejected": -3e38, "chosen": "a", "rejected": "bb"}]
        assert file_page(read(tmp_path / "a.jsonl", rows), Gallery()).count("<svg") == 3


class TestPage:
    def pair(self, **values):
        return {"score_chosen": 0.0, "score_rejected": 1.0, "chosen": "good", "rejected": "bad",
                **values}  # fmt: skip

    def test_texts_of_the_file_are_no_markup(self, tmp_path):
        bad = "<script>alert(1)</script><img src=x onerror=alert(2)>"
        rows = [
            self.pair(chosen=bad, rejected=bad, prompt=bad, id=bad, images=[bad]),
            self.pair(prompt=[{"role": bad, "content": [{"type": bad}, {"text": bad}]}]),
            {bad: 1},
            {"error": {"type": bad, "message": bad}},
        ]
        page = file_page(read(tmp_path / "a.jsonl", rows), Gallery())
        assert "<script" not in page and "<img" not in page
        assert "&lt;script&gt;" in page

    def test_images_of_a_parquet_file_are_shown(self, tmp_path):
        prompt = [{"role": "user", "content": [{"type": "image", "text": None},
                                               {"type": "text", "text": "What?"}]}]  # fmt: skip
        rows = [self.pair(prompt=prompt, images=[{"bytes": bars(1), "path": None}])]
        page = file_page(read(tmp_path / "a.parquet", rows), Gallery())
        assert page.count('<img src="data:image/jpeg;base64,') == 1
        assert 'alt="image of 640 x 400 pixels"' in page

    def test_images_that_do_not_fit_are_said(self, tmp_path):
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
        page = file_page(
            read(tmp_path / "a.jsonl", [self.pair(prompt=prompt, images=[])]), Gallery()
        )
        assert "The prompt cannot be shown: 2 image parts hold no image" in page

    def test_a_row_is_found_again(self, tmp_path):
        rows = [json.dumps({"score": 1}), "", json.dumps(self.pair())]
        assert "<span>line 3</span>" in file_page(read(tmp_path / "a.jsonl", rows), Gallery())
