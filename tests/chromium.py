"""Pages in headless Chromium, on a desk and on a phone. A test module imports the fixtures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()

# Elements that stick out of the window, unless something around them scrolls or clips.
STICKING_OUT = """() => [...document.querySelectorAll('body *')].filter(element => {
    const box = element.getBoundingClientRect();
    if (box.width === 0 || (box.right <= innerWidth + 0.5 && box.left >= -0.5)) return false;
    for (let around = element.parentElement; around; around = around.parentElement) {
        if (getComputedStyle(around).overflowX !== 'visible' && around !== document.body
            && around !== document.documentElement) return false;
    }
    return true;
}).map(element => element.tagName + '.' + element.getAttribute('class'))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium (Debian: chromium) is not on PATH, and $CHROMIUM is not set")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390], ids=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """A page that remembers what went wrong and what it asked of the network."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.complaints, page.addresses = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda asked: page.addresses.append(asked.url))
    yield page
    page.close()


def sideways(page: Page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.scrollingElement.scrollWidth - innerWidth")


def complaints(page: Page) -> list[str]:
    """What went wrong on a page of Gradio's, whose own streams warn that they lack a method."""
    return [text for text in page.complaints if text != "Method not implemented."]
