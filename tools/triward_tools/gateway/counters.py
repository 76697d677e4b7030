"""Metrics of a gateway, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Counts of one process; all changes are made in the event loop.

    Attributes:
        requests: by door and status.
        seconds: by door, of requests that are answered.
        scores: by door, rewards that were given.
        running: requests at this moment.
        held_bytes: of bodies at this moment.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    scores: Counter[str] = field(default_factory=Counter)
    running: int = 0
    held_bytes: int = 0

    def text(self) -> str:
        """Return the page for Prometheus."""
        lines = ["# TYPE triward_gateway_requests_total counter"]
        for (door, status), count in sorted(self.requests.items()):
            labels = f'door="{door}",status="{status}"'
            lines.append(f"triward_gateway_requests_total{{{labels}}} {count}")
        for name, counts in (("seconds", self.seconds), ("scores", self.scores)):
            lines.append(f"# TYPE triward_gateway_{name}_total counter")
            for door, value in sorted(counts.items()):
                lines.append(f'triward_gateway_{name}_total{{door="{door}"}} {value}')
        for name, gauge in (("running", self.running), ("held_bytes", self.held_bytes)):
            lines.append(f"# TYPE triward_gateway_{name} gauge")
            lines.append(f"triward_gateway_{name} {gauge}")
        return "\n".join(lines) + "\n"
