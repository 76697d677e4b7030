"""The page on containers: each cell of its table has its evidence, and its commands exist."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.project.test_deployment import flags_in, flags_of, instructions, only

PAGE = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
EVIDENCE = re.compile(r".+ \([TSNMB]\)|.*\bunverified")


def rows() -> dict[str, dict[str, str]]:
    """The table, by release and column."""
    [table] = re.findall(r"^\| release .*\n(?:\|.*\n)+", PAGE, re.MULTILINE)
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def test_all_releases_are_there() -> None:
    """From the wheel's to the last one: one each month but in 24.10's year."""
    months = [(year, month) for year in (24, 25, 26) for month in range(1, 13)]
    between = months[months.index((24, 10)) : months.index((26, 7)) + 1]
    assert [*rows()] == [f"{year}.{month:02}" for year, month in between]


@pytest.mark.parametrize("release", rows())
def test_a_cell_has_its_evidence(release: str) -> None:
    row = rows()[release]
    for column, cell in row.items():
        assert column == "release" or EVIDENCE.fullmatch(cell), f"{release}, {column}: {cell}"


def test_the_marks_are_explained() -> None:
    used = {*re.findall(r"\(([TSNMB])\)", " ".join(c for r in rows().values() for c in r.values()))}
    assert used == {*re.findall(r"\*\*([A-Z])\*\*", PAGE)}


def test_nothing_but_the_wheels_release_is_called_tested() -> None:
    tested = [release for release, row in rows().items() if "(T)" in " ".join(row.values())]
    assert tested == ["24.10"]


def test_versions_rise() -> None:
    versions = [row["Triton"].split()[0] for row in rows().values()]
    assert versions[0] == "2.51.0"  # constraints.txt has its tritonclient
    assert "tritonclient==2.51.0" in (ROOT / "constraints.txt").read_text()
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted({*numbers})


def test_the_image_is_built_on_a_release_of_the_table() -> None:
    [release] = [
        i.arguments.partition("=")[2]
        for i in instructions()
        if i.name == "ARG" and i.arguments.startswith("TRITON_VERSION")
    ]
    row = rows()[release]
    assert row["Triward on it"].startswith("default")
    pins = (ROOT / "docker" / "constraints.txt").read_text()
    assert f"tritonclient=={row['Triton'].split()[0]}" in pins
    assert row["numpy 2 in models"].startswith("yes") == ("numpy==2." in pins)


def test_the_commands_exist() -> None:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", "")
    runs = [shlex.split(line) for line in text.splitlines() if line.startswith("docker run")]
    given = [words[words.index("triward") + 1 :] for words in runs]
    default = json.loads(only("CMD"))
    assert [words[:1] for words in given] == [[], ["export"]]
    for command, *flags in (given[1], default):
        assert flags_in(flags) <= flags_of(command)
    variables = dict(word.split("=", 1) for word in shlex.split(only("ENV")))
    assert f"{variables['HF_HOME']}" in " ".join(runs[1])
    assert variables["HF_HUB_OFFLINE"] == "1" and "HF_HUB_OFFLINE=0" in runs[1]
