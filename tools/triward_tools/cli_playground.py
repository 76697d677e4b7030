"""The command `triward playground`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from triward.arguments import examples, port
from triward.client import RewardClient


def add_playground(commands: Any, server: argparse.ArgumentParser) -> None:
    """Add the command, whose `run` loads what it needs only when it is called."""
    command = commands.add_parser(
        "playground",
        help="a web page on this machine to try a server with images and responses",
        description="Show a page that scores what is typed and dropped into it. It has no login: "
        "listen where only those can connect who may ask the servers.",
        epilog=examples("triward playground --url localhost:8001 --port 7860"),
        parents=[server],
    )
    command.set_defaults(run=_run, error=command.error)
    command.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    command.add_argument("--port", type=port, default=0, help="0 takes a free one (%(default)s)")
    command.add_argument(
        "--http-url",
        action="append",
        default=[],
        metavar="URL",
        help="address of Triton's HTTP for the page's curl (port 8000); one for each --url",
    )
    command.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="below it lie images that an uploaded file of rows may name; without it none is read",
    )


def _run(client: RewardClient, options: argparse.Namespace) -> int:
    """Serve until a signal."""
    if find_spec("gradio") is None:
        options.error("needs gradio; in a checkout of Triward: pip install './tools[playground]'")
    if options.http_url and len(options.http_url) != len(options.url):
        options.error(f"--http-url: {len(options.http_url)} for {len(options.url)} --url")
    if options.images and not options.images.is_dir():
        options.error(f"--images: {options.images} is no folder")
    from triward_tools.playground.app import serve_page
    from triward_tools.playground.asking import Servers

    http = [url.rstrip("/") for url in options.http_url]
    serve_page(Servers(client, http, options.images), options.host, options.port)
    return 0
