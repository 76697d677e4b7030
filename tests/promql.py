"""Every PromQL expression in docker/: alerts, dashboards and the autoscaler's metric."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DOCKER = Path(__file__).resolve().parent.parent / "docker"
ALERTS = DOCKER / "prometheus" / "alerts.yml"
DASHBOARDS = DOCKER / "grafana" / "dashboards"
ADAPTER = DOCKER / "kubernetes" / "prometheus-adapter-values.yaml"


def rules() -> list[dict[str, Any]]:
    """Recording rules and alerts."""
    return [r for group in yaml.safe_load(ALERTS.read_text())["groups"] for r in group["rules"]]


def panels(dashboard: Path) -> list[dict[str, Any]]:
    return json.loads(dashboard.read_text())["panels"]


def adapter_rules() -> list[dict[str, Any]]:
    return yaml.safe_load(ADAPTER.read_text())["rules"]["custom"]


def expressions() -> dict[str, str]:
    """Where it stands -> the expression, with what Grafana and the adapter fill in filled in."""
    return dict(_expressions())


def metric_names() -> set[str]:
    """Metrics that servers have to export for alerts, dashboards and the autoscaler to work.

    Without `up`, which Prometheus makes, and what recording rules make.
    """
    names = set().union(*map(selected, expressions().values()))
    return names - {rule["record"] for rule in rules() if "record" in rule} - {"up"}


def selected(expression: str) -> set[str]:
    """Names of the metrics that an expression reads.

    Raises:
        ValueError: it is not PromQL, or its types do not fit.
    """
    names: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, f"a selector without a name in {expression}"
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return names


def _expressions() -> Iterator[tuple[str, str]]:
    for number, rule in enumerate(rules()):
        yield f"{ALERTS.name}: {rule.get('alert') or rule['record']} {number}", rule["expr"]
    for dashboard in sorted(DASHBOARDS.glob("*.json")):
        for panel in panels(dashboard):
            for target in panel["targets"]:
                where = f"{dashboard.name}: {panel['title']} {target['refId']}"
                yield where, target["expr"].replace("$__rate_interval", "1m")
    for rule in adapter_rules():
        name = rule["name"]["as"]
        yield f"{ADAPTER.name}: {name}, series", rule["seriesQuery"]
        query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="default"')
        yield f"{ADAPTER.name}: {name}, query", re.sub(r"<<\.GroupBy>>", "pod", query)
