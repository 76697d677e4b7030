"""Options that several commands share, as parent parsers."""

from __future__ import annotations

import argparse
from typing import Literal, get_args

from triward.arguments import whole_number
from triward.deadline import Deadline
from triward.routing import Routing


def server_options() -> argparse.ArgumentParser:
    """Return options that say how a server is reached, and `--json`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="JSON instead of text")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url",
        action="append",
        default=None,
        help="host of gRPC (localhost), or host:port (8001), or dns:///NAME:PORT; may repeat",
    )
    group.add_argument(
        "--routing",
        default="round_robin",
        choices=get_args(Routing),
        help="among several --url: in turn, or equal prompts to equal servers (%(default)s)",
    )
    group.add_argument("--model", default="reward", help="name of the ensemble (%(default)s)")
    group.add_argument("--timeout", type=_seconds, default=60.0, help="seconds (%(default)s)")
    group.add_argument(
        "--wait-ready",
        type=_waiting,
        default=0.0,
        metavar="SECONDS",
        help="for a server that is starting",
    )
    group.add_argument("--tls", action="store_true", help="encrypt, with gRPC's own authorities")
    group.add_argument("--tls-ca", metavar="FILE", help="encrypt, with this authority")
    group.add_argument("--tls-certificate", metavar="FILE", help="the client's own, with --tls-key")
    group.add_argument("--tls-key", metavar="FILE", help="the certificate's private key")
    group.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="NAME:VALUE",
        help="sent with every call; may repeat",
    )
    return parser


def prompt_options(responses: Literal["any", "two"]) -> argparse.ArgumentParser:
    """Return options of one prompt and its responses: any number, or A and B."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("prompt")
    group.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="path or URL; may repeat"
    )
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument("--prompt", metavar="TEXT", help="the user's text, after the images")
    if responses == "two":
        group.add_argument("--a", required=True, metavar="TEXT", help="response A")
        group.add_argument("--b", required=True, metavar="TEXT", help="response B")
    else:
        group.add_argument("--response", action="append", metavar="TEXT", help="may repeat")
    return parser


def lines_options() -> argparse.ArgumentParser:
    """Return options for files of conversations."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("file of conversations, instead of a prompt")
    group.add_argument(
        "--input",
        metavar="FILE",
        help='JSONL, - for standard input; a line is {"messages": […], "responses": […]}, or '
        '{"messages": […]} with the response as its last message',
    )
    group.add_argument(
        "--output", metavar="FILE", default="-", help="JSONL in the same order (standard output)"
    )
    group.add_argument("--force", action="store_true", help="replace an output that is there")
    group.add_argument(
        "--concurrency", type=whole_number, default=32, help="requests at once (%(default)s)"
    )
    group.add_argument("--progress", action="store_true", help="show a bar")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
        Deadline(seconds)  # raises for what no call could use
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return seconds


def _waiting(text: str) -> float:
    return _seconds(text) if text.strip("0.") else 0.0


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (name and colon):
        raise argparse.ArgumentTypeError(f"must be NAME:VALUE, got {text!r}")
    return name.strip().lower(), value.strip()
