"""The command `triward`.

    score     responses to one prompt, or a JSONL file of conversations
    rank      the same, best first
    compare   whether response A scores higher than response B
    health    whether the model can be asked

Other distributions add commands by entry points of the group `triward.commands`: functions that
take argparse's subparsers and a parent parser with the server's options. triward-tools adds `eval`,
`best-of-n`, `filter` and `pairs`.

Exit codes: 0 done (compare: A scores higher; health: ready), 1 no (compare), 2 wrong input or
usage, 3 unavailable (health: not ready), 4 deadline exceeded, 5 another failure, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import traceback
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

from triward import __version__ as version
from triward import jsonl, protocol
from triward.arguments import Parser, check_free, whole_number
from triward.channel import Tls
from triward.client import RewardClient
from triward.deadline import Deadline
from triward.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ServerError,
    ServerUnavailable,
    TriwardError,
)
from triward.many import ranked
from triward.routing import Routing

_CODES = {InvalidRequest: 2, ServerUnavailable: 3, DeadlineExceeded: 4}

# Commands that are known, but not installed, say what brings them.
_TOOLS = ("eval", "best-of-n", "filter", "pairs", "gateway", "playground")
_NEEDED = "comes with triward-tools; in a checkout of Triward: pip install ./tools"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        _tolerate_any_text(stream)
    options = _parser().parse_args(argv)
    try:
        with _client(options) as client:
            return int(options.run(client, options))
    except TriwardError as error:
        return _report(error)
    except OSError as error:  # a certificate's file, or a disk that is full
        place, reason = error.filename or "output", error.strerror or error
        return _report(InvalidRequest(f"{place}: {reason}"))
    except KeyboardInterrupt:
        print(f"triward: interrupted; {_again(options)}", file=sys.stderr)
        return 130  # as a shell has it for SIGINT
    except Exception as error:  # never 1, which is an answer
        traceback.print_exc()
        return _report(TriwardError(f"{type(error).__name__}: {error}"))


def _again(options: argparse.Namespace) -> str:
    if getattr(options, "input", None) and options.command in ("score", "rank"):
        return "the same command with --force begins anew"
    return "a job goes on with the same command"


def _score(client: RewardClient, options: argparse.Namespace) -> int:
    if options.input:
        return _score_lines(client, options)
    scores = client.score_responses(_messages(options), options.response)
    _print_scores(scores, options, {"scores": scores})
    return 0


def _rank(client: RewardClient, options: argparse.Namespace) -> int:
    if options.input:
        return _score_lines(client, options)
    scores = client.score_responses(_messages(options), options.response)
    _print_scores(scores, options, {"ranking": ranked(scores), "scores": scores})
    return 0


def _compare(client: RewardClient, options: argparse.Namespace) -> int:
    options.response = [options.a, options.b]
    a, b = scores = client.score_responses(_messages(options), options.response)
    _print_scores(scores, options, {"a": a, "b": b, "margin": a - b})
    return 0 if a > b else 1


def _health(client: RewardClient, options: argparse.Namespace) -> int:
    reason: TriwardError | None = None
    try:
        client.check_ready()
    except (ServerUnavailable, DeadlineExceeded, ServerError) as error:
        reason = error
    if options.json:
        print(json.dumps({"ready": reason is None}))
    else:
        print(f"{', '.join(options.url)}: {'not ready' if reason else 'ready'}")
    if reason is None:
        return 0
    _report(reason)
    return 3


def _score_lines(client: RewardClient, options: argparse.Namespace) -> int:
    """Write every line back, in order, with its scores or its error."""
    if options.output != "-" and options.input != "-" and _same(options.input, options.output):
        raise InvalidRequest(f"{options.output}: is the input, too")
    if options.output != "-" and not options.force:
        check_free(Path(options.output))
    client.check_ready()  # before an output is begun
    with ExitStack() as stack:
        lines = _open(stack, options.input, "r", sys.stdin)
        output = _open(stack, options.output, "w", sys.stdout)
        done = jsonl.score_lines(
            client,
            lines,
            ranking=options.command == "rank",
            concurrency=options.concurrency,
            progress=options.progress,
        )
        first: TriwardError | None = None
        total = wrong = 0
        for row, error in done:
            output.write(_line(row) + "\n")
            output.flush()
            total, wrong, first = total + 1, wrong + bool(error), first or error
    if first is None:
        return 0
    print(f"triward: {wrong} of {total} lines have no score; the first:", file=sys.stderr)
    return _report(first)


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character came in as an escape, and goes out as one
        return json.dumps(row)
    return text


def _same(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:  # one of them is not there
        return False


def _open(stack: ExitStack, name: str, mode: str, standard: Any) -> Any:
    if name == "-":
        return standard
    try:
        # What is not UTF-8 is that line's error.
        errors = "surrogateescape" if mode == "r" else "strict"
        return stack.enter_context(Path(name).open(mode, encoding="utf-8", errors=errors))
    except OSError as error:
        raise InvalidRequest(f"{name}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="triward",
        description="Rewards from a Triward server.",
        epilog="Exit codes: 0 done or yes, 1 no, 2 wrong input, 3 unavailable, 4 too late, 5 else.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"triward {version}, version {protocol.CONTRACT_VERSION} of the wire contract",
    )
    commands: Any = parser.add_subparsers(dest="command", required=True)
    server, prompt, lines = _server_options(), _prompt_options(), _lines_options()
    for name, run, parents, text in (
        ("score", _score, [server, prompt, lines], "score responses, or a JSONL file"),
        ("rank", _rank, [server, prompt, lines], "order responses by score, best first"),
        ("compare", _compare, [server, prompt], "exit with 0 when A scores higher than B, else 1"),
        ("health", _health, [server], "exit with 0 when the model can be asked"),
    ):
        command = commands.add_parser(name, help=text, parents=parents)
        command.set_defaults(run=run, error=command.error)
        if name in ("score", "rank"):
            command.add_argument("--response", action="append", help="may repeat")
        if name == "compare":
            command.add_argument("--a", required=True, help="response A")
            command.add_argument("--b", required=True, help="response B")
    _add_tools(commands, server)
    return parser


def _add_tools(commands: Any, server: argparse.ArgumentParser) -> None:
    """Add the commands of other distributions."""
    found = {point.name: point for point in entry_points(group="triward.commands")}
    for point in found.values():
        point.load()(commands, server)
    for name in _TOOLS:
        if name not in found:
            command = commands.add_parser(name, help="comes with triward-tools", add_help=False)
            command.needed = _NEEDED


def _server_options() -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
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
    group.add_argument("--tls-key", metavar="FILE")
    group.add_argument("--header", action="append", default=[], type=_header, metavar="NAME:VALUE")
    group.add_argument("--json", action="store_true", help="JSON instead of a table")
    return group


def _prompt_options() -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
    group.add_argument("--image", action="append", default=[], help="path or URL; may repeat")
    group.add_argument("--system", help="system message")
    group.add_argument("--prompt", help="the user's text, after the images")
    return group


def _lines_options() -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
    group.add_argument(
        "--input",
        metavar="FILE",
        help='JSONL, - for standard input; a line is {"messages": […], "responses": […]}, or '
        '{"messages": […]} with the response as its last message',
    )
    group.add_argument("--output", metavar="FILE", default="-", help="JSONL (standard output)")
    group.add_argument("--force", action="store_true", help="replace an output that is there")
    group.add_argument(
        "--concurrency", type=whole_number, default=32, help="requests at once (%(default)s)"
    )
    group.add_argument("--progress", action="store_true", help="show a bar")
    return group


def _client(options: argparse.Namespace) -> RewardClient:
    """For checked options.

    Raises:
        SystemExit: they do not go together; usage is shown.
    """
    options.url = options.url or ["localhost:8001"]
    if options.command in ("score", "rank"):
        given = [options.prompt is not None, bool(options.response)]
        if options.input and (any(given) or options.image or options.system):
            options.error("--input takes its prompts and responses from the file")
        if not options.input and not all(given):
            options.error("needs --prompt and --response, or --input")
    if options.command == "compare" and options.prompt is None:
        options.error("needs --prompt")
    tls = None
    try:
        if options.tls or options.tls_ca or options.tls_certificate or options.tls_key:
            tls = Tls(options.tls_ca, options.tls_certificate, options.tls_key)
        url = options.url if len(options.url) > 1 else options.url[0]
        return RewardClient(
            url,
            timeout=options.timeout,
            model=options.model,
            tls=tls,
            headers=dict(options.header),
            wait_ready=options.wait_ready,
            routing=options.routing,
        )
    except ValueError as error:
        options.error(str(error))
        raise


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


def _messages(options: argparse.Namespace) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": image} for image in options.image]
    user = {"role": "user", "content": [*images, {"type": "text", "text": options.prompt}]}
    if options.system is None:
        return [user]
    return [{"role": "system", "content": options.system}, user]


def _print_scores(
    scores: list[float], options: argparse.Namespace, as_json: dict[str, Any]
) -> None:
    """Print a table, best first, or JSON."""
    if options.json:
        print(json.dumps(as_json))
        return
    names = "AB" if options.command == "compare" else [*map(str, range(len(scores)))]
    rows = [("rank", "response", "score", "text")]
    for rank, index in enumerate(ranked(scores), start=1):
        rows.append((str(rank), names[index], f"{scores[index]:.4f}", options.response[index]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    room = shutil.get_terminal_size().columns - sum(widths) - 3
    for *cells, text in rows:
        start = " ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{start} {_shortened(text, room)}")


def _shortened(text: str, room: int) -> str:
    """Return the text as a line of at most `room` terminal columns, without control characters."""
    line = "".join(c for c in " ".join(text.split()) if unicodedata.category(c) != "Cc")
    widths = [_width(character) for character in line]
    if sum(widths) <= room:
        return line
    kept = 0
    while kept < len(line) and sum(widths[: kept + 1]) < room:
        kept += 1
    return line[:kept] + "\N{HORIZONTAL ELLIPSIS}"


def _width(character: str) -> int:
    """Columns of a terminal."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _report(error: TriwardError) -> int:
    print(f"triward: {error}", file=sys.stderr)
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), 5)


def _tolerate_any_text(stream: object) -> None:
    # A console with a narrow encoding must not turn a score into a traceback.
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
