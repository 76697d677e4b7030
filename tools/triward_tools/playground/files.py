"""The tab that opens a file with scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from triward.errors import InvalidRequest

from triward_tools.playground.asking import Servers
from triward_tools.playground.bars import refused
from triward_tools.playground.gallery import Gallery
from triward_tools.playground.page import file_page
from triward_tools.playground.scored import FILE_BYTES, ROWS, read_scored_file

STYLE = Path(__file__).with_name("scored.css").read_text(encoding="utf-8")

_SUFFIXES = [".jsonl", ".ndjson", ".json", ".parquet"]


def add(servers: Servers) -> None:
    """Add the tab's fields to the blocks around. No server is asked."""
    gallery = Gallery(servers.images)
    gr.Markdown(
        "Open a file that `triward score`, `rank`, `best-of-n`, `filter`, `pairs` or `eval` wrote, "
        f"or another of this form: at most {FILE_BYTES // 2**20} MiB and {ROWS:,} rows."
    )
    file = gr.File(label="JSONL or Parquet with scores", file_types=_SUFFIXES, height=140)
    column = gr.Textbox(
        label="Column of scores (optional)",
        info="Without a name it is scores, score, score_chosen with score_rejected, or the one "
        "that has a column of errors. Press Enter after a change.",
    )
    shown = gr.HTML(elem_id="scored")
    # One at a time: matplotlib's settings are those of the process.
    options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1}
    gr.on(
        [file.change, column.submit],
        lambda path, name: opened(path, name, gallery),
        [file, column],
        shown,
        **options,
    )


def opened(path: str | None, column: str, gallery: Gallery) -> str:
    """Return the page of an uploaded file, or the sentence that says why there is none."""
    if not path:
        return ""
    try:
        return file_page(read_scored_file(Path(path), column.strip()), gallery)
    except InvalidRequest as error:
        return refused(error)
