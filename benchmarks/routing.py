"""Simulate 1 to 64 servers with memories of prompts: taking turns against routing by prompt.

    python -m benchmarks.routing --output benchmarks/results/DATE-routing.json

Several clients ask, each prompt's responses from one of them. Each takes turns, or has a router of
its own (`triward.routing.Router`, the real one). A server computes one request after the other, and
remembers so many prompts, the latest used. The soak's results hold no times of arrival, so these
are drawn: rollouts begin as a Poisson process; each response arrives when it is generated, after a
log-normal time. Rates grow with the servers: each is offered the same share of what it could do if
it remembered nothing.
"""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle
from math import log
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.figure import Figure

from benchmarks.commands import run_main
from benchmarks.measure import machine, writable
from triward.routing import Router

SERVERS = (1, 2, 4, 8, 16, 32, 64)
POLICIES = {"round robin": "#9aa0a6", "by prompt": "#2b7a3d"}
CLIENTS = 16  # processes of trainers


@dataclass(frozen=True)
class Traffic:
    """Requests and servers.

    Attributes:
        responses: of a prompt, each a request of its own.
        utilisation: share of its time that a server would need if it remembered nothing.
        miss, hit: seconds for a request whose prompt is new to the server, or remembered.
        prompts: that a server remembers.
        median, sigma: of the log-normal seconds from a prompt's first token to a response's last.
        warm_up, seconds: of arrivals, not counted and counted.
    """

    responses: int
    utilisation: float
    # The 7B's prediction for a single conversation on an H100 (1,059 tokens of prompt with an
    # image, 250 of response), and that times the response's share of the FLOPs: 3.4 of 22.9 T.
    miss: float = 0.059
    hit: float = 0.059 * 3.4 / 22.9
    prompts: int = 330  # 20 GB of keys and values
    median: float = 10.0
    sigma: float = 0.6
    warm_up: float = 60.0
    seconds: float = 120.0


LOADS = {
    "8 responses to a prompt, load 0.8": Traffic(8, 0.8),
    "8 responses to a prompt, load 1.2": Traffic(8, 1.2),
    "each prompt once, load 0.8": Traffic(1, 0.8),
}


def arrivals(load: Traffic, servers: int, seed: int) -> list[tuple[float, int]]:
    """Seconds and prompt of each request, in order."""
    rng = np.random.default_rng(seed)
    end = load.warm_up + load.seconds
    rate = servers * load.utilisation / load.miss / load.responses  # prompts a second
    starts = np.cumsum(rng.exponential(1 / rate, int(1.1 * rate * end) + 100))
    spread = rng.lognormal(log(load.median), load.sigma, (len(starts), load.responses))
    times = starts[:, None] + spread
    requests = [(float(t), prompt) for prompt, row in enumerate(times) for t in row if t < end]
    return sorted(requests)


class Server:
    """A queue, and a memory of prompts."""

    def __init__(self, load: Traffic) -> None:
        self._load = load
        self._known: OrderedDict[int, None] = OrderedDict()
        self._free = 0.0

    def take(self, now: float, prompt: int) -> tuple[float, float, bool]:
        """Queue a request; when it begins and is done, and whether its prompt is remembered."""
        hit = prompt in self._known
        self._known[prompt] = None
        self._known.move_to_end(prompt)
        if len(self._known) > self._load.prompts:
            self._known.popitem(last=False)
        begun = max(now, self._free)
        self._free = begun + (self._load.hit if hit else self._load.miss)
        return begun, self._free, hit


def simulate(load: Traffic, servers: int, policy: str, seed: int) -> dict[str, float]:
    """Return the hit rate and percentiles of the wait for a server."""
    names = [f"reward-{number}:8001" for number in range(servers)]
    routers = [Router(names) for _ in range(CLIENTS)]
    turns = [cycle(names[i % servers :] + names[: i % servers]) for i in range(CLIENTS)]
    there = {name: Server(load) for name in names}
    flying: list[tuple[float, int, ExitStack]] = []
    waits, hits = [], []
    for number, (now, prompt) in enumerate(arrivals(load, servers, seed)):
        while flying and flying[0][0] <= now:
            heapq.heappop(flying)[2].close()
        call, client = ExitStack(), prompt % CLIENTS
        if policy == "round robin":
            name = next(turns[client])
        else:
            key = prompt.to_bytes(8, "little")
            name = call.enter_context(routers[client].call(key, ()))
        begun, done, hit = there[name].take(now, prompt)
        heapq.heappush(flying, (done, number, call))
        if now >= load.warm_up:
            waits.append(begun - now)
            hits.append(hit)
    p50, p99 = np.percentile(waits, [50, 99])
    return {
        "requests": len(waits),
        "hit_rate": round(float(np.mean(hits)), 4),
        "wait_p50_ms": round(1e3 * float(p50), 2),
        "wait_p99_ms": round(1e3 * float(p99), 2),
    }


def rows(seed: int) -> Iterator[dict[str, Any]]:
    """Simulate every load, size and policy."""
    for name, load in LOADS.items():
        for servers in SERVERS:
            for policy in POLICIES:
                result = simulate(load, servers, policy, seed)
                yield {"load": name, "servers": servers, "policy": policy, **result}


def draw_policies(results: dict[str, Any], output: Path) -> None:
    """Hit rate and p99 of the wait over the number of servers, one column a load."""
    mpl.rcParams["svg.hashsalt"] = "triward"  # equal results give equal files
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    grid = figure.subplots(2, len(LOADS), sharex=True, sharey="row", squeeze=False)
    for column, load in enumerate(LOADS):
        for line, (key, label) in enumerate(
            (("hit_rate", "share of requests whose prompt\nis remembered"),
             ("wait_p99_ms", "wait for a server, p99 (ms)"))
        ):  # fmt: skip
            axes = grid[line, column]
            for policy, color in POLICIES.items():
                found = [
                    (row["servers"], row[key])
                    for row in results["rows"]
                    if (row["load"], row["policy"]) == (load, policy)
                ]
                axes.plot(*zip(*found, strict=True), "o-", color=color, label=policy)
            axes.set_xscale("log", base=2)
            axes.set_xticks(SERVERS, map(str, SERVERS))
            if line:
                axes.set_yscale("log")
            else:
                axes.set_ylim(0, 1)
            axes.spines[["top", "right"]].set_visible(False)
            if not column:
                axes.set_ylabel(label)
        grid[0, column].set_title(load, fontsize=10)
        grid[1, column].set_xlabel("servers")
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main(
    output: Annotated[Path, typer.Option(help="JSON file; the picture goes beside it.")],
    seed: int = 0,
) -> None:
    """Simulate, print and write."""
    writable(output, ".svg")
    results: dict[str, Any] = {
        "machine": machine(),
        "seed": seed,
        "clients": CLIENTS,
        "loads": {name: asdict(load) for name, load in LOADS.items()},
        "rows": [],
    }
    for row in rows(seed):
        results["rows"].append(row)
        typer.echo(json.dumps(row))
    output.write_text(json.dumps(results, indent=2) + "\n")
    draw_policies(results, output.with_suffix(".svg"))


if __name__ == "__main__":
    run_main(main)
