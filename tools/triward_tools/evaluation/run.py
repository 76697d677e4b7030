"""An evaluation: public files in, a folder with every row's scores and a report out.

The folder can be gone on with after a failure or a kill. It holds

    manifest.json   what the scores depend on: benchmark, model, and the data files' digests
    results.jsonl   a line for each row, in order; see `ledger`
    report.*        made anew from results.jsonl at the end of each run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from triward.client import RewardClient
from triward.errors import InvalidRequest

from triward_tools.evaluation.asking import results_of
from triward_tools.evaluation.formats import files_of, placed_pairs, read_pairs
from triward_tools.evaluation.ledger import Ledger
from triward_tools.evaluation.report import Report, write_report
from triward_tools.evaluation.results import Labelled, Problem
from triward_tools.jobs import check_apart, fingerprint, pin_manifest, row_bar

MANIFEST = "manifest.json"

# Of the manifest, of results.jsonl, and of how a row becomes a prompt.
_FORMAT = 1


def evaluate(
    client: RewardClient,
    benchmark: str,
    data: Path,
    output: Path,
    *,
    concurrency: int = 32,
    patience: float = 600.0,
    progress: bool = False,
    seed: int = 0,
) -> Report:
    """Score a benchmark's pairs and write a report. Goes on with a run that was interrupted.

    Args:
        client: who is asked.
        benchmark: one of `formats.FORMATS`.
        data: its file or folder.
        output: a folder, new or this run's. One run at a time may write to it.
        concurrency: how many requests are in flight at once.
        patience: seconds for which servers may answer nothing but UNAVAILABLE.
        progress: show a bar on standard error, which counts rows.
        seed: of the report's resampling.

    Returns:
        The report. Rows without scores are the ledger's problems.

    Raises:
        JobMismatch: the output is another run's; the message says what differs.
        InvalidRequest: the data cannot be read, or hold no row.
        TriwardError: as for `asking.results_of`. What is finished is kept.
    """
    data, output = data.absolute(), output.absolute()
    check_apart(data, output)
    # Data that cannot be read leave no folder behind that other data would not fit.
    total = sum(1 for _ in read_pairs(benchmark, data))
    if not total:
        raise InvalidRequest(f"{data}: holds no row")
    pin_manifest(output, MANIFEST, _manifest(client, benchmark, data))
    with Ledger(output) as ledger:
        done = len(ledger.entries)
        rows = islice(placed_pairs(benchmark, data), done, None)
        entries = results_of(client, rows, concurrency=concurrency, patience=patience)
        with closing(entries), row_bar(progress, done, total) as bar:
            for entry in entries:
                ledger.append(entry)
                bar.update()

    def pair_of(indices: Sequence[int]) -> Mapping[int, Labelled]:
        wanted = set(indices)
        found = (row for row in read_pairs(benchmark, data) if row.index in wanted)
        return {row.index: row for row in found if not isinstance(row, Problem)}

    return write_report(
        output, benchmark, ledger.results(), ledger.problems(), pair_of,
        model=client.model, seed=seed,
    )  # fmt: skip


def _manifest(client: RewardClient, benchmark: str, data: Path) -> dict[str, Any]:
    """Return what the scores depend on. Of pictures beside the files only the paths are in it."""
    root = data if data.is_dir() else data.parent
    files = files_of(benchmark, data)
    return {
        "format": _FORMAT,
        "benchmark": benchmark,
        "model": client.model,
        **{f"file {path.relative_to(root).as_posix()}": fingerprint(path) for path in files},
    }
