"""Draw a results file of `benchmarks.compare`.

python -m benchmarks.plot benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.figure import Figure

from benchmarks.commands import run_main

COLORS = {
    "card, one by one": "#9aa0a6",
    "card, padded batches of 8": "#c9ccd1",
    "Scorer, in-process": "#7fb77e",
    "served, over gRPC": "#2b7a3d",
}


def draw_speedups(results: dict[str, Any], output: Path) -> None:
    """Speed-ups of all paths and workloads as one picture, SVG or PNG by the file's suffix."""
    mpl.rcParams["svg.hashsalt"] = "triward"  # equal results give equal files
    workloads = results["workloads"]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(COLORS)
    for place, (path, color) in enumerate(COLORS.items()):
        rows = [
            (index + (place - (len(COLORS) - 1) / 2) * width, result["paths"][path]["speedup"])
            for index, result in enumerate(workloads.values())
            if path in result["paths"]
        ]
        if rows:
            places, speedups = zip(*rows, strict=True)
            bars = axes.bar(places, speedups, width, color=color, label=path)
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    for index, result in enumerate(workloads.values()):
        if "ideal_speedup" in result:
            ideal = result["ideal_speedup"]
            label = "FLOPs: nothing shared / all shared" if index == 0 else ""
            axes.hlines(
                ideal, index - 0.42, index + 0.42, color="#b3261e", linestyle=":", label=label
            )
    names = [f"{n}\n(again / first)" if n == "epoch" else n for n in workloads]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("conversations/s, the card's loop = 1")
    machine = results["machine"]
    axes.set_title(
        f"{results['size']}, {results['dtype']}, {machine['gpu'] or machine['cpu']}, "
        f"{machine['cores']} cores, median of {results['repeats']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main(
    results: Annotated[Path, typer.Argument(help="JSON file of benchmarks.compare.")],
) -> None:
    """Draw the picture beside the results."""
    draw_speedups(json.loads(results.read_text()), results.with_suffix(".svg"))


if __name__ == "__main__":
    run_main(main)
