"""The fields that tabs share: an image, a video or neither, a prompt, and 2 to 16 responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from mimetypes import guess_type
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from triward.errors import InvalidRequest

from triward_tools.playground.bars import refused

LEAST, MOST = 2, 16
HOURS = 6  # for which an uploaded file is kept


@dataclass(frozen=True)
class Draft:
    """Contents of the fields.

    Attributes:
        prompt: the user's text.
        responses: 2 to 16.
        media: an image or a video, as it was uploaded.
    """

    prompt: str
    responses: tuple[str, ...]
    media: Path | None = None

    @property
    def kind(self) -> str:
        """Type of the media's part: a video if its name says so, else an image."""
        kind, _ = guess_type(self.media.name) if self.media else (None, None)
        return "video" if kind and kind.startswith("video/") else "image"

    @property
    def size(self) -> int:
        """Bytes of the media.

        Raises:
            InvalidRequest: the file is no longer there.
        """
        assert self.media
        try:
            return self.media.stat().st_size
        except FileNotFoundError as error:
            raise InvalidRequest(
                f"{self.media.name}: was deleted {HOURS} hours after its upload; upload it again"
            ) from error

    def messages(self, *, by_name: bool = False) -> list[dict[str, Any]]:
        """Return the prompt for `RewardClient`; with the file's bare name where it is shown."""
        text = {"type": "text", "text": self.prompt}
        if self.media is None:
            return [{"role": "user", "content": [text]}]
        value = self.media.name if by_name else str(self.media)
        return [{"role": "user", "content": [{"type": self.kind, self.kind: value}, text]}]


def draft(media: str | None, prompt: str, responses: Sequence[str]) -> Draft:
    """Return checked fields.

    Raises:
        InvalidRequest: a field is empty, or there are too few or too many responses.
    """
    if not prompt.strip():
        raise InvalidRequest("prompt: is empty")
    if not LEAST <= len(responses) <= MOST:
        raise InvalidRequest(_outside(len(responses)))
    for number, response in enumerate(responses, start=1):
        if not response.strip():
            raise InvalidRequest(f"response {number}: is empty; write it, or remove its row")
    return Draft(prompt, tuple(responses), Path(media) if media else None)


class Form:
    """The fields, made where the constructor is called, within Gradio's blocks.

    Attributes:
        inputs: of an event that reads the fields; see `read`.
        outputs: of an event that fills them; see `fill`.
    """

    def __init__(self) -> None:  # noqa: D107 - the class says it
        self.media = gr.File(label="Image or video (optional)", height=140, elem_classes="tw-drop")
        self._preview = gr.HTML(visible=False, elem_classes=["tw-preview", "tw-flat"])
        self.prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12)
        self.count = gr.Number(LEAST, precision=0, visible=False)
        self.rows = [
            gr.Textbox(
                label=f"Response {n}", lines=2, max_lines=12, visible=n <= LEAST,
                elem_classes="tw-response",
            )
            for n in range(1, MOST + 1)
        ]  # fmt: skip
        with gr.Row():
            more = gr.Button("Add a response", size="sm", min_width=120)
            fewer = gr.Button("Remove the last", size="sm", min_width=120)
        limit = gr.HTML(elem_classes=["tw-limit", "tw-flat"])
        self.inputs = [self.media, self.prompt, self.count, *self.rows]
        self.outputs = self.inputs
        changed = [self.count, limit, *self.rows]
        # In the browser: of quick clicks, a stream of the server's answers may lose one.
        more.click(None, self.count, changed, js=_step(1))
        fewer.click(None, self.count, changed, js=_step(-1))
        self.media.change(
            _preview, self.media, self._preview, show_progress="hidden", api_visibility="private"
        )

    @staticmethod
    def read(media: str | None, prompt: str, count: int, *rows: str) -> Draft:
        """Return what the values of `inputs` say.

        Raises:
            InvalidRequest: see `draft`.
        """
        return draft(media, prompt or "", [row or "" for row in rows[:count]])

    @staticmethod
    def fill(filled: Draft) -> list[Any]:
        """Return values for `outputs`."""
        count = len(filled.responses)
        texts = [*filled.responses, *[""] * (MOST - count)]
        rows = [gr.update(value=text, visible=i < count) for i, text in enumerate(texts)]
        media = str(filled.media) if filled.media else None
        return [media, filled.prompt, count, *rows]


def _outside(count: object) -> str:
    return f"responses: the playground takes {LEAST} to {MOST}, got {count}"


def _step(by: int) -> str:
    """Return JavaScript that adds or removes a row, which it empties.

    Its function returns the number of rows shown, a sentence, and an update of that row; others
    are undefined, which leaves them as they are.
    """
    return f"""(count) => {{
        const wanted = count + {by}, shown = Math.min(Math.max(wanted, {LEAST}), {MOST});
        const rows = Array({MOST}).fill(undefined);
        if (shown > count) rows[count] = {{__type__: 'update', visible: true}};
        if (shown < count) rows[shown] = {{__type__: 'update', visible: false, value: ''}};
        const sentence = shown === wanted ? '' : `{refused(_outside("${wanted}"))}`;
        return [shown, sentence, ...rows];
    }}"""


def _preview(path: str | None) -> Any:
    """Return an update with the file's picture or player in HTML."""
    if not path:
        return gr.update(value="", visible=False)
    media = Draft("", (), Path(path))
    source = f"gradio_api/file={quote(path)}"  # below the page, also where a proxy moves it
    name = escape(media.media.name if media.media else "")
    if media.kind == "video":
        shown = f'<video src="{source}" controls muted aria-label="{name}"></video>'
    else:
        shown = f'<img src="{source}" alt="{name}">'
    return gr.update(value=shown, visible=True)
