"""The table of values in the chart's README: `python -m tests.helm.table` prints it.

A value's line is the comment above it in `values.yaml`. What is an open object in
`values.schema.json` (labels, a pod's affinity) is one value; what has keys of its own is a group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "docker" / "helm" / "triward"
LONGEST = 70  # characters of a default that the table shows


@dataclass(frozen=True)
class Value:
    """A line of the table.

    Args:
        path: keys from the top, joined by dots.
        default: as `values.yaml` has it.
        comment: what it says.
    """

    path: str
    default: Any
    comment: str

    def row(self) -> str:
        shown = json.dumps(self.default, ensure_ascii=False)
        shown = f"`{shown}`" if len(shown) <= LONGEST else "see `values.yaml`"
        return f"| `{self.path}` | {shown} | {self.comment} |"


def groups(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Paths of the objects whose keys the schema lists."""
    for key, each in schema.get("properties", {}).items():
        if "properties" in each:
            yield f"{path}{key}"
            yield from groups(each, f"{path}{key}.")


def values() -> list[Value]:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    defaults = yaml.safe_load(text)
    inner = set(groups(json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))))
    found, keys, comments = [], [], []
    for line in text.splitlines():
        if comment := re.fullmatch(r" *# (.*)", line):
            comments.append(comment[1])
            continue
        key = re.match(r"( *)([\w-]+):", line)
        depth = len(key[1]) // 2 if key else 0
        # Deeper than its group: a part of the value above.
        if key and (depth == 0 or ".".join(keys[:depth]) in inner):
            keys = [*keys[:depth], key[2]]
            path = ".".join(keys)
            if path not in inner:
                default = defaults
                for each in keys:
                    default = default[each]
                found.append(Value(path, default, " ".join(comments)))
        comments = []
    return found


def table() -> str:
    rows = [value.row() for value in values()]
    return "\n".join(["| value | default | what it is |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
