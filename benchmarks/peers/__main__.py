"""vLLM's CPU build beside Triward: one text reward model, the same conversations, in turns.

    python -m benchmarks.peers --dtype bfloat16 --column served --output results.json

`make peers` sets vLLM up. First every side scores one round of conversations, and each score is
compared with transformers' in float32; a side that is wrong ends the measurement. Then every round
has new prompts. All processes stay up, and one computes at a time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.commands import run_main
from benchmarks.measure import machine, timed, writable
from benchmarks.peers import sides
from benchmarks.peers.steps import (
    OURS,
    PEER,
    Times,
    Wave,
    all_conversations,
    check_parity,
    distance,
    draw_round,
)
from benchmarks.workloads import PromptGroup, Writer
from triward_server.config import Dtype
from triward_server.export.options import Size
from triward_server.export.random_text_checkpoint import make_text_checkpoint
from triward_server.testing.oracle import TextOracle

COLUMNS = ("offline", "served")
# Both round bfloat16 in their own places, up to 0.06; another prompt moves a score by about 5.
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.2}

Contestants = dict[tuple[str, str], sides.Ask]  # by column and side


def contestants(
    checkpoint: Path, dtype: Dtype, columns: list[str], render: sides.Render, stack: ExitStack
) -> Contestants:
    """Start all that are measured; `stack` ends them."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    found: Contestants = {}
    if "offline" in columns:
        found["offline", OURS] = sides.our_engine(checkpoint, dtype)
        peer = sides.peer_engine(checkpoint, dtype, render, folder)
        found["offline", PEER] = stack.enter_context(peer)
    if "served" in columns:
        found["served", OURS] = stack.enter_context(sides.our_server(checkpoint, dtype))
        peer = sides.peer_server(checkpoint, dtype, render, folder)
        found["served", PEER] = stack.enter_context(peer)
    return found


def one_round(
    asked: Contestants, questions: dict[str, tuple[Wave, ...]], turn: int, console: Console
) -> dict[str, dict[tuple[str, str], tuple[float, list[float]]]]:
    """Seconds and scores of each step and side; which side begins changes from turn to turn."""
    found: dict[str, dict[tuple[str, str], tuple[float, list[float]]]] = {}
    for step, waves in questions.items():
        for name, ask in list(asked.items())[:: -1 if turn % 2 else 1]:
            scores: list[float] = []
            sides.wait_until_idle()
            seconds = timed(partial(_ask_all, ask, waves, scores))
            found.setdefault(step, {})[name] = (seconds, scores)
            console.print(f"round {turn}, {step}, {', '.join(name)}: {seconds:.2f} s")
    return found


def _ask_all(ask: sides.Ask, waves: tuple[Wave, ...], scores: list[float]) -> None:
    for wave in waves:
        scores += ask(wave)


def parity(
    asked: Contestants,
    reference: dict[str, list[float]],
    questions: dict[str, tuple[Wave, ...]],
    console: Console,
) -> dict[str, float]:
    """Return each side's largest distance from transformers' scores; this warms up, too."""
    off: dict[str, float] = {}
    for step, answers in one_round(asked, questions, 0, console).items():
        for (column, side), (_, scores) in answers.items():
            name = f"{side}, {column}"
            off[name] = float(np.maximum(off.get(name, 0.0), distance(scores, reference[step])))
    return off


def measure(
    asked: Contestants,
    turn: int,
    scale: float,
    tolerance: float,
    console: Console,
    times: dict[str, Times],
) -> None:
    """Add a round to `times`; its scores are compared between the sides."""
    questions = draw_round(Writer(np.random.default_rng(turn)), scale)
    for step, answers in one_round(asked, questions, turn, console).items():
        known = next(iter(answers.values()))[1]
        far = {", ".join(who): distance(given, known) for who, (_, given) in answers.items()}
        check_parity(far, 2 * tolerance)
        row = times.setdefault(step, Times(len(known)))
        for (column, side), (seconds, _) in answers.items():
            row.add(column, side, seconds)


def show_ratios(console: Console, rows: dict[str, Any]) -> None:
    """Print vLLM's time over ours, round by round."""
    table = Table(title="vLLM's time over Triward's; above 1, Triward is faster")
    for name in ("workload", *COLUMNS):
        table.add_column(name)
    for step, values in rows.items():
        cells = (values["columns"].get(column) for column in COLUMNS)
        ratios = (cell["peer_time_over_ours"] if cell else [] for cell in cells)
        table.add_row(step, *(", ".join(f"{r:.2f}" for r in each) for each in ratios))
    console.print(table)


def main(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    column: Annotated[list[str] | None, typer.Option(help="offline, served; else both.")] = None,
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "small",
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    scale: Annotated[float, typer.Option(min=0.01, max=2, help="Factor of all lengths.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure on this machine's CPU."""
    columns = column or list(COLUMNS)
    if dtype not in TOLERANCE or set(columns) - set(COLUMNS):
        raise typer.BadParameter(f"no dtype {dtype!r}, or no column among {columns}")
    writable(output)
    if not sides.PYTHON.exists():
        raise typer.BadParameter("vLLM is not here: `make peers` first")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # vLLM ends, too
    console = Console()
    results: dict[str, Any] = {"machine": machine(), "peer": sides.peer_versions()}
    results |= {"architecture": "qwen3", "size": size, "dtype": dtype, "scale": scale}
    results |= {"rounds": rounds, "peer_kv_cache_gib": sides.KV_CACHE_GIB}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        checkpoint = Path(folder, "checkpoint")
        make_text_checkpoint("qwen3", size, 0, checkpoint)
        oracle = TextOracle(checkpoint, attention="sdpa")
        questions = draw_round(Writer(np.random.default_rng(0)), scale)
        reference = {
            step: [oracle.score(each) for each in all_conversations(waves)]
            for step, waves in questions.items()
        }

        def render(group: PromptGroup) -> list[str]:
            template = oracle.tokenizer.apply_chat_template
            return [template(each, tokenize=False) for each in group.conversations()]

        asked = contestants(checkpoint, dtype, columns, render, stack)
        off = parity(asked, reference, questions, console)
        everything = [score for each in reference.values() for score in each]
        results["parity"] = {
            "reference": "transformers, float32",
            "conversations": len(everything),
            "standard_deviation_of_scores": float(np.std(everything)),
            "tolerance": TOLERANCE[dtype],
            "max_distance": off,
        }
        console.print(results["parity"])
        check_parity(off, TOLERANCE[dtype])
        times: dict[str, Times] = {}
        for turn in range(1, rounds + 1):
            measure(asked, turn, scale, TOLERANCE[dtype], console, times)
            results["rows"] = {step: each.summary() for step, each in times.items()}
            if output:  # after each round: a run that is stopped has measured what it has
                output.write_text(json.dumps(results, indent=2) + "\n")
    show_ratios(console, results["rows"])


if __name__ == "__main__":
    run_main(main)
