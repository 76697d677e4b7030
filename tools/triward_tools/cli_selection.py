"""The commands `triward best-of-n`, `filter` and `pairs`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from triward.arguments import examples, whole_number
from triward.errors import InvalidRequest

if TYPE_CHECKING:
    from triward.client import RewardClient

    from triward_tools.selection import Summary
    from triward_tools.selection.rules import Rule

_COLUMNS = {
    "messages": "of whole conversations",
    "prompt": "of prompts, with --responses",
    "responses": "of responses, with --prompt",
    "images": "of images, for the messages' places that hold none",
    "scores": "of scores that are there already; no server is asked",
}


def add_best_of_n(commands: Any, server: argparse.ArgumentParser) -> None:
    """Add `best-of-n`. Its `run`, as the others', loads what it needs only when it is called."""
    best = commands.add_parser(
        "best-of-n",
        help="choose the best of N responses",
        description="Score the responses of each row and keep the best. Rows are lines of JSONL, "
        "or of Parquet; the same command goes on with a job that was interrupted.",
        epilog=examples("triward best-of-n --input candidates.jsonl --output best.jsonl"),
        parents=[_file_options(), server],
    )
    best.set_defaults(run=_best_of_n, error=best.error)


def _file_options() -> argparse.ArgumentParser:
    group = argparse.ArgumentParser(add_help=False)
    group.add_argument(
        "--input", metavar="FILE", required=True, help="JSONL, Parquet, or a folder of Parquet"
    )
    group.add_argument("--output", metavar="FILE", required=True, help=".jsonl or .parquet")
    group.add_argument("--force", action="store_true", help="replace outputs that are there")
    for name, text in _COLUMNS.items():
        group.add_argument(f"--{name}", metavar="COLUMN", help=f"column {text}")
    pictures = group.add_mutually_exclusive_group()
    pictures.add_argument("--picture", metavar="FILE", help=".svg or .png (OUTPUT.svg)")
    pictures.add_argument("--no-picture", action="store_true", help="draw none")
    group.add_argument(
        "--concurrency", type=whole_number, default=32, help="requests at once (%(default)s)"
    )
    group.add_argument(
        "--chunk-rows",
        type=whole_number,
        default=1000,
        help="rows in memory, and what a killed job repeats (%(default)s)",
    )
    group.add_argument("--progress", action="store_true", help="show a bar")
    return group


def add_filter(commands: Any, server: argparse.ArgumentParser) -> None:
    """Add `filter`."""
    command = commands.add_parser(
        "filter",
        help="leave out unusual scores",
        description="Keep the responses whose scores one rule allows: bounds, quantiles, or how "
        "far they are from the others.",
        epilog=examples(
            "triward filter --input candidates.jsonl --output kept.jsonl --min -2.5",
            "triward filter --input scored.jsonl --output kept.jsonl --scores scores \\\n"
            "    --outliers --dropped dropped.jsonl",
        ),
        parents=[_file_options(), server],
    )
    command.set_defaults(run=_filter, error=command.error)
    command.add_argument("--min", type=float, metavar="SCORE", help="the lowest that is kept")
    command.add_argument("--max", type=float, metavar="SCORE", help="the highest that is kept")
    rules = command.add_mutually_exclusive_group()
    rules.add_argument(
        "--quantiles", type=float, nargs=2, metavar=("LOW", "HIGH"), help="between 0 and 1"
    )
    rules.add_argument(
        "--outliers",
        type=float,
        nargs="?",
        const=3.5,
        metavar="LIMIT",
        help="by the modified z-score (3.5)",
    )
    rules.add_argument(
        "--outliers-by-length",
        type=float,
        nargs="?",
        const=3.5,
        metavar="LIMIT",
        help="the same among responses of like length",
    )
    command.add_argument("--bins", type=whole_number, help="ranges of length (10)")
    command.add_argument("--side", choices=("low", "high", "both"), help="of outliers (both)")
    command.add_argument("--dropped", metavar="FILE", help="what is left out, with the reasons")


def add_pairs(commands: Any, server: argparse.ArgumentParser) -> None:
    """Add `pairs`."""
    command = commands.add_parser(
        "pairs",
        help="make preference pairs for TRL",
        description="Pair responses of a prompt by their scores: rows of prompt, chosen and "
        "rejected.",
        epilog=examples(
            "triward pairs --input candidates.jsonl --output pairs.jsonl --min-margin 1",
            "triward pairs --input candidates.jsonl --output pairs.parquet \\\n"
            "    --strategy all --max-pairs 4 --length-penalty auto",
        ),
        parents=[_file_options(), server],
    )
    command.set_defaults(run=_pairs, error=command.error)
    command.add_argument(
        "--strategy",
        choices=("best-worst", "adjacent", "all"),
        default="best-worst",
        help="which responses are paired (%(default)s)",
    )
    infinity = float("inf")
    command.add_argument(
        "--min-margin", type=float, default=0.0, metavar="SCORE", help="the lowest (0)"
    )
    command.add_argument(
        "--max-margin", type=float, default=infinity, metavar="SCORE", help="the highest (any)"
    )
    command.add_argument(
        "--max-length-ratio",
        type=float,
        default=infinity,
        metavar="RATIO",
        help="of the longer response's characters to the shorter one's (any)",
    )
    command.add_argument(
        "--length-penalty",
        type=_penalty,
        default=0.0,
        metavar="SCORE",
        help="for each 1,000 characters; or auto, the slope in the data",
    )
    command.add_argument("--max-pairs", type=whole_number, metavar="N", help="of each prompt")
    command.add_argument(
        "--score-shift", action="store_true", help="add MPO's shift: the mean score of all so far"
    )


def _best_of_n(client: RewardClient, options: argparse.Namespace) -> int:
    selection = _selection()
    return _tell(
        selection.best_of_n_file(
            options.input, options.output, client, **_settings(selection, options)
        ),
        options,
    )


def _filter(client: RewardClient, options: argparse.Namespace) -> int:
    selection = _selection()
    summary = selection.filter_file(
        options.input,
        options.output,
        _rule(selection, options),
        client,
        dropped=options.dropped,
        **_settings(selection, options),
    )
    return _tell(summary, options)


def _pairs(client: RewardClient, options: argparse.Namespace) -> int:
    selection = _selection()
    try:
        pairing = selection.Pairing(
            options.strategy,
            options.min_margin,
            options.max_margin,
            options.max_length_ratio,
            options.length_penalty,
            options.max_pairs,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    summary = selection.pairs_file(
        options.input,
        options.output,
        pairing,
        client,
        shift=options.score_shift,
        **_settings(selection, options),
    )
    return _tell(summary, options)


def _selection() -> Any:
    from triward_tools import selection

    return selection


def _settings(selection: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that the three commands' functions share."""
    picture = options.picture or f"{options.output}.svg"
    return {
        "columns": selection.Columns(**{name: getattr(options, name) for name in _COLUMNS}),
        "picture": None if options.no_picture else picture,
        "concurrency": options.concurrency,
        "chunk_rows": options.chunk_rows,
        "progress": options.progress,
        "force": options.force,
    }


def _rule(selection: Any, options: argparse.Namespace) -> Rule:
    """Return the one rule that the options name; without any, all scores are kept."""
    others = [options.quantiles, options.outliers, options.outliers_by_length]
    bounded = options.min is not None or options.max is not None
    if bounded and any(other is not None for other in others):
        raise InvalidRequest("--min and --max go with no other rule; filter the output again")
    if options.side is not None and options.outliers is None and options.outliers_by_length is None:
        options.error("--side goes with --outliers or --outliers-by-length")
    if options.bins is not None and options.outliers_by_length is None:
        options.error("--bins goes with --outliers-by-length")
    side, bins = options.side or "both", options.bins or 10
    rule: Rule
    try:
        if options.quantiles is not None:
            rule = selection.Quantile(*options.quantiles)
        elif options.outliers is not None:
            rule = selection.RobustOutliers(options.outliers, side)
        elif options.outliers_by_length is not None:
            limit = options.outliers_by_length
            rule = selection.LengthConditioned(limit, bins, side)
        else:
            rule = selection.Threshold(options.min, options.max)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return rule


def _tell(summary: Summary, options: argparse.Namespace) -> int:
    """Print the summary; wrong input if rows could not be used, as for `triward score`."""
    print(json.dumps(summary.as_dict()) if options.json else "\n".join(summary.lines()))
    if not summary.failed:
        return 0
    print(
        f"triward: {summary.failed} of {summary.rows} rows have no score; the first:\n"
        f"triward: {summary.first_error}",
        file=sys.stderr,
    )
    return 2


def _penalty(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        message = f"must be a number or auto, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
