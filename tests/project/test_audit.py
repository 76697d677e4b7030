"""The audit's verdict on what pip-audit reports."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

FINE = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "not found"}
FLAWED = {
    "name": "c", "version": "2",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}, {"id": "PYSEC-2", "fix_versions": []}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([FINE, SKIPPED], 0, "1 of 2 packages were looked up; 0 known"),
        ([SKIPPED], 0, "NOTHING WAS AUDITED"),
        ([FINE, FLAWED, SKIPPED], 1, "c 2: PYSEC-1, fixed in 3\nc 2: PYSEC-2, fixed in no release"),
    ],
)
def test_verdict(packages: list[dict[str, Any]], code: int, words: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "audit.py"], input=json.dumps({"dependencies": packages}),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code
    assert words in done.stdout
    assert ("NOTHING" in done.stdout) == (packages == [SKIPPED])
