"""The first tab: score a prompt's responses, see them ranked, and copy the request."""

from __future__ import annotations

from dataclasses import replace
from math import exp
from typing import Any

import gradio as gr
from triward.errors import InvalidRequest, TriwardError

from triward_tools.playground.asking import Reply, Servers
from triward_tools.playground.bars import Bar, bars, preferred, refused, said
from triward_tools.playground.form import Draft, Form
from triward_tools.playground.snippets import Exchange, as_curl, as_json, as_python

_HEADERS = ["Run", "Prompt", "File", "Responses", "Best", "Its score", "ms"]
_WIDTHS: list[str | int] = [60, 280, 130, 110, 300, 110, 90]  # pixels
RUNS = 50  # that a session keeps
_EMPTY = "Scores appear here. Ctrl+Enter in any field scores."

Runs = list[tuple[int, Exchange]]  # with their numbers, from 1


def add(servers: Servers) -> None:
    """Add the tab's components and events, within its `gr.Tab`."""
    runs = gr.State([])  # of this session of the browser
    with gr.Row(elem_classes="tw-columns"):
        with gr.Column(scale=5, min_width=300):
            form = Form()
            server = gr.Dropdown(
                servers.urls, value=servers.urls[0], label="Server", visible=len(servers.urls) > 1
            )
            go = gr.Button("Score", variant="primary", elem_classes="tw-run")
        with gr.Column(scale=6, min_width=300):
            message = gr.HTML(said(_EMPTY), elem_classes=["tw-message", "tw-flat"])
            charts = gr.HTML(elem_classes=["tw-charts", "tw-flat"])
            with gr.Column(visible=False) as copies:
                texts = _copies()
    table = gr.Dataframe(
        label=f"Runs of this session, the last {RUNS}; click one to see it", elem_classes="tw-runs",
        headers=_HEADERS, interactive=False, buttons=[], max_chars=60, column_widths=_WIDTHS,
        visible=False,
    )  # fmt: skip
    shown = [message, charts, copies, *texts]

    def score(url: str, earlier: Runs, *values: Any) -> list[Any]:
        try:
            draft = Form.read(*values)
            reply = servers.ask(draft.messages(), draft.responses, url=url, count_prompt=True)
        except TriwardError as error:
            return [*_nothing(error), earlier, gr.update()]
        asked = Exchange(draft, reply, url, servers.model)
        kept = with_run(earlier, asked)
        return [*_results(servers, asked), kept, gr.update(value=_table(kept), visible=True)]

    def recall(earlier: Runs, event: gr.SelectData) -> list[Any]:
        # By its number, also where the visitor has sorted them.
        return recalled(servers, dict(earlier)[int(event.row_value[0])])

    go.click(
        score, [server, runs, *form.inputs], [*shown, runs, table],
        api_visibility="private", concurrency_limit=8, show_progress_on=message,
    )  # fmt: skip
    # One after the other, so that the last click counts.
    table.select(
        recall, [runs], [*shown, server, *form.outputs],
        api_visibility="private", show_progress="hidden", trigger_mode="multiple",
    )  # fmt: skip


def _copies() -> list[gr.Code]:
    """Return the three texts, each with a button that copies it."""
    texts = []
    for name in ("JSON", "curl", "Python"):
        with gr.Tab(name):
            texts.append(
                gr.Code(
                    label=f"Copy as {name}", interactive=False, max_lines=12, wrap_lines=True,
                    show_line_numbers=False, buttons=["copy"],
                    elem_classes=f"tw-{name.lower()}",
                )
            )  # fmt: skip
    return texts


def _nothing(error: TriwardError) -> list[Any]:
    """Return the sentence in place of results; earlier ones would look like this input's."""
    return [refused(error), "", gr.update(visible=False), "", "", ""]


def _results(servers: Servers, asked: Exchange) -> list[Any]:
    tls, headers = servers.client._address.tls, servers.header_names
    texts = [
        as_json(asked),
        as_curl(asked, servers.http_of(asked.url), tls, headers),
        as_python(asked, tls, headers),
    ]
    drawn = in_order(asked.draft, asked.reply) + ranking(asked.draft, asked.reply)
    return [said(summary(asked.draft, asked.reply)), drawn, gr.update(visible=True), *texts]


def recalled(servers: Servers, asked: Exchange) -> list[Any]:
    """Return a past run's results, its server and its fields; without its file, if that is gone."""
    draft = asked.draft
    try:
        results = _results(servers, asked)
    except InvalidRequest as error:
        results, draft = _nothing(error), replace(draft, media=None)
    return [*results, asked.url, *Form.fill(draft)]


def in_order(draft: Draft, reply: Reply) -> str:
    """Return bars in the order of the responses, with the tokens of each."""
    best, rows = reply.ranking[0], []
    for index, (text, score) in enumerate(zip(draft.responses, reply.scores, strict=True)):
        note = f"{reply.tokens[index]} tokens"
        if reply.prompt_tokens is not None:
            note += f", {reply.tokens[index] - reply.prompt_tokens} of its text"
        rows.append(Bar(str(index + 1), text, score, note, index == best))
    return bars("In the order given", rows)


def ranking(draft: Draft, reply: Reply) -> str:
    """Return bars, best first, with each margin over the next and Bradley-Terry's odds."""
    order, rows = reply.ranking, []
    for place, index in enumerate(order):
        note = ""
        if place + 1 < len(order):
            after = order[place + 1]
            note = odds(reply.scores[index] - reply.scores[after], after + 1)
        rows.append(
            Bar(str(index + 1), draft.responses[index], reply.scores[index], note, place == 0)
        )
    return bars("Ranked, best first", rows)


def odds(margin: float, over: int) -> str:
    """Return a margin in words: its size, the chance to be preferred, and the odds."""
    chance = f"{100 * preferred(margin):.1f} %" if margin < 7 else "> 99.9 %"
    ratio = f"{exp(margin):.2f}" if margin < 10 else f"{exp(min(margin, 700)):.1e}"
    if margin > 700:  # near the end of a float's range
        ratio = f"> {ratio}"
    return f"+{margin:.4f} over {over}: preferred with {chance}, odds {ratio} to 1"


def summary(draft: Draft, reply: Reply) -> str:
    """Return the time, and which tokens the responses share."""
    count, total = len(draft.responses), sum(reply.tokens)
    text = f"{count} responses in {reply.milliseconds:.1f} ms. "
    if reply.prompt_tokens is None:
        reason = f" ({reply.prompt_error})" if reply.prompt_error else ""
        return text + f"{total} tokens; how many are the prompt's is not known{reason}."
    what = f"The prompt with its {draft.kind}" if draft.media else "The prompt"
    return text + (
        f"{what}, computed once for all, and the end of a turn, which each response has, are "
        f"{reply.prompt_tokens} tokens; one by one they would be {total} tokens."
    )


def with_run(earlier: Runs, asked: Exchange) -> Runs:
    """Return the runs with another, without the first where they are too many."""
    number = earlier[-1][0] + 1 if earlier else 1
    return [*earlier, (number, asked)][-RUNS:]


def _table(runs: Runs) -> list[list[str]]:
    """Return rows, the last run first."""
    rows = []
    for number, asked in reversed(runs):
        draft, reply = asked.draft, asked.reply
        best = reply.ranking[0]
        rows.append(
            [
                str(number), draft.prompt, draft.media.name if draft.media else "",
                str(len(draft.responses)), draft.responses[best], f"{reply.scores[best]:.4f}",
                f"{reply.milliseconds:.1f}",
            ]
        )  # fmt: skip
    return rows
