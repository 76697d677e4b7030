"""The prefix cache: a server with it beside one without, on requests that begin like earlier ones.

    python -m benchmarks.prefixes --output results.json

Both servers get the same requests over gRPC, in turns, in one run. Every round has new prompts. The
FLOP ratio is what the speed-up could be at most: how many times as much the server without the
cache computes, as the engine's plan predicts it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.commands import run_main
from benchmarks.measure import CONCURRENCY, machine, row, serving, timed, writable
from benchmarks.planned import PlannedClient
from benchmarks.workloads import Messages, Writer
from triward import RewardClient
from triward_server.export.random_checkpoint import Size, make_checkpoint
from triward_server.testing.oracle import fp32_budget

WITH, WITHOUT = "with the prefix cache", "without"
FLAGS = ("--dtype=float32", "--device=cpu", "--embedding-cache-bytes=0")
IMAGE = (672, 504)
RESPONSE = (40, 120)  # words, as in benchmarks.workloads
SHORT = (5, 40)
TURNS = 10
CACHE_BYTES = 256 * 1024**2  # the default on a CPU

Run = Callable[[Any], list[float]]  # of a `RewardClient`, or a `PlannedClient`


def steps(write: Writer) -> dict[str, Run]:
    """One round's requests by the row that they are timed for, in order; all prompts are new."""
    prompt = write.prompt(350, IMAGE)
    waves = [[write.text(*RESPONSE) for _ in range(8)] for _ in range(2)]
    other = write.prompt(350, IMAGE)
    short = [[write.text(*SHORT) for _ in range(8)] for _ in range(2)]
    text = write.prompt(600)
    answers = [write.text(*RESPONSE) for _ in range(8)]
    talk: Messages = []
    dialogue: list[Messages] = []
    for _ in range(TURNS):
        question = {"type": "text", "text": write.text(40, 80)}
        talk = [*talk, {"role": "user", "content": [question]}]
        talk = [*talk, {"role": "assistant", "content": write.text(*RESPONSE)}]
        dialogue.append(talk)
    novel = [
        [*write.prompt(write.between(10, 250), (280, 280)), _answer(write.text(5, 150))]
        for _ in range(16)
    ]
    return {
        "first wave of 8, an image": lambda c: c.score_responses(prompt, waves[0]),
        "second wave of 8, the same image": lambda c: c.score_responses(prompt, waves[1]),
        "first wave of 8 short ones, an image": lambda c: c.score_responses(other, short[0]),
        "second wave of 8 short ones, the same image": lambda c: c.score_responses(other, short[1]),
        "8 requests of one prompt, one after another": lambda c: [
            c.score([*text, _answer(answer)]) for answer in answers
        ],
        f"a dialogue of {TURNS} turns, scored after each": lambda c: [
            c.score(each) for each in dialogue
        ],
        "16 requests that begin like none before": partial(_many, conversations=novel),
    }


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _many(client: RewardClient, conversations: list[Messages]) -> list[float]:
    return client.score_many(conversations, concurrency=CONCURRENCY)


def _answer_into(answers: list[list[float]], run: Run, client: RewardClient) -> None:
    answers.append(run(client))


def measure(clients: dict[str, RewardClient], rounds: int) -> dict[str, Any]:
    """Take all rows in turns; the first round warms up and is compared, not timed."""
    seconds: dict[str, dict[str, list[float]]] = {}
    distance: dict[str, float] = {}
    counts: dict[str, int] = {}
    for turn in range(rounds + 1):
        order = list(clients.items())[:: 1 if turn % 2 else -1]
        given: dict[str, list[list[float]]] = {}
        for name, client in order:
            for step, run in steps(Writer(np.random.default_rng(turn))).items():
                answers = given.setdefault(step, [])
                taken = timed(partial(_answer_into, answers, run, client))
                if turn:
                    seconds.setdefault(step, {}).setdefault(name, []).append(taken)
        for step, (one, other) in given.items():
            counts[step] = len(one)
            off = np.abs(np.subtract(one, other)) / np.array([fp32_budget(s) for s in one])
            distance[step] = max(distance.get(step, 0.0), float(off.max()))
    rows = {}
    for step, by_name in seconds.items():
        by_server = {name: row(by_name[name], counts[step]) for name in clients}
        ratio = by_server[WITHOUT]["median_s"] / by_server[WITH]["median_s"]
        rows[step] = {
            "conversations": counts[step],
            "servers": by_server,
            "speedup": round(ratio, 3),
            "max_distance_in_budgets": distance[step],
        }
    return rows


def flops(checkpoint: Path, turn: int) -> dict[str, tuple[float, float]]:
    """Predict each row's FLOPs of a round, with the cache and without."""
    found: dict[str, tuple[float, float]] = {}
    with_cache, without = (PlannedClient(checkpoint, size) for size in (CACHE_BYTES, 0))
    for step, run in steps(Writer(np.random.default_rng(turn))).items():
        before = with_cache.flops, without.flops
        run(with_cache)
        run(without)
        found[step] = (with_cache.flops - before[0], without.flops - before[1])
    return found


def show_rows(console: Console, rows: dict[str, Any]) -> None:
    """Print the rows."""
    table = Table(title="time without the prefix cache over time with it")
    columns = ("requests", WITH, WITHOUT, "speedup", "FLOP ratio", "score distance / budget")
    for column in columns:
        table.add_column(column, justify="left" if column == "requests" else "right")
    for step, values in rows.items():
        servers = values["servers"]
        table.add_row(
            step, *(f"{servers[name]['median_s']:.3f} s" for name in (WITH, WITHOUT)),
            f"{values['speedup']:.2f} x", f"{values['flop_ratio']:.2f} x",
            f"{values['max_distance_in_budgets']:.2f}",
        )  # fmt: skip
    console.print(table)


def main(
    size: Annotated[Size, typer.Option(help="Size of the random checkpoint.")] = "small",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file that gets the rows.")] = None,
) -> None:
    """Measure on this machine's CPU, in float32, over gRPC."""
    writable(output)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        make_checkpoint(size, 0, checkpoint)
        with (
            serving(checkpoint, *FLAGS) as remembers,
            serving(checkpoint, *FLAGS, "--prefix-cache-bytes=0") as forgets,
        ):
            rows = measure({WITH: remembers, WITHOUT: forgets}, rounds)
        for step, (with_cache, without) in flops(checkpoint, 1).items():
            rows[step]["flop_ratio"] = round(without / with_cache, 3)
    show_rows(Console(), rows)
    if output:
        results = {"machine": machine(), "size": size, "dtype": "float32", "rounds": rounds}
        output.write_text(json.dumps(results | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
