"""Helm itself, as `.venv-helm` has it: reads cases, and writes what became of each.

Runs in that environment and imports nothing of this project. A case is rendered as `helm install
--dry-run=client` does it, with the values' schema and the release's notes, and without a cluster;
hooks come from `render`, since an install does not return them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import helm_python as helm


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    """Lint and render a case: `chart`, `name`, `namespace`, and `values` as YAML."""
    values = helm.values_from_yaml(case["values"]) or {}
    report = helm.lint(case["chart"], values, strict=True, namespace=case["namespace"])
    # 1 is advice, such as to have an icon.
    found: dict[str, Any] = {"lint": [m for m in report["messages"] if m["severity"] > 1]}
    place = {"name": case["name"], "namespace": case["namespace"]}
    cluster = {"kubeconfig_content": "{apiVersion: v1, kind: Config}", "storage_driver": "memory"}
    try:
        with (
            helm.Chart.load(case["chart"]) as chart,
            helm.Config(namespace=case["namespace"], **cluster) as nowhere,
        ):
            found["files"] = chart.render(values, **place)
            found["notes"] = nowhere.install(chart, **place, values=values, dry_run="client")[
                "notes"
            ]
    except helm.HelmError as error:
        found["error"] = str(error)
    return found


def main() -> None:
    """Answer a list of cases, or with `package CHART FOLDER` name the archive that was written."""
    if sys.argv[1:2] == ["package"]:
        print(Path(helm.package(sys.argv[2], destination=sys.argv[3])).name)
    else:
        json.dump([outcome(case) for case in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
