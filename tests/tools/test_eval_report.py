"""The report's three files: complete, the same each time, and safe to look at."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from tests import benchmarkdata
from tests.evaluations import groups_of, pair, results_of, write
from tests.fakeserver import FakeServer
from triward import RewardClient
from triward_tools.evaluation.report import write_report
from triward_tools.evaluation.results import Problem, Result
from triward_tools.evaluation.run import evaluate
from triward_tools.evaluation.text import fenced, markdown, visible

FILES = ("report.html", "report.md", "report.json")


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(folder):
    return {name: (folder / name).read_text(encoding="utf-8") for name in FILES}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    problems = [Problem(900 + i, f"test.parquet, row {900 + i}", f"reason {i}") for i in range(30)]
    summary = write(folder, "vl-rewardbench", results_of("vl-rewardbench", 210), problems)
    return summary, read(folder), Page(read(folder)["report.html"])


class TestContents:
    def test_json_has_the_numbers(self, report):
        _, files, _ = report
        facts = json.loads(files["report.json"])
        results = results_of("vl-rewardbench", 210)
        assert facts["pairs"] == 210
        assert facts["correct"] == sum(r.chosen > r.rejected for r in results)
        assert facts["ties"] == sum(r.chosen == r.rejected for r in results) == 4
        assert [r["name"] for r in facts["rows"]] == [
            *("Overall", "Macro"),
            *("General", "vlfeedback", "wildvision"),
            *("Hallucination", "povid", "rlaif-v", "rlhf-v"),
            *("Reasoning", "mathverse", "mmmu"),
        ]
        povid = next(r for r in facts["rows"] if r["name"] == "povid")
        ours = [r for r in results if r.subset == "povid"]
        assert povid["pairs"] == len(ours)
        assert povid["mean_margin"] == pytest.approx(sum(r.margin for r in ours) / len(ours))
        overall = facts["rows"][0]
        assert overall["value"] == pytest.approx(facts["correct"] / 210)
        assert overall["interval"]["low"] < overall["value"] < overall["interval"]["high"]

    def test_pages_show_every_score(self, report):
        _, files, page = report
        for row in json.loads(files["report.json"])["rows"]:
            shown = f"{100 * row['value']:.1f}"
            assert re.search(rf"{row['name']}[^|]*\| {shown} \|", files["report.md"])
            assert row["name"] in page.text
            assert shown in page.text

    def test_all_problems_are_listed_and_counted(self, report):
        summary, files, page = report
        for i in range(30):
            assert f"test.parquet, row {900 + i}" in page.text
            assert f"| test.parquet, row {900 + i} | reason {i} |" in files["report.md"]
        assert "30 rows have no score and are in no number here." in page.text
        lines = summary.lines()
        assert any("30 rows have no score" in line for line in lines)
        assert not any("reason" in line for line in lines)

    def test_summary_has_scores_with_intervals(self, report):
        lines = report[0].lines()
        assert lines[0].startswith("VL-RewardBench, made-up-judge-7b: ")
        assert re.match(r"  Overall +[\d.]+  \[[\d.]+, [\d.]+\]  210 pairs$", lines[1])
        assert "  ties, which count as wrong: 4" in lines

    def test_worst_are_the_lowest_margins(self, report):
        _, files, page = report
        worst = sorted(results_of("vl-rewardbench", 210), key=lambda r: r.margin)[:20]
        assert [w["id"] for w in json.loads(files["report.json"])["worst"]] == [r.id for r in worst]
        places = [page.text.index(r.id) for r in worst]
        assert places == sorted(places)
        assert len(page.all("article")) == 20
        assert files["report.md"].count("\n### ") == 20

    def test_published_rows_are_sorted_with_ours_between(self, report):
        _, files, page = report
        section = files["report.md"].split("\n## ")[2]
        rows = re.findall(r"\| ([^|]*) \| .* \| ([\d.]+)†? \| [\d.]+ \| ([^|]*) \|", section)
        overall = [float(value) for _, value, _ in rows]
        assert len(rows) == 17
        assert overall == sorted(overall, reverse=True)
        assert [name for name, _, source in rows if not source.strip()] == [
            "**made-up-judge-7b** (this evaluation)"
        ]
        assert "this evaluation" in page.text

    def test_benchmark_without_published_rows_says_so(self, tmp_path):
        write(tmp_path, "multimodal-rewardbench", results_of("multimodal-rewardbench", 60))
        for name in ("report.html", "report.md"):
            text = read(tmp_path)[name]
            assert "There are none to show for this benchmark." in text


class TestGroups:
    """RewardBench 2: prompts with several responses, and a subset with a score of its own."""

    @pytest.fixture
    def files(self, tmp_path):
        return write(tmp_path, "rewardbench-2", groups_of(90)), read(tmp_path)

    def test_scores(self, files):
        summary, texts = files
        facts = json.loads(texts["report.json"])
        names = ["Score", "Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties"]
        assert [row["name"] for row in facts["rows"]] == names
        assert facts["calibration"] is None  # a margin is not between the two of a pair
        assert list(facts["terms"]) == [
            "accuracy of tied", "accuracy of ref", "preferred", "preferred, hard", "margin",
        ]  # fmt: skip
        lines = summary.lines()
        assert lines[0].endswith(" of 105 prompts right")
        assert lines[1].endswith("  105 prompts")
        assert re.match(r"  ties, which count as wrong in Ties, in part elsewhere: \d+", lines[-1])
        for name in ("report.html", "report.md"):
            assert "Ties is made of accuracy of tied" in texts[name]
            assert "prompts" in texts[name] and "pairs" not in texts[name]
            assert "calibration" not in texts[name].lower()

    def test_every_response_of_a_case_is_shown_with_its_score(self, files):
        worst = json.loads(files[1]["report.json"])["worst"]
        for name, decimals in (("report.html", 3), ("report.md", 4)):
            text = files[1][name]
            for case in worst:
                start = text.index(case["id"], text.index("lowest margins"))
                place = start
                for score in case["chosen_scores"] + case["rejected_scores"]:
                    place = text.index(f"{score:.{decimals}f}", place) + 1
        page = Page(files[1]["report.html"])
        responses = sum(len(c["chosen_scores"]) + len(c["rejected_scores"]) for c in worst)
        shown = [a for a in page.all("p") if a.get("class") == "role"]
        assert len(shown) == responses + len(worst)  # and a prompt each

    def test_a_row_that_is_gone(self, tmp_path):
        write_report(tmp_path, "rewardbench-2", groups_of(1), [], lambda _: {}, model="m")
        result = groups_of(1)[0]
        for each in result.scores:
            assert f"{each:.4f}" in read(tmp_path)["report.md"]
        assert "Its row cannot be read any more." in read(tmp_path)["report.md"]


class TestSameBytes:
    def test_whatever_the_order_of_results(self, tmp_path):
        results = results_of("rewardbench", 120)
        problems = [Problem(500, "a, row 1", "x"), Problem(501, "a, row 2", "y")]
        for name, turn in (("one", 1), ("two", -1)):
            (tmp_path / name).mkdir()
            write(tmp_path / name, "rewardbench", results[::turn], problems[::turn])
        assert read(tmp_path / "one") == read(tmp_path / "two")

    def test_nothing_of_the_machine(self, report, tmp_path):
        _, files, _ = report
        for text in files.values():
            assert str(tmp_path.parent) not in text
            assert not re.search(r"\b20(2[5-9]|[3-9]\d)-\d\d-\d\d\b", text)

    def test_nothing_from_elsewhere(self, report):
        """No script and no address that a browser would load."""
        _, files, page = report
        assert not page.all("script")
        for tag in ("img", "link", "image", "use", "a"):
            for attributes in page.all(tag):
                for key in ("src", "href", "xlink:href"):
                    assert (attributes.get(key) or "#").startswith(("data:", "#"))
        assert "@import" not in files["report.html"]
        assert len(page.all("svg")) == 2


HOSTILE = (
    '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;\x00\x1b[31m\u202e|`` ```\n# no'
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every text that comes from others is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    results = [Result(0, HOSTILE, "povid", -1.0, 1.0)]
    prompt = [{"role": HOSTILE, "content": [{"type": HOSTILE}, {"text": HOSTILE}]}]
    write_report(
        folder,
        "vl-rewardbench",
        results,
        [Problem(1, HOSTILE, HOSTILE + "\ud800")],
        lambda _: {0: pair(0, "povid", prompt=prompt, chosen=HOSTILE, rejected=HOSTILE)},
        model=HOSTILE,
    )
    return read(folder)


class TestHostileText:
    def test_is_text_in_the_page(self, files):
        page = Page(files["report.html"])
        assert not page.all("script")
        assert not page.all("img")
        assert not any("onerror" in attributes for _, attributes in page.elements)
        shown = visible(HOSTILE)
        # Title, heading, sentence, published row; place and reason; id; role, part, prompt, both
        # responses.
        assert page.text.count(shown) >= 11

    def test_leaves_no_control_character(self, files):
        for text in files.values():
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
        assert "<U+D800>" in files["report.md"].replace("\\", "")

    def test_is_text_in_markdown(self, files):
        outside = re.sub(r"(?ms)^(`{3,})text\n.*?\n\1$", "", files["report.md"])
        assert not re.search(r"(?<!\\)<script", outside)
        assert "# no" not in re.sub(r"\\#", "", outside).split("\n# ")[0][2:]
        [row] = [line for line in outside.splitlines() if line.startswith("| \\<script")]
        assert len(re.findall(r"(?<!\\)\|", row)) == 3

    def test_fence_outlasts_the_text(self):
        text = "````\n# no longer text\n````"
        assert fenced(text) == f"`````text\n{text}\n`````"

    def test_cell_is_one_line(self):
        assert markdown("a\nb | c") == "a b \\| c"


@pytest.mark.parametrize("name", FILES)
def test_full_disk_is_named(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(tmp_path, "vl-rewardbench", [Result(7, "x", "mmmu", 1.5, 1.0)])
    assert caught.value.filename == str(tmp_path / name)


class TestRowsThatAreGone:
    def test_case_says_so(self, tmp_path):
        results = [Result(0, "a", "povid", -1.0, 1.0), Result(1, "b", "povid", 2.0, 1.0)]
        kept = {0: pair(0, "povid", chosen="the better text")}
        write_report(tmp_path, "vl-rewardbench", results, [], lambda _: kept, model="m")
        for name in ("report.html", "report.md"):
            text = read(tmp_path)[name]
            assert text.count("ts row cannot be read any more") == 1
            assert text.count("the better text") == 1
        assert "2.000" in read(tmp_path)["report.html"]
        assert "Scores 2.0000 (better) and 1.0000 (worse)" in read(tmp_path)["report.md"]

    def test_finished_folder_is_reported_without_its_pictures(self, tmp_path):
        data = benchmarkdata.write("multimodal-rewardbench", tmp_path / "data", ".json", pairs=6)
        with FakeServer() as server, RewardClient(server.url) as client:
            for picture in (None, *(tmp_path / "data" / "images").rglob("*.png")):
                if picture is not None:
                    picture.unlink()
                done = evaluate(client, "multimodal-rewardbench", data.path, tmp_path / "out")
                assert done.facts.pairs == 6
        assert read(tmp_path / "out")["report.md"].count("Its row cannot be read any more.") == 6


class TestUnseen:
    @pytest.mark.parametrize(
        "point",
        [
            *(0, 0x7F, 0x85, 0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x180B, 0x180E, 0x200B),
            *(0x200D, 0x2028, 0x202E, 0x2060, 0x2065, 0x2800, 0x3164, 0xD800, 0xE000, 0xFE00),
            *(0xFEFF, 0xFFA0, 0xFFF9, 0xFFFE, 0x1D173, 0xE0041, 0xE0100, 0x10FFFF),
        ],
    )
    def test_is_shown(self, point):
        assert visible(f"a{chr(point)}b") == f"a<U+{point:04X}>b"

    def test_the_rest_stays(self):
        text = "a\tb\nc \u00a0\u3000é e\u0301 图 한글 ा ❤\ufe0f 😀 – “”"
        assert visible(text) == text
        assert visible("a\r\nb\rc") == "a\nb<U+000D>c"


class TestFewPairs:
    @pytest.mark.parametrize(
        "benchmark", ["rewardbench", "vl-rewardbench", "multimodal-rewardbench", "rewardbench-2"]
    )
    def test_none(self, tmp_path, benchmark):
        summary = write(tmp_path, benchmark, [], [Problem(0, "a.jsonl, row 0", "no image")])
        facts = json.loads(read(tmp_path)["report.json"])
        assert facts["rows"] == [] and facts["margins"] is None and facts["calibration"] is None
        said = r"No (pair|prompt) has scores, so there is nothing to report\."
        assert re.search(said, read(tmp_path)["report.html"])
        assert "1 row has no score and is in no number here." in "\n".join(summary.lines())

    def test_one(self, tmp_path):
        summary = write(tmp_path, "vl-rewardbench", [Result(7, "x", "mmmu", 1.5, 1.0)])
        assert summary.lines()[0].endswith(": 1 of 1 pair right")
        assert summary.lines()[1].endswith("]  1 pair")
        for text in read(tmp_path).values():
            assert "1 pairs" not in text
        facts = json.loads(read(tmp_path)["report.json"])
        assert {r["name"]: r["value"] for r in facts["rows"]} == {
            "Overall": 1.0,
            "Macro": 1.0,
            "Reasoning": 1.0,
            "mmmu": 1.0,
        }

    def test_only_ties(self, tmp_path):
        ties = [Result(i, str(i), "povid", 3.25, 3.25) for i in range(30)]
        write(tmp_path, "vl-rewardbench", ties)
        facts = json.loads(read(tmp_path)["report.json"])
        assert (facts["correct"], facts["ties"]) == (0, 30)
        assert facts["calibration"]["auroc"] is None
        page = Page(read(tmp_path)["report.html"])
        assert page.text.count("tie") >= 20

    def test_missing_section_is_said_first(self, tmp_path):
        results = [r for r in results_of("rewardbench", 230) if not r.subset.startswith("hep")]
        results = [r for r in results if r.subset != "math-prm"]
        summary = write(tmp_path, "rewardbench", results)
        said = "No pair of Reasoning: the totals leave it out."
        for name in ("report.html", "report.md"):
            text = read(tmp_path)[name]
            assert text.index(said) < text.index("Chat Hard")
        assert any(said in line for line in summary.lines())
        facts = json.loads(read(tmp_path)["report.json"])
        assert facts["absent"] == ["Reasoning"]
        assert facts["rows"][0]["missing"][0] == "math-prm"


class TestArguments:
    def test_unknown_benchmark(self, tmp_path):
        with pytest.raises(ValueError, match="no benchmark 'rewardbench-3', only rewardbench, vl-"):
            write(tmp_path, "rewardbench-3", [])

    def test_a_pair_counts_once(self, tmp_path):
        twice = [Result(3, "a", "povid", 1, 0), Result(3, "a", "povid", 1, 0)]
        with pytest.raises(ValueError, match="two results have one index"):
            write(tmp_path, "vl-rewardbench", twice)
