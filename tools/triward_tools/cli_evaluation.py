"""The command `triward eval`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from triward.arguments import examples, seed, whole_number
from triward.client import RewardClient

BENCHMARKS = ("rewardbench", "vl-rewardbench", "multimodal-rewardbench", "rewardbench-2")
_EXAMPLE = "triward eval rewardbench-2 --data data/test.parquet --output rewardbench-2-run"


def add(commands: Any, server: argparse.ArgumentParser) -> None:
    """Add the command, whose `run` loads what it needs only when it is called."""
    command = commands.add_parser(
        "eval",
        help="accuracy on a benchmark's public files, as a report",
        description="Score a benchmark's responses and write a report. The same command goes on "
        "with a run that was interrupted.",
        epilog=examples(_EXAMPLE),
        parents=[server],
    )
    command.set_defaults(run=_run, error=command.error)
    command.add_argument(
        "benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help=", ".join(BENCHMARKS)
    )
    command.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="PATH",
        help="a published file (Parquet, JSON or JSONL), or a folder of them",
    )
    command.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="for results and report; new, or this run's",
    )
    command.add_argument(
        "--concurrency", type=whole_number, default=32, help="requests at once (%(default)s)"
    )
    command.add_argument("--no-progress", action="store_true", help="show no bar")
    command.add_argument(
        "--seed", type=seed, default=0, help="of the report's resampling (%(default)s)"
    )


def _run(client: RewardClient, options: argparse.Namespace) -> int:
    """Print the summary. Wrong input if no row has scores; some without are the report's."""
    from triward_tools.evaluation.run import evaluate

    report = evaluate(
        client,
        options.benchmark,
        options.data,
        options.output,
        concurrency=options.concurrency,
        progress=not options.no_progress,
        seed=options.seed,
    )
    if options.json:
        text = (options.output / "report.json").read_text(encoding="utf-8")
        print(json.dumps(json.loads(text)))
    else:
        print("\n".join(report.lines()))
    scored, problems = report.facts.pairs, report.facts.problems
    if problems:
        first = f"{problems[0].place}: {problems[0].reason}"
        count = f"{len(problems)} of {scored + len(problems)} rows have no scores"
        print(f"triward: {count}; the first: {first}", file=sys.stderr)
    return 0 if scored else 2
