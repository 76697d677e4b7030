"""The command `triward`.

    score        responses to one prompt, or a JSONL file of conversations
    rank         the same, with their order
    compare      whether response A scores higher than response B
    health       whether the model can be asked
    completion   a script that completes commands in a shell

Scores of one prompt are a table, or JSON with `--json`; a file of conversations is JSONL both ways.

Other distributions add commands by entry points of the group `triward.commands`: functions that
take argparse's subparsers and a parent parser with the server's options. triward-tools adds `eval`,
`best-of-n`, `filter`, `pairs`, `gateway` and `playground`.

Exit codes: 0 done (compare: A scores higher; health: ready), 1 no (compare), 2 wrong input or
usage, 3 unavailable (health: not ready), 4 deadline exceeded, 5 another failure, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TextIO

from triward import __version__ as version
from triward import jsonl, protocol
from triward.arguments import Parser, check_free, examples
from triward.channel import Tls
from triward.client import RewardClient
from triward.completion import add_completion, completion_script
from triward.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ServerError,
    ServerUnavailable,
    TriwardError,
)
from triward.many import ranked
from triward.options import lines_options, prompt_options, server_options
from triward.table import Screen, table_lines

_CODES = {InvalidRequest: 2, ServerUnavailable: 3, DeadlineExceeded: 4}

# Commands that are known, but not installed, say what brings them.
_TOOLS = ("eval", "best-of-n", "filter", "pairs", "gateway", "playground")
_NEEDED = "comes with triward-tools; in a checkout of Triward: pip install ./tools"

_EXAMPLES = {
    "score": (
        'triward score --image chart.png --prompt "Which month?" \\\n'
        "    --response June. --response May.",
        "triward score --input rollouts.jsonl --output scored.jsonl --progress",
    ),
    "rank": (
        'triward rank --prompt "Which month?" --response June. --response May. --json',
        "triward rank --input rollouts.jsonl --output ranked.jsonl",
    ),
    "compare": (
        'triward compare --image chart.png --prompt "Which month?" --a June. --b May. \\\n'
        '    && echo "A is better"',
    ),
    "health": ("triward health --url dns:///rewards:8001 --wait-ready 300",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        _tolerate_any_text(stream)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command == "completion":
        print(completion_script(parser, options))
        return 0
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
    if not options.json:
        print(f"margin of A over B: {a - b:.4f}")
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
        unicode = options.output != "-" or _is_unicode(output)
        for row, error in done:
            output.write(_line(row, unicode) + "\n")
            output.flush()
            total, wrong, first = total + 1, wrong + bool(error), first or error
    if first is None:
        return 0
    print(f"triward: {wrong} of {total} lines have no score; the first:", file=sys.stderr)
    return _report(first)


def _is_unicode(stream: TextIO) -> bool:
    """Return whether JSON can be written as it is; else it is written in ASCII."""
    return codecs.lookup(stream.encoding or "utf-8").name == "utf-8"


def _line(row: dict[str, Any], unicode: bool) -> str:
    text = json.dumps(row, ensure_ascii=not unicode)
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
        if mode == "r" and isinstance(standard, io.TextIOWrapper):  # JSONL, whatever the locale
            standard.reconfigure(encoding="utf-8", errors="surrogateescape")
        return standard
    try:
        # What is not UTF-8 is that line's error.
        errors = "surrogateescape" if mode == "r" else "strict"
        return stack.enter_context(Path(name).open(mode, encoding="utf-8", errors=errors))
    except OSError as error:
        raise InvalidRequest(f"{name}: {error.strerror}") from error


def _parser() -> Parser:
    parser = Parser(
        prog="triward",
        description="Rewards from a Triward server.",
        epilog="Exit codes: 0 done or yes, 1 no, 2 wrong input, 3 unavailable, 4 too late, 5 else."
        "\n\n" + examples("triward health --url localhost:8001", _EXAMPLES["score"][0]),
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"triward {version}, version {protocol.CONTRACT_VERSION} of the wire contract",
        help="show it, and the wire contract's",
    )
    commands: Any = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )
    server = server_options()
    several, two = [prompt_options("any"), lines_options()], [prompt_options("two")]
    for name, run, parents, text in (
        ("score", _score, several, "score responses, or a JSONL file"),
        ("rank", _rank, several, "order responses by score, best first"),
        ("compare", _compare, two, "exit with 0 when A scores higher than B, else 1"),
        ("health", _health, [], "exit with 0 when the model can be asked"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            parents=[*parents, server],
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=examples(*_EXAMPLES[name]),
        )
        command.set_defaults(run=run, error=command.error)
    add_completion(commands)
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
    lines = table_lines(scores, names, options.response, Screen.of(sys.stdout))
    print("\n".join(lines))


def _report(error: TriwardError) -> int:
    print(f"triward: {error}", file=sys.stderr)
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), 5)


def _tolerate_any_text(stream: object) -> None:
    # A console with a narrow encoding must not turn a score into a traceback.
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
