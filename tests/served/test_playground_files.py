"""The playground's second tab, in Chromium: files that the commands wrote with a real model."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

import triward.cli
from tests import chromium
from tests.chromium import complaints, sideways
from tests.commands import BIN, Command
from tests.conversations import image, picture, user
from tests.evaluations import ANSWERS, QUESTIONS, bars
from tests.rowfiles import read_rows, write_rows
from tests.served.test_playground import CONTRAST, STICKING_OUT, assert_sees
from triward_server.serving.launch import TritonServer

pytest.importorskip("gradio")

browser, page = chromium.browser, chromium.page

SIZES = """panel => [...panel.querySelectorAll('article img')].map(
    image => [image.naturalWidth, image.naturalHeight])"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("playground")


@pytest.fixture(scope="module")
def address(server: TritonServer, folder: Path) -> Iterator[str]:
    """A playground that may show images of `folder / "images"`."""
    (folder / "images").mkdir()
    command = Command(
        BIN / "triward", "playground", "--url", server.endpoints.grpc, "--port=0",
        "--images", folder / "images",
    )  # fmt: skip
    try:
        yield command.wait_for(r"^playground at (http://\S+)$")[1]
    finally:
        command.kill()


@pytest.fixture(scope="module")
def written(server: TritonServer, folder: Path, address: str) -> Path:
    """Files of `triward score`, `pairs` and `pairs` in Parquet, of prompts with images."""
    rows = []
    for n in range(6):
        path = folder / "images" / f"{n}.png"
        picture(60 + n, 48, n).save(path)
        responses = [text * (1 + n) for text in ("Four. ", "It is 4, as 2 + 2. ", "No")]
        question = user(image(str(path)), f"What is shown in {n}?")
        rows.append({"id": n, "messages": [question], "responses": responses})
    source = write_rows(folder / "in.jsonl", [*rows, {"messages": "none"}])
    pairs = write_rows(folder / "pairs-in.jsonl", rows)
    for command, given, name, code in (
        ("score", source, "scored.jsonl", 2),
        ("pairs", pairs, "pairs.jsonl", 0),
        ("pairs", pairs, "pairs.parquet", 0),
    ):
        url = ["--url", server.endpoints.grpc]
        paths = ["--input", str(given), "--output", str(folder / name)]
        assert triward.cli.main([command, *url, *paths]) == code
    return folder


def opened(page: Page, address: str, path: Path) -> Locator:
    """The tab's panel after a file was dropped there."""
    if not page.url.startswith(address):
        page.goto(address)
    page.get_by_role("tab", name="Scored file").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    if panel.get_by_label("Remove this file").count():
        panel.get_by_label("Remove this file").click()
    panel.locator("input[type=file]").set_input_files(path)
    expect(panel.locator("#scored h3, #scored [role=alert]").first).to_be_visible(timeout=60_000)
    return panel


def facts(panel: Locator) -> dict[str, str]:
    names, values = (panel.locator(f".tw-facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def assert_fits(page: Page) -> None:
    assert sideways(page) <= 0
    assert page.evaluate(STICKING_OUT) == []


def test_scores_of_the_command_are_drawn(page: Page, address: str, written: Path) -> None:
    panel = opened(page, address, written / "scored.jsonl")
    rows = read_rows(written / "scored.jsonl")
    scores = [score for row in rows for score in row.get("scores", [])]
    told = facts(panel)
    assert (told["rows"], told["with scores"], told["with an error"]) == ("7", "6", "1")
    assert (told["scores"], told["highest"]) == ("18", f"{max(scores):.4g}".replace("-", "−"))
    assert panel.locator("figure svg").count() == 2
    assert "within rows" in panel.locator("[data-chart=lengths]").inner_text()
    assert panel.locator("[data-chart=lengths] use").count() >= 18
    # The row without a score is there, with its error.
    unscored = panel.locator("#scored tbody tr").inner_text()
    assert unscored.startswith("line 7") and "needs 'messages', a list" in unscored
    assert_fits(page)
    assert complaints(page) == []


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_worst_pairs_are_shown_with_their_images(
    page: Page, address: str, written: Path, suffix: str
) -> None:
    rows = sorted(read_rows(written / f"pairs.{suffix}"), key=lambda row: row["margin"])
    panel = opened(page, address, written / f"pairs.{suffix}")
    assert panel.locator("figure svg").count() == 3
    heads = panel.locator("article strong").all_inner_texts()
    assert heads == [f"margin {row['margin']:+.4f}" for row in rows]
    # Each picture has a width of its own, which tells whose it is.
    shown = page.evaluate(SIZES, panel.element_handle())
    assert shown == [[60 + row["id"], 48] for row in rows]
    assert (
        rows[0]["chosen"][0]["content"].strip() in panel.locator("article pre").nth(1).inner_text()
    )
    assert_fits(page)
    assert complaints(page) == []
    hosts = {url.split("/")[2] for url in page.addresses if url.startswith("http")}
    assert hosts == {address.split("/")[2]}


def test_files_of_the_machine_are_not_shown(page: Page, address: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(bars(1))
    parts = [{"type": "image", "image": value} for value in (
        str(tmp_path / "secret.png"), "../secret.png", "/etc/passwd", "file:///etc/passwd",
        "http://127.0.0.1:1/a.png",
    )]  # fmt: skip
    row = {
        "prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b",
        "score_chosen": 0.0, "score_rejected": 1.0,
    }  # fmt: skip
    panel = opened(page, address, write_rows(tmp_path / "rows.jsonl", [row]))
    assert panel.locator("article img").count() == 0
    assert panel.locator("article .tw-note").count() == 5
    assert panel.locator("article").get_attribute("data-verdict") == "wrong"
    assert_fits(page)


def test_a_bad_file_is_a_sentence(page: Page, address: str, tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    panel = opened(page, address, tmp_path / "broken.parquet")
    said = panel.get_by_role("alert").inner_text()
    assert said.startswith("broken.parquet: ") and "/" not in said.split(":")[0]
    assert complaints(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_can_be_read(
    browser: Browser, address: str, width: int, scheme: str, tmp_path: Path
) -> None:
    """Pictures for the documentation are made here: PLAYGROUND_PICTURES=docs/images."""
    page = browser.new_page(viewport={"width": width, "height": 1280}, color_scheme=scheme)
    page.goto(address)
    panel = opened(page, address, write_rows(tmp_path / "pairs.parquet", made_up(150)))
    assert panel.locator("article").count() == 10
    assert page.evaluate("document.querySelector('.dark') !== null") is (scheme == "dark")
    assert page.evaluate(CONTRAST.replace("'main *, .gradio-container *'", "'#scored *'")) == []
    assert_fits(page)
    page.evaluate("scrollTo(0, 0)")
    shot = (
        Path(os.environ.get("PLAYGROUND_PICTURES", tmp_path))
        / f"playground-file-{width}-{scheme}.png"
    )
    page.screenshot(path=shot)
    assert shot.stat().st_size < 150_000
    assert_sees(page, "#scored article")
    page.close()


def made_up(count: int) -> list[dict[str, Any]]:
    """Pairs with pictures, and scores that grow with length; one row has none."""
    rng = random.Random(3)
    rows: list[dict[str, Any]] = []
    for n in range(count):
        asked, right, wrong = (each[n % 3] for each in (QUESTIONS, ANSWERS, ANSWERS[1:] + ANSWERS))
        answers = [right * rng.choice([1, 1, 2]), " ".join(wrong.split()[: rng.randint(3, 12)])]
        scores = [
            gain + len(text) / 60 + rng.gauss(0, 1)
            for gain, text in zip((0.6, 0.0), answers, strict=True)
        ]
        says = [[{"role": "assistant", "content": text}] for text in answers]
        prompt = [user({"type": "image"}, asked)]
        rows.append({
            "prompt": prompt, "images": [{"bytes": bars(n), "path": None}],
            "chosen": says[0], "rejected": says[1],
            "score_chosen": scores[0] if n else None, "score_rejected": scores[1],
        })  # fmt: skip
    return rows
