"""The command `triward`.

Exit codes: 0 scored, 2 wrong input or usage, 3 unavailable, 4 deadline exceeded, 1 other.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from triward.client import RewardClient
from triward.deadline import Deadline
from triward.errors import DeadlineExceeded, InvalidRequest, ServerUnavailable, TriwardError

_SHOWN_WIDTH = 72


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _tolerate_any_text(sys.stdout)
    _tolerate_any_text(sys.stderr)
    options = _parser().parse_args(argv)
    try:
        with RewardClient(options.url, timeout=options.timeout) as client:
            scores = client.score_responses(_messages(options), options.response)
    except TriwardError as error:
        print(f"triward: {error}", file=sys.stderr)
        return _exit_code(error)
    print(json.dumps({"scores": scores}) if options.json else _table(scores, options.response))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triward", description="Rewards from a Triward server.")
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="score responses to one prompt, best first")
    score.add_argument("--url", default="localhost:8001", help="host:port of gRPC (%(default)s)")
    score.add_argument("--image", action="append", default=[], help="path or URL; may repeat")
    score.add_argument("--system", help="system message")
    score.add_argument("--prompt", required=True, help="the user's text, after the images")
    score.add_argument("--response", action="append", required=True, help="may repeat")
    score.add_argument("--timeout", type=_seconds, default=60.0, help="seconds (%(default)s)")
    score.add_argument("--json", action="store_true", help="scores in the order given, as JSON")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
        Deadline(seconds)  # raises for what no call could use
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return seconds


def _messages(options: argparse.Namespace) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": image} for image in options.image]
    user = {"role": "user", "content": [*images, {"type": "text", "text": options.prompt}]}
    if options.system is None:
        return [user]
    return [{"role": "system", "content": options.system}, user]


def _table(scores: list[float], responses: list[str]) -> str:
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    marks = ["*"] + [" "] * (len(order) - 1)
    return "\n".join(
        f"{mark} {scores[index]:10.4f}  {textwrap.shorten(responses[index], _SHOWN_WIDTH)}"
        for mark, index in zip(marks, order)
    )


def _exit_code(error: TriwardError) -> int:
    codes = {InvalidRequest: 2, ServerUnavailable: 3, DeadlineExceeded: 4}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def _tolerate_any_text(stream: object) -> None:
    # A console with a narrow encoding must not turn a score into a traceback.
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
