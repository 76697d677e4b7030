"""The report in a real browser, on a desk and on a phone."""

from __future__ import annotations

import pytest

from tests import chromium
from tests.chromium import STICKING_OUT, sideways
from tests.evaluations import ANSWERS, groups_of, results_of, write
from triward_tools.evaluation.results import Problem

browser, page = chromium.browser, chromium.page

IMAGES = """() => [...document.images].map(image => image.complete && image.naturalWidth > 0)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """With names, reasons and responses that are long, and words that have no place to break."""
    folder = tmp_path_factory.mktemp("layout")
    write(
        folder,
        "vl-rewardbench",
        results_of("vl-rewardbench", 300),
        [
            Problem(900 + i, f"data/test-{i}.parquet, row {i}", "x" * 300 + " y" * 90)
            for i in range(12)
        ],
        model="an-organisation/a-model-with-" + "a-very-" * 12 + "long-name",
        chosen="\n".join(ANSWERS * 40) + "z" * 4000,
    )
    return folder / "report.html"


def test_fits_the_window(page, report):
    page.goto(report.as_uri())
    assert sideways(page) <= 0
    assert page.evaluate(STICKING_OUT) == []
    # Also with everything open.
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert sideways(page) <= 0
    assert page.evaluate(STICKING_OUT) == []


def test_prompts_with_many_responses_fit_the_window(page, tmp_path):
    write(tmp_path, "rewardbench-2", groups_of(90))
    page.goto((tmp_path / "report.html").as_uri())
    assert sideways(page) <= 0
    assert page.evaluate(STICKING_OUT) == []


def test_shows_every_picture_and_asks_for_nothing(page, report, tmp_path):
    page.goto(report.as_uri())
    shown = page.evaluate(IMAGES)
    assert len(shown) == 20 and all(shown)
    assert page.complaints == []
    assert {url.partition(":")[0] for url in page.addresses} <= {"file", "data"}
    assert [url for url in page.addresses if url.startswith("file:")] == [report.as_uri()]
    page.screenshot(path=tmp_path / "report.png", full_page=True)


def test_nothing_is_cut_off_for_good(page, report):
    """A long response ends inside its own scrolling box."""
    page.goto(report.as_uri())
    boxes = page.evaluate(
        "() => [...document.querySelectorAll('pre')].map("
        "b => [b.scrollHeight > b.clientHeight + 1, getComputedStyle(b).overflowY])"
    )
    assert any(longer for longer, _ in boxes)
    assert all(scrolls == "auto" for longer, scrolls in boxes if longer)


def test_dark_page_is_readable(browser, report):
    """Text and ground keep a contrast of at least 7 (WCAG 2 level AAA) in both schemes."""
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(report.as_uri())
        colours = page.evaluate(
            "() => ['color', 'backgroundColor'].map("
            "k => getComputedStyle(document.documentElement)[k].match(/\\d+/g).map(Number))"
        )
        bright, dark = sorted((luminance(c) for c in colours), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 7, scheme
        assert (luminance(colours[0]) > luminance(colours[1])) == (scheme == "dark")
        page.close()


def luminance(colour: list[int]) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (channel / 255 for channel in colour[:3])
    ]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


class TestTheseTestsCanFail:
    def test_a_page_that_is_too_wide_is_found(self, page, report, tmp_path):
        wide = tmp_path / "wide.html"
        text = report.read_text(encoding="utf-8")
        wide.write_text(text.replace(".scroll { overflow-x: auto; }", ""), encoding="utf-8")
        page.goto(wide.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.add_style_tag(content="table { min-width: 1400px }")
        assert sideways(page) > 0
        assert any(name.startswith("TABLE") for name in page.evaluate(STICKING_OUT))

    def test_broken_pictures_and_calls_are_found(self, page, tmp_path):
        bad = tmp_path / "bad.html"
        bad.write_text('<img src="data:image/png;base64,AAAA"><img src="file:///gone.png">')
        page.goto(bad.as_uri())
        assert page.evaluate(IMAGES) == [False, False]
        assert "file:///gone.png" in page.addresses
        assert page.complaints
