"""The playground in Chromium against the real server: its numbers, its layout, its requests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests import chromium
from tests.asking import wait_until
from tests.chromium import sideways
from tests.commands import BIN, Command, assert_gone
from tests.conftest import ROOT, Served
from tests.videos import film

pytest.importorskip("gradio")

browser = chromium.browser
expect.set_options(timeout=30_000)

CHART = ROOT / "examples" / "chart.png"
QUESTION = "Which colour has the highest bar?"
ANSWERS = (
    "Purple: its bar reaches 86, above Crimson's 73.",
    "Olive, since it stands at the right.",
    'It\'s Crimson, "at 73".',
)
WIDTHS = {"desk": 1280, "phone": 390}
# Elements that stick out of the window; tables and the texts to copy scroll within themselves.
# Gradio's blocks clip what is in them, so that `chromium.STICKING_OUT` would find nothing.
STICKING_OUT = """() => [...document.querySelectorAll('.gradio-container *')].filter((element) => {
    const box = element.getBoundingClientRect();
    return element.checkVisibility() && box.width > 0
        && !element.closest('.tw-runs, .cm-editor, .tw-scroll')
        && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map((element) => element.tagName + '.' + element.getAttribute('class'))"""
# Contrast of each element that holds text of its own, against the first background that covers.
CONTRAST = """() => {
    const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length === 3 || colour[3] > 0.99) return colour;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll('main *, .gradio-container *')].filter((e) =>
        e.checkVisibility({opacityProperty: true, visibilityProperty: true}) && !e.disabled &&
        [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())
    ).map((e) => {
        const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.className + ': ' +
            e.textContent.trim().slice(0, 40)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


def messages(media: Path | None = CHART, kind: str = "image") -> list[dict[str, Any]]:
    text = {"type": "text", "text": QUESTION}
    part = [{"type": kind, kind: str(media)}] if media else []
    return [{"role": "user", "content": [*part, text]}]


@pytest.fixture(scope="module")
def exact(served: Callable[..., Served]) -> Served:
    """A model whose scores do not depend on what was asked before, in their last bit either."""
    return served("exact", "--deterministic")


@pytest.fixture(scope="module")
def address(exact: Served) -> Iterator[str]:
    at = exact.server.endpoints
    command = Command(
        BIN / "triward", "playground", "--url", at.grpc, "--model", exact.names.ensemble,
        "--http-url", f"http://127.0.0.1:{at.http_port}", "--timeout=120",
    )  # fmt: skip
    yield command.wait_for(r"^playground at (http://\S+)$")[1]
    command.process.terminate()
    assert command.wait() == 0, command.output
    assert command.output.count("\n") == 1, command.output


class Visit:
    """A browser's session that remembers what went wrong and what it asked of the network."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.address = address
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self._hear(message))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        context.on("request", lambda request: self.asked.append(request.url))
        context.on("response", lambda answer: self._see(answer))
        self.page.goto(address)
        expect(self.button("Score")).to_be_visible()

    def _hear(self, message: Any) -> None:
        if message.type == "error":  # Gradio warns of a method that its own streams lack
            self.complaints.append(message.text)

    def _see(self, answer: Any) -> None:
        if answer.status >= 400:
            self.complaints.append(f"{answer.status} {answer.url}")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def fill(self, *answers: str, media: Path | None = None, prompt: str = QUESTION) -> None:
        if media:
            self.page.locator(".tw-drop input[type=file]").set_input_files(media)
            expect(self.page.locator(".tw-preview img, .tw-preview video")).to_be_visible()
        self.page.get_by_label("Prompt").fill(prompt)
        for number, answer in enumerate(answers, start=1):
            box = self.page.get_by_label(f"Response {number}", exact=True)
            if not box.is_visible():
                self.button("Add a response").press("Enter")
            box.fill(answer)

    def score(self) -> None:
        self.button("Score").click()
        self.done()

    def done(self) -> None:
        expect(self.page.locator(".tw-charts .tw-bars")).to_have_count(2)

    def chart(self, title: str) -> list[tuple[str, str]]:
        """Name and score of each bar."""
        section = self.page.locator(".tw-bars", has_text=title)
        return list(
            zip(
                section.locator("li > b").all_inner_texts(),
                section.locator("li > strong").all_inner_texts(),
                strict=True,
            )
        )

    def runs(self) -> Locator:
        """The first cell of each row of the table."""
        return self.page.locator(".tw-runs [role=gridcell][data-col='0']")

    def refused(self) -> str:
        alert = self.page.locator(".tw-message [role=alert]")
        expect(alert).to_be_visible()
        assert self.page.locator(".tw-charts li").count() == 0
        return alert.inner_text()

    def copied(self, kind: str) -> str:
        """What the button of a text puts into the clipboard."""
        self.page.get_by_role("tab", name=kind, exact=True).click()
        block = self.page.locator(f".tw-{kind.lower()}")
        block.get_by_role("button").first.click()
        self.page.wait_for_function("navigator.clipboard.readText().then((t) => t.length > 0)")
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def check(self) -> None:
        """No complaint, and no request that leaves the machine."""
        assert self.complaints == []
        inside = (self.address, "data:", "blob:" + self.address)
        assert [url for url in self.asked if not url.startswith(inside)] == []
        assert len(self.asked) > 5


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Open]:
    contexts = []

    def run(width: int = 1280, scheme: Any = "light", at: str = address) -> Visit:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme,
            permissions=["clipboard-read", "clipboard-write"],
        )  # fmt: skip
        contexts.append(context)
        return Visit(context, at)

    yield run
    for context in contexts:
        context.close()


def rounded(score: float) -> str:
    return f"{score:.4f}".replace("-", "\N{MINUS SIGN}")


def test_an_image_is_scored_ranked_and_copied(visit: Open, exact: Served, tmp_path: Path) -> None:
    shown = visit()
    shown.fill(*ANSWERS, media=CHART)
    shown.score()
    scores = exact.client.score_responses(messages(), ANSWERS)
    order = exact.client.rank(messages(), ANSWERS)
    assert order != sorted(order), "the model ranks as they are given, which shows nothing"
    names = [str(index + 1) for index in range(len(ANSWERS))]
    assert shown.chart("In the order given") == [
        (name, rounded(score)) for name, score in zip(names, scores, strict=True)
    ]
    assert shown.chart("Ranked, best first") == [(names[i], rounded(scores[i])) for i in order]
    copied = json.loads(shown.copied("JSON"))
    assert copied["scores"] == scores, "bit for bit"
    assert copied["ranking"] == order
    assert copied["prompt_tokens"] < min(copied["tokens"])
    (tmp_path / CHART.name).write_bytes(CHART.read_bytes())
    check_curl(shown.copied("curl"), copied, tmp_path)
    check_python(shown.copied("Python"), scores, tmp_path)
    shown.check()


def check_curl(command: str, copied: dict[str, Any], folder: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    outputs = {tensor["name"]: tensor["data"] for tensor in json.loads(done.stdout)["outputs"]}
    # JSON of Triton's has as many digits as a float32 needs.
    assert [float(f"{x:.6g}") for x in outputs["scores"]] == [
        float(f"{x:.6g}") for x in copied["scores"]
    ]
    assert outputs["token_counts"] == copied["tokens"]


def check_python(program: str, scores: list[float], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program + "\nprint(scores)"], cwd=folder, capture_output=True,
        text=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == scores


def test_text_alone_is_scored(visit: Open, exact: Served, tmp_path: Path) -> None:
    shown = visit()
    live = shown.page.locator(".block.tw-message[aria-live=polite]").element_handle()
    shown.fill(*ANSWERS[:2])
    shown.score()
    assert live is not None and "2 responses in" in live.inner_text(), "it is the same element"
    scores = exact.client.score_responses(messages(None), ANSWERS[:2])
    copied = json.loads(shown.copied("JSON"))
    assert copied["scores"] == scores
    check_curl(shown.copied("curl"), copied, tmp_path)
    shown.check()


def test_a_video_is_scored(visit: Open, exact: Served, tmp_path: Path) -> None:
    clip = Path(film(tmp_path / "clip.webm", 8, codec="libvpx"))
    shown = visit()
    shown.fill(*ANSWERS[:2], media=clip)
    shown.score()
    scores = exact.client.score_responses(messages(clip, "video"), ANSWERS[:2])
    copied = json.loads(shown.copied("JSON"))
    assert copied["scores"] == scores
    assert copied["messages"][0]["content"][0] == {"type": "video", "video": "clip.webm"}
    check_python(shown.copied("Python"), scores, tmp_path)
    shown.check()


def test_a_run_comes_back(visit: Open, exact: Served) -> None:
    shown = visit()
    shown.fill(*ANSWERS, media=CHART)
    shown.score()
    first = shown.chart("Ranked, best first")
    shown.fill("Another.", prompt="Something else?")
    shown.score()
    expect(shown.runs()).to_have_count(2)
    assert shown.chart("Ranked, best first") != first
    go_to_run(shown, QUESTION, shown.runs().last.click)
    check_first(shown, first)
    go_to_run(shown, "Something else?", shown.runs().first.click)
    # The table is one stop of Tab; arrows move in it.
    go_to_run(shown, QUESTION, lambda: arrow_down(shown) and shown.page.keyboard.press("Enter"))
    check_first(shown, first)
    expect(shown.page.locator(".tw-preview img")).to_be_visible()
    shown.score()
    expect(shown.runs()).to_have_count(3)
    assert shown.chart("Ranked, best first") == first, "the image came back, too"
    shown.check()


def go_to_run(shown: Visit, prompt: str, act: Callable[[], object]) -> None:
    """Act until the run's prompt is there: a click while the table is drawn anew is lost."""

    def arrived() -> bool:
        act()
        try:
            expect(shown.page.get_by_label("Prompt")).to_have_value(prompt, timeout=3000)
        except AssertionError:
            return False
        return True

    wait_until(arrived)


def arrow_down(shown: Visit) -> bool:
    """Press it in the first run; whether that leads to the last."""
    shown.runs().first.focus()
    shown.page.keyboard.press("ArrowDown")
    return bool(shown.runs().last.evaluate("cell => cell === document.activeElement"))


def check_first(shown: Visit, ranked: list[tuple[str, str]]) -> None:
    expect(shown.page.get_by_label("Prompt")).to_have_value(QUESTION)
    expect(shown.page.get_by_label("Response 1", exact=True)).to_have_value(ANSWERS[0])
    assert shown.chart("Ranked, best first") == ranked


def test_what_cannot_be_scored_is_said(visit: Open, exact: Served, tmp_path: Path) -> None:
    shown = visit()
    shown.button("Remove the last").click()
    limit = shown.page.locator("[role=alert]", has_text="the playground takes 2 to 16")
    expect(limit).to_contain_text("got 1")
    for _ in range(15):
        shown.button("Add a response").press("Enter")  # its place moves while rows come
    expect(limit).to_contain_text("got 17")
    expect(shown.page.locator(".tw-response:visible")).to_have_count(16)
    # Gradio's stream of answers may lose one of quick clicks: none is asked of the server.
    assert not [url for url in shown.asked if "/queue/" in url]
    shown.button("Score").click()
    assert shown.refused() == "prompt: is empty"
    shown.check()


def test_an_image_that_is_none_is_the_clients_error(
    visit: Open, exact: Served, tmp_path: Path
) -> None:
    spoilt = tmp_path / "spoilt.png"
    spoilt.write_bytes(b"no picture")
    shown = visit()
    shown.page.locator(".tw-drop input[type=file]").set_input_files(spoilt)
    expect(shown.page.locator(".tw-preview img")).to_have_count(1)
    shown.fill(*ANSWERS[:2])
    shown.button("Score").click()
    sentence = shown.refused()
    with pytest.raises(ValueError) as caught:
        exact.client.score_responses(messages(spoilt), ANSWERS[:2])
    assert sentence == str(caught.value)
    shown.check()


def test_a_dead_servers_sentence(
    visit: Open, command: Callable[..., Command], exact: Served, tmp_path: Path
) -> None:
    url, folder = "127.0.0.1:9", str(tmp_path)  # the command is killed, and leaves its folder
    started = command(BIN / "triward", "playground", "--url", url, TMPDIR=folder)
    shown = visit(at=started.wait_for(r"^playground at (http://\S+)$")[1])
    shown.fill(*ANSWERS[:2], media=CHART)
    shown.button("Score").click()
    assert shown.refused().startswith("nothing listens on 127.0.0.1:9; ")
    shown.check()


def test_the_keyboard_is_enough(visit: Open, exact: Served) -> None:
    shown = visit()
    keys = shown.page.keyboard
    shown.page.locator("body").click(position={"x": 2, "y": 2})
    _tab_to(shown.page, "Prompt")
    keys.type(QUESTION)
    for number, answer in enumerate(ANSWERS[:2], start=1):
        _tab_to(shown.page, f"Response {number}")
        keys.type(answer)
    keys.press("Control+Enter")
    shown.done()
    scores = exact.client.score_responses(messages(None), ANSWERS[:2])
    assert [score for _, score in shown.chart("In the order given")] == [*map(rounded, scores)]
    shown.check()


def _tab_to(page: Page, label: str) -> None:
    """Press Tab until the field with this label has the focus."""
    for _ in range(25):
        page.keyboard.press("Tab")
        here = page.evaluate(
            "document.activeElement.closest('label')?.innerText.split('\\n')[0].trim() ?? ''"
        )
        if here == label:
            return
    raise AssertionError(f"25 Tabs do not lead to {label!r}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_it_fits_and_can_be_read(
    device: str, scheme: str, visit: Open, exact: Served, tmp_path: Path
) -> None:
    """Pictures for the documentation are made here: PLAYGROUND_PICTURES=docs/images."""
    shown = visit(WIDTHS[device], scheme)
    assert sideways(shown.page) <= 0
    assert shown.page.evaluate(CONTRAST) == []
    shown.fill(*ANSWERS, media=CHART)
    shown.score()
    expect(shown.runs()).to_have_count(1)
    assert sideways(shown.page) <= 0
    assert shown.page.evaluate(STICKING_OUT) == []
    dark = "document.querySelector('.dark') !== null"
    assert shown.page.evaluate(dark) is (scheme == "dark")
    assert shown.page.evaluate(CONTRAST) == []
    folder = Path(os.environ.get("PLAYGROUND_PICTURES", tmp_path))
    picture = folder / f"playground-{WIDTHS[device]}-{scheme}.png"
    shown.page.evaluate("scrollTo(0, 0)")
    if device == "phone":
        shown.button("Add a response").evaluate("button => button.scrollIntoView()")
    shown.page.screenshot(path=picture, full_page=device == "desk")
    assert picture.stat().st_size < 150_000
    assert_sees(shown.page, ".tw-charts li")
    shown.check()


def assert_sees(page: Page, selector: str) -> None:
    """The control of STICKING_OUT: it finds what is made too wide."""
    page.add_style_tag(content=f"{selector} {{ min-width: 1400px }}")
    assert page.evaluate(STICKING_OUT) != []


@pytest.mark.slow
def test_one_command_shows_it(command: Callable[..., Command], tmp_path: Path) -> None:
    """What `make playground` runs: a server of its own, and the page."""
    script = ROOT / "examples" / "playground.py"
    shown = command(sys.executable, script, "--timeout=90", TMPDIR=str(tmp_path))
    served = shown.wait_for(r"^serving at (\S+);")[1]
    address = shown.wait_for(r"^playground at (http://127\.0\.0\.1:\d+)$")[1]
    with urllib.request.urlopen(address, timeout=30) as page:
        assert served in page.read().decode()
    family = shown.family()
    os.killpg(shown.process.pid, signal.SIGINT)  # as a terminal sends it
    assert shown.wait() == 0, shown.output
    assert_gone(family)
    assert list(tmp_path.iterdir()) == []


def test_pictures_in_the_docs_are_small() -> None:
    text = (ROOT / "docs" / "playground.md").read_text(encoding="utf-8")
    for name in re.findall(r"images/(playground-\S+\.png)", text):
        assert (ROOT / "docs" / "images" / name).stat().st_size < 150_000
