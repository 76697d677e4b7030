"""The tab that asks two servers, or two models, about the same input."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gradio as gr
from triward.errors import InvalidRequest, TriwardError

from triward_tools.playground.asking import Reply, Servers
from triward_tools.playground.bars import refused
from triward_tools.playground.form import Draft, Form
from triward_tools.playground.sides import STYLE, Side, sides_page

__all__ = ["STYLE", "add", "compared"]

_NAMES = ("A", "B")


def add(servers: Servers) -> None:
    """Add the tab's fields to the blocks around."""
    with gr.Row():
        with gr.Column(min_width=320):
            form = Form()
            chosen = [_side_fields(name, servers) for name in _NAMES]
            run = gr.Button("Compare", variant="primary", elem_classes="tw-run")
        with gr.Column(min_width=320):
            result = gr.HTML(elem_id="compared")
    fields = [field for pair in chosen for field in pair]

    def ask(*values: Any) -> str:
        try:
            draft = Form.read(*values[: -len(fields)])
        except InvalidRequest as error:
            return refused(error)
        url_a, model_a, url_b, model_b = values[-len(fields) :]
        return compared(servers, draft, [(url_a, model_a), (url_b, model_b)])

    run.click(ask, [*form.inputs, *fields], result, api_visibility="private", concurrency_limit=8)


def _side_fields(name: str, servers: Servers) -> list[Any]:
    """Return the fields of a side: which server, which model."""
    urls = servers.urls
    first = urls[-1] if name == _NAMES[-1] else urls[0]
    with gr.Row():
        return [
            gr.Dropdown(urls, value=first, label=f"{name}: server", min_width=220),
            gr.Textbox(value=servers.model, label=f"{name}: model", min_width=220),
        ]


def compared(servers: Servers, draft: Draft, chosen: Sequence[tuple[str, str]]) -> str:
    """Return both sides' answers in HTML. Both are asked at once.

    Args:
        servers: who can be asked.
        draft: the input of both.
        chosen: server and model of A and of B; "" as for `Servers.ask`.
    """

    def ask(url: str, model: str) -> Reply | TriwardError:
        try:
            return servers.ask(draft.messages(), draft.responses, url=url, model=model)
        except TriwardError as error:
            return error

    named = [
        (url or servers.urls[0], (model or "").strip() or servers.model) for url, model in chosen
    ]
    with ThreadPoolExecutor(len(named)) as pool:
        answers = list(pool.map(ask, *zip(*named, strict=True)))
    sides = [
        Side(name, *each, answer) for name, each, answer in zip(_NAMES, named, answers, strict=True)
    ]
    return sides_page(draft.responses, sides)
