"""The results as one HTML file: plots as inline SVG, tables, sizing. It loads nothing.

    python -m benchmarks.perf_analyzer.report benchmarks/results/NAME.json --peak 50 --p99-ms 800

draws it again, and sizes for another objective from the same measurements.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.commands import run_main
from benchmarks.perf_analyzer.runner import BACKLOG, WARM_UP
from benchmarks.perf_analyzer.sizing import Objective, sizing
from triward_server.schema import ENSEMBLE, FORWARD, PREPROCESS

Point = Mapping[str, Any]

PERCENTILES = {"p50": "#7fb77e", "p95": "#2b7a3d", "p99": "#12351b"}
LIMIT = "#b3261e"
GRAY = "#5f6368"

# What a request waits for on the server, in order of time: label, model, part, colour.
STACK = (
    ("preprocess: queue", PREPROCESS, "queue", "#c9d7f0"),
    ("preprocess: compute", PREPROCESS, "compute_infer", "#4a74b8"),
    ("forward: queue", FORWARD, "queue", "#f3d9a4"),
    ("forward: compute", FORWARD, "compute_infer", "#d98e1f"),
)
REST = ("copies and the rest", "#c9ccd1")

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.25rem 1rem 3rem; background: #fff;
  color: #202124; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .3rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; padding-top: .7rem;
  border-top: 1px solid #e3e5e8; }
p { max-width: 76ch; margin: .5rem 0; }
.quiet { color: #5f6368; font-size: .87rem; }
.plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }
.plots.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #eceef0; }
th { font-weight: 600; color: #3c4043; white-space: normal; vertical-align: bottom;
  border-bottom-color: #9aa0a6; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.bad td { background: #fdf1f0; }
.result { background: #f1f7f2; border-left: 4px solid #2b7a3d; padding: .7rem 1rem;
  margin: .8rem 0; }
.legend { display: flex; flex-wrap: wrap; max-width: none; gap: .2rem 1.1rem; font-size: .87rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
.busy { background: #fdf1f0; border-left-color: #b3261e; }
code { font-size: .92em; overflow-wrap: anywhere; }
"""


def write_perf_report(results: Mapping[str, Any], output: Path) -> None:
    """Write the report of a results file."""
    # Text stays text, so that a phone can enlarge it; equal results give equal files.
    style = {"svg.fonttype": "none", "svg.hashsalt": "triward", "font.size": 9}
    with mpl.rc_context({**style, "font.family": "sans-serif"}):
        output.write_text(_page(results))


def _page(results: Mapping[str, Any]) -> str:
    mixes = results["mixes"]
    opened = {name: mix for name, mix in mixes.items() if mix["open"]}
    parts = [
        _head(results),
        _section("Sizing", _sizing(results)),
        _section(
            "Open loop: latency at an offered rate",
            "<p>Requests arrive by a Poisson process, whether answers are back or not: what users "
            "do. The dashed line is the closed loop's highest throughput. A hollow marker is "
            f"overloaded: the queue grew by more than {BACKLOG:.0%} of the arrivals, so its "
            "latencies would grow on with time.</p>"
            + _plots((_open_plot(n, mix, results) for n, mix in opened.items()), "large"),
        ),
        _section(
            "Closed loop: throughput against latency",
            "<p>Each of so many callers (the number at the points) waits for its answer before it "
            "sends again: what a trainer does.</p>"
            + _plots(_closed_plot(name, mix) for name, mix in mixes.items()),
        ),
        _section(
            "Where the time goes on the server",
            "<p>Triton's own averages over a point's requests, failed ones not included. A request "
            "waits as long as its whole batch computes.</p>"
            + _legend()
            + _plots(
                _split_plot(name, loop, mix[loop])
                for name, mix in mixes.items()
                for loop in ("open", "closed")
                if mix[loop]
            ),
        ),
        _section("All points", "".join(_table(name, mix) for name, mix in mixes.items())),
        _section("How it was measured", _method(results)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Triward: throughput against latency</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{''.join(parts)}</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _plots(figures: Iterable[str], kind: str = "") -> str:
    return f'<div class="plots {kind}">\n{"".join(figures)}</div>'


def _head(results: Mapping[str, Any]) -> str:
    machine, served = results["machine"], results["served"]
    where = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores"
    if "url" in served:
        what = f"the server at {served['url']}; the load came from {where}"
    else:
        what = (
            f"a <code>{served['size']}</code> random checkpoint in {served['dtype']}, "
            f"{served['threads']} forward thread{'s' * (served['threads'] != 1)}, on {where}"
        )
    loads = ", ".join(f"{value:g}" for value in machine["load_average"])
    busy = (
        '<p class="result busy">Other work kept this machine busy during the run: its figures show '
        "the method, not what the server can do.</p>\n"
    )
    return (
        "<h1>Throughput against latency</h1>\n"
        f"<p>Measured with perf_analyzer over gRPC against {what}.</p>\n"
        f'<p class="quiet">{escape(machine["date"])}, commit <code>{escape(str(machine["commit"]))}'
        f"</code>, load averages before the run {loads}</p>\n"
        + (busy if machine["load_average"][0] > 2 * machine["cores"] else "")
    )


def _sizing(results: Mapping[str, Any]) -> str:
    objective = results["objective"]
    text = (
        "<p>replicas = &lceil;peak &times; headroom / rate at which p99 meets the objective&rceil; "
        "+ 1. The rate is the highest of the open loop up to which every point met it; one more "
        "replica stands in for one that fails or restarts.</p>"
    )
    for mix, found in results["sizing"].items():
        asked = (
            f"<b>{escape(mix)}</b>, p99 within {objective['p99_ms']:g} ms, "
            f"{objective['peak']:g} requests/s at peak, headroom {objective['headroom']:g}: "
        )
        if found["replicas"] is None:
            answer = "no measured point meets this objective."
        else:
            answer = (
                f"one replica bears {found['rate_per_s']:.2f} requests/s (p99 "
                f"{found['p99_ms']:.0f} ms there), so &lceil;{objective['peak']:g} &times; "
                f"{objective['headroom']:g} / {found['rate_per_s']:.2f}&rceil; + 1 = "
                f"{found['working']} + 1 = <b>{found['replicas']} replicas</b>."
            )
        text += f'<p class="result">{asked}{answer}</p>'
    return text


def _figure(title: str, size: tuple[float, float] = (3.7, 2.3)) -> tuple[Figure, Axes]:
    """Draw a plot; its width in inches sets how large its letters look in the page."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eceef0")
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    image = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>{image}</figure>\n"


def _latency_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.set_yscale("log")
    low, high = min(values), max(values)
    axes.set_ylim(low / 1.4, high * 1.5)
    ticks = [d * 10.0**e for e in range(-1, 7) for d in (1, 2, 5)]
    axes.set_yticks([t for t in ticks if low / 1.4 <= t <= high * 1.5])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylabel("latency, ms")


def _measured(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if not p["error"] and p["latency_ms"]]


def _open_plot(name: str, mix: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    figure, axes = _figure(name, (4.8, 3.0))
    points = _measured(mix["open"])
    rates = [p["arrivals_per_s"] for p in points]
    for label, color in PERCENTILES.items():
        values = [p["latency_ms"][label] for p in points]
        axes.plot(rates, values, color=color, label=label, linewidth=1.6)
        for rate, value, point in zip(rates, values, points, strict=True):
            fill = "white" if point["overloaded"] else color
            axes.plot(rate, value, "o", color=color, markerfacecolor=fill, markersize=5)
    objective = results["objective"]["p99_ms"]
    axes.axhline(objective, color=LIMIT, linewidth=0.9, linestyle=":", label="p99 objective")
    axes.axvline(
        mix["capacity_per_s"],
        color=GRAY,
        linewidth=0.9,
        linestyle="--",
        label="closed-loop highest",
    )
    if points:
        every = [v for p in points for k, v in p["latency_ms"].items() if k in PERCENTILES]
        _latency_axis(axes, [*every, objective])
    axes.set_xlim(left=0)
    axes.set_xlabel("offered, requests/s (measured arrivals)")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return _svg(figure, f"{name}: latency at an offered rate")


def _closed_plot(name: str, mix: Mapping[str, Any]) -> str:
    figure, axes = _figure(name)
    points = _measured(mix["closed"])
    rates = [p["requests_per_s"] for p in points]
    for label, color in PERCENTILES.items():
        values = [p["latency_ms"][label] for p in points]
        axes.plot(rates, values, "o-", color=color, label=label, markersize=4, linewidth=1.4)
    for point, rate in zip(points, rates, strict=True):
        place = (rate, point["latency_ms"]["p99"])
        axes.annotate(f"{point['value']:g}", place, (0, 5), textcoords="offset points", ha="center")
    if points:
        every = [v for p in points for k, v in p["latency_ms"].items() if k in PERCENTILES]
        _latency_axis(axes, [*every, max(every) * 1.3])
        axes.set_xlim(0, max(rates) * 1.12)
    axes.set_xlabel("throughput, requests/s")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return _svg(figure, f"{name}: throughput against latency")


def _split_plot(name: str, loop: str, points: Sequence[Point]) -> str:
    figure, axes = _figure(f"{name}, {loop} loop")
    served = [p for p in points if p["server"][ENSEMBLE]["requests"]]
    places = range(len(served))
    bottom = [0.0] * len(served)
    for heights, color in _layers(served):
        axes.bar(places, heights, 0.62, bottom=bottom, color=color)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    rate = "arrivals_per_s" if loop == "open" else "value"
    axes.set_xticks(places, [f"{p.get(rate, p['value']):.3g}" for p in served])
    axes.set_xlabel("offered, requests/s" if loop == "open" else "callers at a time")
    axes.set_ylabel("ms a request")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    return _svg(figure, f"{name}, {loop} loop: time on the server")


def _layers(points: Sequence[Point]) -> list[tuple[list[float], str]]:
    """Milliseconds of each part, bottom first; what is left of the ensemble's total on top."""
    layers = [
        ([p["server"][model][f"{part}_ms"] for p in points], color)
        for _, model, part, color in STACK
    ]
    totals = [p["server"][ENSEMBLE]["total_ms"] for p in points]
    known = [sum(column) for column in zip(*(heights for heights, _ in layers), strict=True)]
    rest = [max(0.0, t - k) for t, k in zip(totals, known, strict=True)]
    return [*layers, (rest, REST[1])]


def _legend() -> str:
    entries = [*((label, color) for label, _, _, color in STACK), REST]
    marks = [f'<span><i style="background:{c}"></i>{escape(label)}</span>' for label, c in entries]
    return f'<p class="legend">{"".join(marks)}</p>'


_COLUMNS = (
    "load", "requests", "requests/s", "responses/s", "arrivals/s", "p50 ms", "p95 ms", "p99 ms",
    "failed", "delayed", "unfinished", "requests a pass", "",
)  # fmt: skip


def _table(name: str, mix: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
    rows = "".join(_row(point, mix) for loop in ("closed", "open") for point in mix[loop])
    note = (
        f'<p class="quiet"><b>{escape(name)}</b>: on average {mix["responses_per_request"]:.2g} '
        f"to score and {mix['bytes_per_request'] / 1000:.3g} kB a request</p>"
    )
    return (
        f'{note}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _row(point: Point, mix: Mapping[str, Any]) -> str:
    closed = point["loop"] == "closed"
    forward = point["server"][FORWARD]
    batch = forward["requests"] / max(1, forward["executions"])
    load = f"{point['value']:g} at a time" if closed else f"{point['value']:.3g}/s"
    end = [f"{point['failed']}", f"{point['delayed_percent']:g} %"]
    if point["error"]:
        middle = ["–"] * 7
        end += ["–", f"{batch:.1f}", escape(point["error"][:90])]
    else:
        rate = point["requests_per_s"]
        latency = point["latency_ms"] or {}
        times = [f"{latency[p]:,.0f}" if p in latency else "–" for p in PERCENTILES]
        arrivals = "–" if closed else f"{point['arrivals_per_s']:.2f}"
        responses = rate * mix["responses_per_request"]
        middle = [str(point["requests"]), f"{rate:.2f}", f"{responses:.2f}", arrivals, *times]
        end += [str(point["unfinished"]), f"{batch:.1f}", "overloaded" * point["overloaded"]]
    bad = point["error"] or point["overloaded"] or point["failed"]
    cells = "".join(f"<td>{cell}</td>" for cell in (load, *middle, *end))
    return f"<tr{' class=bad' if bad else ''}>{cells}</tr>"


def _method(results: Mapping[str, Any]) -> str:
    plan, machine = results["plan"], results["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return (
        f"<p>Requests come from a file of {plan['count']} built from seed {plan['seed']}, shapes "
        f"<code>{escape(plan['scale'])}</code>; real encoded images, no two alike. Closed-loop "
        f"points take {plan['closed_seconds']:g} s, open-loop ones {plan['open_seconds']:g} s; "
        f"the first {WARM_UP:.0%} of each are left out. Percentiles are numpy's, of every "
        "request's own timestamps, and count where requests end; with fewer than 100 requests p99 "
        "is nearly the slowest one.</p>"
        "<p>Arrivals are counted, because perf_analyzer draws its Poisson schedule from one fixed "
        "seed and short runs get fewer than they ask for. Failed: requests that the server "
        "answered with an error; perf_analyzer stops at the first, so such a point has no "
        "throughput. Delayed: left later than scheduled. Unfinished: sent, but not answered when "
        "the point ended.</p>"
        f'<p class="quiet">Python {escape(machine["python"])}, {escape(packages)}</p>'
    )


def main(
    results: Annotated[Path, typer.Argument(help="JSON file of benchmarks.perf_analyzer.")],
    p99_ms: Annotated[float | None, typer.Option(help="Another objective.")] = None,
    peak: Annotated[float | None, typer.Option(help="Other requests per second.")] = None,
    headroom: Annotated[float | None, typer.Option(help="Another factor on the peak.")] = None,
) -> None:
    """Size for what is given, in the results too, and write the report beside them."""
    data = json.loads(results.read_text())
    given = {"p99_ms": p99_ms, "peak": peak, "headroom": headroom}
    wanted = data["objective"] | {key: value for key, value in given.items() if value is not None}
    data |= sizing(data["mixes"], Objective(**wanted))
    results.write_text(json.dumps(data, indent=2) + "\n")
    write_perf_report(data, results.with_suffix(".html"))


if __name__ == "__main__":
    run_main(main)
