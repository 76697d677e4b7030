"""Histograms of what was chosen, the same bytes for the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from triward.errors import InvalidRequest

from triward_tools.jobs import whole_file
from triward_tools.selection.preference import PairChooser
from triward_tools.selection.summary import Summary
from triward_tools.selection.tasks import BestChooser, Chooser, FilterChooser

# Okabe and Ito's colours, which people with colour blindness can tell apart.
_KEPT, _DROPPED, _ALL = "#0072B2", "#D55E00", "#999999"
_BINS = 40
_DOTS = 5000

# Ids in the file are hashes of this, and texts stay texts.
_SETTINGS = {"svg.hashsalt": "triward", "svg.fonttype": "none", "font.size": 9}


def check_picture(path: Path) -> None:
    """Raise InvalidRequest where no picture can be written."""
    if path.suffix not in (".svg", ".png"):
        raise InvalidRequest(f"{path}: a picture must end with .svg or .png")


def draw(path: Path, chooser: Chooser, summary: Summary, scratch: Path) -> None:
    """Draw what was chosen, and write it to `path` as a whole; for `scratch` see `whole_file`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        title = f"triward {summary.command}: {summary.rows} rows in, {summary.written} out"
        figure.suptitle(title, x=0.02, ha="left")
        if isinstance(chooser, BestChooser):
            _best(axes, chooser)
        elif isinstance(chooser, FilterChooser):
            _filter(axes, chooser)
        elif isinstance(chooser, PairChooser):
            _pairs(axes, chooser)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
        nothing = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        with whole_file(path, scratch) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=nothing)


def _best(axes: Any, chooser: BestChooser) -> None:
    """Draw the best of each prompt beside its mean."""
    means = np.array([group.mean() for group in chooser.seen.groups()])
    best = np.array(chooser.best)
    edges = _edges(np.concatenate([means, best]))
    for values, color, label in ((means, _ALL, "mean"), (best, _KEPT, "best")):
        axes.hist(values, edges, color=color, alpha=0.7, label=f"{label} of a prompt's responses")
        if len(values):
            axes.axvline(values.mean(), color=color, linestyle="--")
    axes.set_xlabel("score (dashed: the mean over prompts)")
    axes.set_ylabel("prompts")


def _filter(axes: Any, chooser: FilterChooser) -> None:
    """Kept and dropped scores, with the limits; over the length where that decides."""
    scores, lengths, limits = chooser.seen.scores, chooser.seen.lengths, chooser.limits
    kept = limits.keep(scores, lengths) if len(scores) else np.zeros(0, np.bool_)
    sets = ((kept, _KEPT, "kept"), (~kept, _DROPPED, "dropped"))
    edges = _edges(scores)
    colors = [color for _, color, _ in sets]
    values = [scores[chosen] for chosen, _, _ in sets]
    if limits.edges:
        for chosen, color, label in sets:
            # As many dots as one can see, in even steps.
            step = max(1, int(chosen.sum()) // _DOTS)
            x, y = lengths[chosen][::step], scores[chosen][::step]
            axes.scatter(
                x, y, s=6, color=color, alpha=0.6, rasterized=True, label=f"{label}: {chosen.sum()}"
            )
        borders = [float(lengths.min()), *limits.edges, float(lengths.max()) + 1]
        for border in (limits.low, limits.high):
            if np.isfinite(border).all():
                axes.stairs(border, borders, baseline=None, color="black", linewidth=1)
        axes.set_xlabel("length in characters (lines: the limits)")
        axes.set_ylabel("score")
        beside = axes.inset_axes((1.02, 0, 0.2, 1), sharey=axes)
        beside.hist(values, edges, stacked=True, color=colors, orientation="horizontal")
        beside.tick_params(labelleft=False)
        beside.set_xlabel("responses")
        beside.spines[["top", "right"]].set_visible(False)
        return
    labels = [f"{label}: {chosen.sum()}" for chosen, _, label in sets]
    axes.hist(values, edges, stacked=True, color=colors, label=labels)
    for limit in (limits.low[0], limits.high[0]):
        if len(scores) and np.isfinite(limit):
            axes.axvline(limit, color="black", linewidth=1)
    axes.set_xlabel("score (lines: the limits)")
    axes.set_ylabel("responses")


def _pairs(axes: Any, chooser: PairChooser) -> None:
    """Draw the margins, by which of the two responses is longer."""
    margins, longer = np.array(chooser.margins), np.array(chooser.longer)
    sets = (
        (longer > 0, _DROPPED, "chosen is longer"),
        (longer <= 0, _KEPT, "chosen is not longer"),
    )
    values = [margins[chosen] for chosen, _, _ in sets]
    labels = [f"{label}: {len(each)}" for (_, _, label), each in zip(sets, values, strict=True)]
    colors = [color for _, color, _ in sets]
    axes.hist(values, _edges(margins), stacked=True, color=colors, label=labels)
    axes.set_xlabel("margin")
    axes.set_ylabel("pairs")


def _edges(values: Any) -> Any:
    """Return the edges of the bins for all values."""
    if not len(values):
        return np.linspace(0, 1, _BINS + 1)
    low, high = float(np.min(values)), float(np.max(values))
    # Wide enough for edges that differ, where scores do so by rounding only, or not at all.
    short = 1e-9 * max(1.0, abs(low), abs(high)) - (high - low)
    if short > 0:
        low, high = low - short / 2, high + short / 2
    part = np.linspace(0, 1, _BINS + 1)
    return low * (1 - part) + high * part  # high - low may be more than a float holds
