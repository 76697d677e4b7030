"""The report's charts, as SVG that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from triward_tools.evaluation.results import Result
from triward_tools.evaluation.statistics import Calibration
from triward_tools.evaluation.tallies import Floats
from triward_tools.evaluation.wording import Wording

# Drawn in colours that occur nowhere else, which then become the page's variables: so that one
# chart serves a light and a dark page.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--good)",
    "#050505": "var(--bad)",
    "#060606": "var(--tie)",
}
INK, MUTED, LINE, GOOD, BAD, TIE = _COLOURS

_SIZE = (4.6, 2.9)  # inches
_BARS = 36

_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def margin_chart(results: Sequence[Result], wording: Wording) -> str:
    """Draw a histogram of margins, the right rows apart from ties and wrong ones."""
    return margin_histogram(np.array([r.margin for r in results]), wording)


def margin_histogram(values: Floats, wording: Wording) -> str:
    """Draw the same of margins [n], at least one."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    width = max(high - low, 1e-9) / _BARS
    # Zero is an edge, so that no bar holds wrong and right pairs.
    edges = width * np.arange(np.floor(low / width) - 1, np.ceil(high / width) + 2)
    groups = [
        ("wrong", values[values < 0], BAD),
        ("tie", values[values == 0], TIE),
        ("right", values[values > 0], GOOD),
    ]

    def draw(axes: Any) -> None:
        below = np.zeros(len(edges) - 1)
        for name, group, colour in groups:
            if not len(group):
                continue
            counts, _ = np.histogram(group, edges)
            label = f"{name} ({len(group):,})"
            left, broad = edges[:-1] + 0.05 * width, 0.9 * width
            axes.bar(left, counts, broad, below, align="edge", color=colour, label=label)
            below += counts
        axes.axvline(0, color=INK, linewidth=1)
        axes.set(xlabel=f"margin: {wording.margin}", ylabel=f"{wording.noun}s")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, handlelength=1)

    return svg_chart("margins", draw)


def calibration_chart(calibration: Calibration) -> str:
    """Accuracy of the bins over their mean |margin|, and what Bradley-Terry expects."""
    bins = calibration.bins
    sizes = np.array([b.mean for b in bins])
    shares = np.array([b.accuracy for b in bins]) * 100
    low = np.array([b.interval.low for b in bins]) * 100
    high = np.array([b.interval.high for b in bins]) * 100
    curve = np.linspace(0, max(float(sizes.max()) * 1.05, 1e-3), 200)

    def draw(axes: Any) -> None:
        axes.plot(curve, 100 / (1 + np.exp(-curve)), color=MUTED, linestyle="--", linewidth=1.2)
        axes.vlines(sizes, low, high, color=GOOD, linewidth=1.2)
        axes.plot(sizes, shares, "o", markersize=4.5, color=GOOD, label="observed, 95 % interval")
        axes.plot([], [], color=MUTED, linestyle="--", linewidth=1.2, label="sigmoid(|margin|)")
        axes.set(xlabel="|margin|", ylabel="right, %", ylim=(min(45, low.min() - 3), 103))
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, handlelength=1.6)

    return svg_chart("calibration", draw)


def svg_chart(name: str, draw: Any) -> str:
    """Return a chart whose bytes depend on its data alone.

    Args:
        name: of the chart; two on a page need two.
        draw: a function of matplotlib's axes. It uses the colours of this module.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    packed = io.StringIO()
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(packed, format="svg", transparent=True, metadata={"Date": None})
    text = packed.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Two charts share a page, and each names its parts `axes_1`, `patch_1`, ...
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    return text
