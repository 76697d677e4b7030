"""The playground's third tab, in Chromium: two servers, two models, or a server and none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests import chromium
from tests.chromium import complaints, sideways
from tests.commands import BIN, Command
from tests.conftest import Served
from tests.conversations import image, picture, user
from tests.served.test_playground import CHART, CONTRAST, STICKING_OUT, assert_sees
from triward import RewardClient, ServerUnavailable
from triward.many import ranked
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.serving.launch import TritonServer

pytest.importorskip("gradio")

browser, page = chromium.browser, chromium.page

PROMPT = "What does the picture show?"
RESPONSES = ["A gradient.", "Some blocks of colour on a gradient.", "Nothing", "I cannot see it."]
DEAD = "127.0.0.1:9"
OTHER = "other"  # name of the second model


@pytest.fixture(scope="module")
def other(served: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> RewardClient:
    """A model of other weights beside the session's."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    make_checkpoint("tiny", 5, folder)
    return served(OTHER, source=folder).client


@pytest.fixture(scope="module")
def address(server: TritonServer) -> Iterator[str]:
    urls = [f"--url={url}" for url in (server.endpoints.grpc, DEAD)]
    command = Command(BIN / "triward", "playground", *urls, "--port=0")
    try:
        yield command.wait_for(r"^playground at (http://\S+)$")[1]
    finally:
        command.kill()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "picture.png"
    picture(90, 60, 3).save(path)
    return path


def filled(page: Page, address: str, media: Path | None = None) -> Locator:
    """The tab's panel with the input."""
    page.goto(address)
    page.get_by_role("tab", name="Compare").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    if media:
        panel.locator("input[type=file]").set_input_files(media)
        expect(panel.locator(".tw-preview img")).to_be_visible()
    panel.get_by_label("Prompt").fill(PROMPT)
    for number, text in enumerate(RESPONSES, start=1):
        if number > 2:
            # Not clicked: its place moves while rows come.
            panel.get_by_role("button", name="Add a response").press("Enter")
        panel.get_by_label(f"Response {number}", exact=True).fill(text)
    return panel


def choose(page: Page, panel: Locator, side: str, url: str, model: str = "reward") -> None:
    panel.get_by_label(f"{side}: server").click()
    page.get_by_role("option", name=url).click()
    expect(page.get_by_role("option")).to_have_count(0)  # else the other side's list has it, too
    panel.get_by_label(f"{side}: model").fill(model)


def run(panel: Locator) -> Locator:
    """The answer."""
    panel.get_by_role("button", name="Compare").click()
    answer = panel.locator("#compared")
    expect(answer.locator(".tw-sides")).to_be_visible(timeout=60_000)
    return answer


def scores(answer: Locator, side: str) -> list[float]:
    texts = answer.locator(f"[data-side={side}] strong").all_inner_texts()
    return [float(text.replace("−", "-")) for text in texts]


def assert_well(page: Page) -> None:
    assert sideways(page) <= 0
    assert page.evaluate(STICKING_OUT) == []
    assert complaints(page) == []


def test_two_models_score_as_their_clients(
    page: Page, address: str, server: TritonServer, client: RewardClient, other: RewardClient,
    shown: Path,
) -> None:  # fmt: skip
    panel = filled(page, address, shown)
    choose(page, panel, "A", server.endpoints.grpc)
    choose(page, panel, "B", server.endpoints.grpc, OTHER)
    answer = run(panel)
    asked = [user(image(str(shown)), PROMPT)]
    expected = [each.score_responses(asked, RESPONSES) for each in (client, other)]
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
    for side, known in zip("AB", expected, strict=True):
        assert scores(answer, side) == pytest.approx(known, abs=2e-4)
        order = " > ".join(str(index + 1) for index in ranked(known))
        assert order in answer.inner_text()
    differences = [b - a for a, b in zip(*expected, strict=True)]
    told = [text.split(";")[0] for text in answer.locator("li .muted").all_inner_texts()]
    assert [float(text.removeprefix("B minus A ").replace("−", "-")) for text in told] == (
        pytest.approx(differences, abs=3e-4)
    )
    assert "Kendall's tau-b" in answer.inner_text()
    assert_well(page)


def test_one_server_twice_agrees(page: Page, address: str, server: TritonServer) -> None:
    panel = filled(page, address)
    for side in "AB":
        choose(page, panel, side, server.endpoints.grpc)
    text = run(panel).inner_text()
    assert "Both rank the responses alike." in text
    assert "both order 6 alike and 0 the other way round" in text
    assert_well(page)


def test_a_dead_server_leaves_the_other_side(
    page: Page, address: str, server: TritonServer, client: RewardClient
) -> None:
    panel = filled(page, address)
    choose(page, panel, "A", server.endpoints.grpc)
    choose(page, panel, "B", DEAD)
    answer = run(panel)
    with RewardClient(DEAD) as dead, pytest.raises(ServerUnavailable) as caught:
        dead.score_responses([user(PROMPT)], RESPONSES)
    expect(answer.get_by_role("alert")).to_have_text(f"B, reward at {DEAD}: {caught.value}")
    known = client.score_responses([user(PROMPT)], RESPONSES)
    assert scores(answer, "A") == pytest.approx(known, abs=2e-4)
    assert scores(answer, "B") == []
    assert_well(page)


def test_an_unknown_model_and_an_empty_response_are_sentences(
    page: Page, address: str, server: TritonServer
) -> None:
    panel = filled(page, address)
    choose(page, panel, "B", server.endpoints.grpc, "no-such-model")
    answer = run(panel)
    expect(answer.get_by_role("alert")).to_contain_text("no-such-model")
    panel.get_by_label("Response 2", exact=True).fill(" ")
    panel.get_by_role("button", name="Compare").click()
    expect(panel.locator("#compared [role=alert]")).to_contain_text("response 2: is empty")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_can_be_read(
    browser: Browser, address: str, server: TritonServer, other: RewardClient, width: int,
    scheme: str, tmp_path: Path,
) -> None:  # fmt: skip
    """Pictures for the documentation are made here: PLAYGROUND_PICTURES=docs/images."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    panel = filled(page, address, CHART)
    choose(page, panel, "B", server.endpoints.grpc, OTHER)
    run(panel)
    assert page.evaluate("document.querySelector('.dark') !== null") is (scheme == "dark")
    assert page.evaluate(CONTRAST.replace("'main *, .gradio-container *'", "'#compared *'")) == []
    assert sideways(page) <= 0 and page.evaluate(STICKING_OUT) == []
    page.evaluate("scrollTo(0, 0)")
    shot = (
        Path(os.environ.get("PLAYGROUND_PICTURES", tmp_path))
        / f"playground-compare-{width}-{scheme}.png"
    )
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size < 150_000
    assert_sees(page, "#compared li")
    page.close()
