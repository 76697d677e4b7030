"""The page with its three tabs, and the server that shows it on this machine."""

from __future__ import annotations

import os
import tempfile
from html import escape
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import uvicorn

from triward_tools.listening import serve_until_signal
from triward_tools.playground.asking import Servers
from triward_tools.playground.origin import SameOrigin

MOST_BYTES = 256 * 2**20  # of an uploaded file
_LOCAL = ("127.0.0.1", "localhost")
SWEEP = 600  # seconds between searches for files that were uploaded `form.HOURS` ago
_GRACE = 5  # seconds for answers that were begun when a signal comes


def make_page(servers: Servers) -> Any:
    """Return the page as `gradio.Blocks`."""
    import gradio as gr

    from triward_tools.playground import compare, files, form, score

    # Without analytics Gradio asks nobody whether there is a newer one, either.
    kept = (SWEEP, 3600 * form.HOURS)
    with gr.Blocks(
        title="Triward playground", analytics_enabled=False, delete_cache=kept
    ) as blocks:
        asked = f"{escape(servers.model)} at {escape(', '.join(servers.urls))}"
        head = f'<header class="tw-head"><h1>Triward playground</h1><p>{asked}</p></header>'
        gr.HTML(head, elem_classes="tw-flat")
        for name, tab in (("Score", score), ("Scored file", files), ("Compare", compare)):
            with gr.Tab(name):
                tab.add(servers)
    return blocks


def serve_page(servers: Servers, host: str, port: int) -> None:
    """Show the page until SIGINT or SIGTERM; uploaded files go with it.

    Args:
        servers: that the page may ask.
        host: where to listen.
        port: likewise; 0 takes a free one. The first line on standard output names it.

    Raises:
        InvalidRequest: nothing can listen there.
        TriwardError: the server of HTTP ended by itself.
    """
    with tempfile.TemporaryDirectory(prefix="triward-playground-") as folder:
        # Read by Gradio when it is imported and when a file arrives.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder).resolve())
        web, stop = mounted(servers, host)
        config = uvicorn.Config(
            web, log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=_GRACE,
        )  # fmt: skip
        try:
            serve_until_signal(
                uvicorn.Server(config), host, port, greeting="playground at", before_stop=stop
            )
        finally:
            servers.close()


def mounted(servers: Servers, host: str) -> tuple[Any, Any]:
    """Return the ASGI application for a host, and a function that ends the page's open streams."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from triward_tools.playground import bars, compare, files

    page = package_files("triward_tools.playground")
    styles = [page.joinpath("page.css").read_text("utf-8")]
    styles += [getattr(each, "STYLE", "") for each in (bars, files, compare)]
    closed: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    blocks = make_page(servers)
    # Else Gradio takes the page for one under construction, whose events may name any file.
    blocks.has_launched = True
    web = gr.mount_gradio_app(
        FastAPI(**closed),
        blocks,
        path="/",
        app_kwargs=closed,
        theme=_theme(),
        css="\n".join(styles),
        js=page.joinpath("page.js").read_text("utf-8"),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        root_path="",
    )
    if host in _LOCAL:  # a site whose name is made to lead here is not let in (DNS rebinding)
        web.add_middleware(TrustedHostMiddleware, allowed_hosts=[*_LOCAL])
    web.add_middleware(SameOrigin)  # Gradio itself lets every site in, but for pages on localhost
    inner: Any = web.routes[-1]
    return web, inner.app.stop_event.set


def _theme() -> Any:
    """Return Gradio's colours, darker or lighter where text had too little contrast (4.5 to 1)."""
    import gradio as gr

    # The system's own fonts, of which the page need load none.
    theme = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=[gr.themes.Font(name) for name in ("system-ui", "sans-serif")],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "monospace")],
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
