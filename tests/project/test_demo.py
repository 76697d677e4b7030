"""`make demo`: what it prints, its page for a browser, and README's recording of it."""

from __future__ import annotations

import base64
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests import chromium
from tests.chromium import STICKING_OUT, sideways
from tests.commands import BIN
from tests.conftest import ROOT
from triward_server.serving.launch import TritonServer

browser, page = chromium.browser, chromium.page

EXAMPLES = ROOT / "examples"
RECORDING = ROOT / "docs" / "images" / "demo.svg"
TEXT = "{http://www.w3.org/2000/svg}text"


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], Any]]:
    """Imports a script of examples/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module


@pytest.fixture
def written(example: Callable[[str], Any], tmp_path: Path) -> Path:
    """The page of an outcome whose second answer is better."""
    demo, module = example("demo"), example("demo_page")
    answers = ["<b>no</b>", "yes"]
    outcome = module.Outcome(demo.CHART, demo.QUESTION, answers, [-1.0, 1.0], [-1.00002, 1.0])
    module.write_page(outcome, demo.NEXT, tmp_path / "new" / "demo.html")
    return tmp_path / "new" / "demo.html"


def options_of(command: str) -> set[str]:
    """The options that a command's help names."""
    program, name = command.split()[:2]
    asked = subprocess.run([BIN / program, name, "--help"], capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    return set(re.findall(r"--[a-z][\w-]*", asked.stdout))


def shape(line: str) -> str:
    """A line without its numbers, its bars and the width of its columns."""
    line = re.sub(r"[-+]?\d+(\.\d+)?(e-\d+)?", "#", line)
    return re.sub(r"[━╸╺]+( [━╸╺]+)*", "=", " ".join(line.split()))


def rows(path: Path) -> list[str]:
    """The lines of a recording that hold anything."""
    lines = [group for group in ElementTree.parse(path).getroot() if group.tag.endswith("}g")]
    return [" ".join(text.text or "" for text in line.iter(TEXT)) for line in lines]


class TestPage:
    def test_it_shows_what_was_sent_and_what_came_back(self, written: Path) -> None:
        text = written.read_text(encoding="utf-8")
        assert base64.b64encode((EXAMPLES / "chart.png").read_bytes()).decode() in text
        for shown in ("Is Purple the highest value?", "&lt;b&gt;no&lt;/b&gt;", "-1.00002"):
            assert shown in text
        found = re.findall(r"<li( class=best)?>.*?<b>([\d.]+%)</b>.*?width:([\d.]+%)", text)
        assert found == [("", "11.9%", "11.9%"), (" class=best", "88.1%", "88.1%")]
        assert "differ by 2.0e-05 at most" in text
        assert "$" not in re.sub('base64,[^"]*', "", text)

    def test_it_needs_no_network_and_no_script(self, written: Path) -> None:
        assert re.findall(r"https?://|<script|<link|@import", written.read_text("utf-8")) == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_fits_a_desk_and_a_phone(self, written: Path, page: Any, scheme: str) -> None:
        page.emulate_media(color_scheme=scheme)
        page.goto(written.as_uri())
        assert sideways(page) <= 0
        assert page.evaluate(STICKING_OUT) == []
        assert page.complaints == []
        assert [a for a in page.addresses if not a.startswith(("file:", "data:"))] == []
        widths = page.evaluate("[...document.querySelectorAll('.bar i')].map(i => i.offsetWidth)")
        assert 0 < widths[0] < widths[1]
        light = page.evaluate("getComputedStyle(document.body).backgroundColor.includes('24')")
        assert light == (scheme == "light")


def test_the_next_steps_are_commands_that_exist(example: Callable[[str], Any]) -> None:
    for _, commands in example("demo").NEXT:
        for command in commands:
            if command.startswith("make"):
                assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()
            elif command.startswith("triward"):
                assert set(re.findall(r"--[a-z][\w-]*", command)) <= options_of(command), command


@pytest.mark.parametrize(
    ("width", "folded"),
    [(80, "a b --c d --e f"), (12, "a b --c d \\\n        --e f"), (1, None)],
)
def test_a_wide_command_is_folded(
    width: int, folded: str | None, example: Callable[[str], Any]
) -> None:
    text = example("demo")._folded("a b --c d --e f", width)
    assert text == (folded or text)
    assert shlex.split(text.replace("\\\n", "")) == ["a", "b", "--c", "d", "--e", "f"]


@pytest.mark.slow
def test_the_demo_shows_what_came_back_and_the_recording_what_it_prints(
    example: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, temporary = tmp_path / "demo.html", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    command = [sys.executable, "examples/demo.py", "--page", str(picture)]
    lines = [line.plain for line in example("recording").printed(command)]
    output = "\n".join(lines)
    found = re.findall(r"The answer is: (\w).*%\s+(\S+)\s+(\S+)\s+\S+\s*$", output, re.MULTILINE)
    assert [answer for answer, *_ in found] == ["B", "A"]
    for _, served, card in found:
        assert float(served) == pytest.approx(float(card), rel=1e-4, abs=1e-4)
        assert served in picture.read_text("utf-8") and card in picture.read_text("utf-8")
    assert "random" in output and str(picture) in output
    assert list(temporary.iterdir()) == []
    printed = [shape(line) for line in lines if line.strip()]
    recorded = [shape(line) for line in rows(RECORDING)]
    place = next(n for n, line in enumerate(printed) if str(picture.name) in line)
    printed[place] = "build/demo.html"
    assert recorded[1 : 1 + len(printed)] == printed


class TestRecording:
    def test_it_is_a_picture_that_asks_for_nothing(self) -> None:
        text = RECORDING.read_text(encoding="utf-8")
        assert len(text.encode()) < 100_000
        kinds = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
        assert kinds == {"svg", "style", "rect", "g", "text"}
        assert set(re.findall(r"[a-z]+://[^\"\s]+", text)) == {"http://www.w3.org/2000/svg"}
        assert (
            re.findall(r"url\(|@import|@font-face|href|127\.0\.0\.1|/home|/root|/tmp", text) == []
        )

    def test_its_commands_exist(self) -> None:
        text = "\n".join(rows(RECORDING)).replace("\\\n", " ")
        asked = re.findall(r"^\$ +(.+)$", text, re.MULTILINE)
        assert [command.split()[:2] for command in asked] == [
            ["make", "demo"],
            ["triward", "score"],
        ]
        rule = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
        assert rule.splitlines()[1:] == ["\t$(BIN)/python examples/demo.py"]
        assert set(re.findall(r"--[a-z][\w-]*", asked[1])) <= options_of(asked[1])

    def test_it_shows_what_the_second_prints(
        self, example: Callable[[str], Any], server: TritonServer
    ) -> None:
        script = example("recording")
        lines = script.printed(script.score_command(server.endpoints.grpc))
        printed = [shape(line.plain) for line in lines if line.plain.strip()]
        assert len(printed) >= 3
        assert [shape(line) for line in rows(RECORDING)][-len(printed) :] == printed

    def test_it_is_well_formed_whatever_is_printed(self, example: Callable[[str], Any]) -> None:
        script = example("recording")
        line = script.Text.from_ansi('\x1b[1;31m<a & "b">\x1b[0m 京 \x1b[2mdim')
        drawn = script.draw([script.Text('$ <"x">'), script.Text(), line])
        root = ElementTree.fromstring(drawn)
        texts = [(text.text, text.get("fill"), text.get("class")) for text in root.iter(TEXT)]
        assert texts == [
            ('$ <"x">', None, None),
            ('<a & "b">', "#ff7b72", "bold"),
            (" 京 ", None, None),
            ("dim", "#8b949e", None),
        ]
        ends = [float(t.get("x", 0)) + float(t.get("textLength", 0)) for t in root.iter(TEXT)]
        assert ends[2] == pytest.approx(16 + 13 * 8.4, abs=0.2)  # 京 takes two columns

    def test_a_command_that_fails_is_not_recorded(self, example: Callable[[str], Any]) -> None:
        with pytest.raises(subprocess.CalledProcessError, match="status 3"):
            example("recording").printed([sys.executable, "-c", "raise SystemExit(3)"])
