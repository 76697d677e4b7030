"""Score the model card's conversation with a real Triton and with the card's own code: `make demo`.

Makes a tiny checkpoint with random weights, exports it, serves it on free ports, scores two
answers over gRPC, scores them again with the model card's code in this process, shuts down, and
shows what was sent and what came back: in the terminal, and as a page for a browser.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from demo_page import Outcome, write_page
from local_server import ROOT, local_server
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from triward import RewardClient

CHART = ROOT / "examples" / "chart.png"
QUESTION = (
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, "
    "at the end.\nQuestion: Is Purple the highest value?\nChoices:\n(A) no\n(B) yes"
)
ANSWERS = ("The answer is: B", "The answer is: A")
REAL = "Skywork/Skywork-VL-Reward-7B"
PAGE = ROOT / "build" / "demo.html"
NEXT = (
    ("your own picture, in a browser, on this model", ("make playground",)),
    ("notebooks to read and to run", ("examples/*.ipynb",)),
    (
        "the real model, on a machine with a GPU",
        (
            "source .venv/bin/activate",
            f"triward-server export --checkpoint {REAL} --output skywork",
            "triward-server serve --repository skywork",
        ),
    ),
    (
        "your own picture, on that model",
        ("triward score --image FILE --prompt TEXT --response TEXT --response TEXT",),
    ),
)

PROMPT: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [{"type": "image", "image": str(CHART)}, {"type": "text", "text": QUESTION}],
    }
]


def main(page: Path = PAGE) -> None:
    """Run the demo; Ctrl-C at any moment leaves nothing behind."""
    console = Console(highlight=False)
    steps = iter("123")
    with (
        local_server(lambda step: console.print(f"[dim]{next(steps)}/4[/] {step}")) as server,
        RewardClient(server.url) as client,
    ):
        console.print(f"[dim]4/4[/] scoring over gRPC at {server.url}")
        served = client.score_responses(PROMPT, ANSWERS)
        assert server.checkpoint, "the server is our own"
        outcome = Outcome(CHART, QUESTION, ANSWERS, served, _reference(server.checkpoint))
    write_page(outcome, NEXT, page)
    _show(console, outcome, page)


def _reference(checkpoint: Path) -> list[float]:
    from triward_server.testing.oracle import Oracle

    oracle = Oracle(checkpoint)
    return [oracle.score([*PROMPT, {"role": "assistant", "content": a}]) for a in ANSWERS]


def _show(console: Console, outcome: Outcome, page: Path) -> None:
    """Print what the page shows."""
    *_, question, _, no, yes = QUESTION.splitlines()
    width, height = outcome.size
    console.print()
    console.rule("what was sent", align="left", style="dim")
    console.print(f"  {CHART.name}, {width} × {height}, and a question with two answers:")
    console.print(f"  [bold]{question.removeprefix('Question: ')}[/]  {no}  {yes}\n")
    console.rule("what came back", align="left", style="dim")
    console.print(_table(outcome))
    console.print("\n  The weights are random: the scores mean nothing, but they are those of the")
    console.print("  model card's code. A bar is an answer's chance to be the better one.\n")
    console.rule("where to go next", align="left", style="dim")
    console.print(f"  this as a picture for a browser\n    [bold]{_shown(page)}[/]", soft_wrap=True)
    for what, commands in NEXT:
        console.print(f"  {what}")
        for command in commands:
            console.print(f"    [bold]{_folded(command, console.width - 8)}[/]", soft_wrap=True)


def _table(outcome: Outcome) -> Table:
    table = Table(
        box=SIMPLE_HEAD, border_style="dim", header_style="dim", show_edge=False, pad_edge=False
    )
    table.add_column("  answer", no_wrap=True)
    table.add_column("chance", width=12)
    for column in ("", "Triton", "the card", "apart"):
        table.add_column(column, justify="right")
    for answer, chance, ours, card in outcome.rows:
        bar = ProgressBar(1.0, chance, width=12, style="dim", complete_style="cyan")
        numbers = (f"{chance:.1%}", f"{ours:.5f}", f"{card:.5f}", f"{abs(ours - card):.1e}")
        table.add_row(f"  {answer}", bar, *numbers)
    return table


def _folded(command: str, width: int) -> str:
    """Break a command before an option, as a shell takes it, where it is too wide."""
    first, *options = re.split(" (?=--)", command)
    lines = [first]
    for option in options:
        if len(lines[-1]) + len(option) < width:
            lines[-1] += f" {option}"
        else:
            lines.append(f"        {option}")
    return " \\\n".join(lines)


def _shown(path: Path) -> Path:
    """Return a path as short as it can be named from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python examples/demo.py --page demo.html",
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="where the page goes (%(default)s)")
    try:
        main(parser.parse_args().page)
    except KeyboardInterrupt:
        sys.exit(130)
