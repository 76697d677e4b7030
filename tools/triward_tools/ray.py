"""On a Ray cluster: scores for a Ray Dataset, or for Parquet files in a job that can be resumed.

And what scores are for: the best of N responses, a filter, preference pairs.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import ray.data
from triward.errors import InvalidRequest, TriwardError
from triward.integrations.rows import RowScorer

from triward_tools.offline import AnyPath, OutputCounts, RowGroup, ScoringJob, begin, score_table
from triward_tools.selection import Columns, Pairing
from triward_tools.selection.files import filtering, pairing_of
from triward_tools.selection.rules import Rule
from triward_tools.selection.sink import ColumnTypes, table_of
from triward_tools.selection.tasks import BestOfN, Chooser, Task
from triward_tools.selection.verdicts import Judge, Row, Seen, Verdict

# Many, so that actors finish together; but not one for each row group: Ray's work for a block may
# be more than a small row group's.
_BLOCKS_PER_ACTOR = 64


class RayScorer:
    """For Ray Data's `map_batches`, with `batch_format="pyarrow"`.

        dataset.map_batches(
            RayScorer,
            fn_constructor_args=[RowScorer(client, messages="messages")],
            compute=ray.data.ActorPoolStrategy(size=4),
            batch_format="pyarrow",
            batch_size=256,
        )

    Each actor has at most `concurrency` requests in flight. A failure of the servers fails the job.

    Args:
        scorer: what of a row is scored, and by whom.
    """

    def __init__(self, scorer: RowScorer) -> None:  # noqa: D107 - the class says it
        self._scorer = scorer

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch with its scores and errors."""
        if not isinstance(batch, pa.Table):
            kind = type(batch).__name__
            raise TypeError(f"RayScorer needs batch_format='pyarrow', got a batch of type {kind}")
        return score_table(self._scorer, batch)


def score_parquet(
    source: AnyPath,
    output: AnyPath,
    scorer: RowScorer,
    *,
    actors: int,
    keep: Sequence[str] | None = None,
    chunk_rows: int = 1000,
) -> OutputCounts:
    """Score Parquet files as `offline.score_parquet` does, by `actors` actors of a Ray cluster.

    Input and output lie where all nodes find them under the same path. An actor that is lost is
    replaced. Row groups are what actors share among them.

    Raises:
        TriwardError: as `offline.score_parquet`; the first error of an actor ends the job.
    """
    job = begin(source, output, scorer, keep=keep, chunk_rows=chunk_rows)
    unfinished = job.unfinished()
    if unfinished:
        rows = ray.data.from_items(
            [{"place": place} for place in range(len(unfinished))],
            override_num_blocks=min(len(unfinished), _BLOCKS_PER_ACTOR * actors),
        )
        done = rows.map(
            _Worker,
            fn_constructor_args=[job, unfinished],
            compute=ray.data.ActorPoolStrategy(size=actors),
        )
        error = _first_error(done.iter_rows())
        if error:
            raise pickle.loads(error)
    return job.finish()


def best_of_n(dataset: ray.data.Dataset, columns: Columns) -> ray.data.Dataset:
    """Each row with its best response, as `triward_tools.selection.best_of_n_file` writes it.

    Args:
        dataset: rows that hold scores, as `RayScorer` makes them. A row with the reason why it has
            none, in the column `<scores>_error`, is left out.
        columns: what the dataset's columns hold; that of scores is named.

    Raises:
        InvalidRequest: no column of scores is named. A column that is not there, or a row that
            cannot be used, fails the job.
    """
    _check_scores(columns)
    task = BestOfN(columns.scores or "scores")
    return _chosen(dataset, columns, task, task.begin(Seen.of([])))


def filter_scored(dataset: ray.data.Dataset, rule: Rule, columns: Columns) -> ray.data.Dataset:
    """Return the rows whose scores a rule keeps, as `selection.filter_file` writes them.

    The rule is fitted on this machine, to scores and lengths alone. The dataset is run for that,
    and then held in Ray's object store.

    Args:
        dataset: see `best_of_n`, as the errors.
        rule: is fitted to the scores of all responses.
        columns: likewise.
    """
    held, columns = _held(dataset, columns)
    return _fitted(held, columns, filtering(rule, columns))


def pairs(dataset: ray.data.Dataset, pairing: Pairing, columns: Columns) -> ray.data.Dataset:
    """Preference pairs, as `triward_tools.selection.pairs_file` writes them.

    Like `filter_scored` it runs the dataset first, for the slope of scores on lengths, and to see
    whether there are images.

    Args:
        dataset: see `best_of_n`, as the errors.
        pairing: which responses become pairs.
        columns: likewise.
    """
    held, columns = _held(dataset, columns)
    return _fitted(held, columns, pairing_of(pairing, columns))


def _held(dataset: ray.data.Dataset, columns: Columns) -> tuple[ray.data.Dataset, Columns]:
    """Return the rows in the object store, and the names of their columns."""
    _check_scores(columns)
    # Each look at a dataset runs what comes before it again, which may be to ask for scores.
    held = dataset.materialize()
    return held, columns.among(held.columns() or [])


def _check_scores(columns: Columns) -> None:
    if columns.scores is None:
        raise InvalidRequest("columns.scores: name the column of scores; RayScorer makes one")


def _fitted(held: ray.data.Dataset, columns: Columns, task: Task) -> ray.data.Dataset:
    judged = _Judged(columns, task)
    verdicts = held.map_batches(judged.verdicts, batch_format="pyarrow")
    seen = Seen.of(Verdict(**row) for row in verdicts.iter_rows())
    chooser = task.begin(seen)
    chooser.seen = seen.without_scores()  # it goes to every worker
    return _chosen(held, columns, task, chooser)


def _chosen(
    dataset: ray.data.Dataset, columns: Columns, task: Task, chooser: Chooser
) -> ray.data.Dataset:
    judged = _Judged(columns, task)

    def choose(batch: pa.Table) -> pa.Table:
        return judged.chosen(batch, chooser)

    return dataset.map_batches(choose, batch_format="pyarrow")


@dataclass(frozen=True)
class _Judged:
    """A worker's part in choosing among rows that hold scores."""

    columns: Columns
    task: Task

    def verdicts(self, batch: pa.Table) -> pa.Table:
        """On the rows that have scores."""
        found = [asdict(verdict) for _, verdict in self._of(batch)]
        return pa.Table.from_pylist(found, _VERDICT)

    def chosen(self, batch: pa.Table, chooser: Chooser) -> pa.Table:
        """Return what is chosen of them."""
        scorer = self.columns.among(batch.schema.names).scorer(None)
        rows = [
            made
            for row, verdict in self._of(batch)
            for made in chooser.choose(row.values, scorer.conversations(row.values), verdict).rows
        ]
        gone = {*self.task.removes, *self.task.writes}
        shape = ColumnTypes(pa.schema([field for field in batch.schema if field.name not in gone]))
        shape.see(rows)
        return table_of(rows, shape.schema())

    def _of(self, batch: pa.Table) -> list[tuple[Row, Verdict]]:
        rows = [Row("a row", values) for values in batch.to_pylist()]
        scored = [row for row in rows if not row.values.get(f"{self.columns.scores}_error")]
        columns = self.columns.among(batch.schema.names)
        judge = Judge(columns.scorer(None), self.task, columns.scores)
        verdicts = judge.verdicts(scored)
        for verdict in verdicts:
            if verdict.error:
                raise InvalidRequest(f"a row cannot be used: {verdict.error}")
        return list(zip(scored, verdicts, strict=True))


_VERDICT = pa.schema(
    {
        "scores": pa.list_(pa.float64()),
        "lengths": pa.list_(pa.int64()),
        "several": pa.bool_(),
        "images": pa.bool_(),
        "files": pa.bool_(),
        "error": pa.string(),
    }
)


class _Worker:
    """Runs row groups until one fails. Ray's own error would keep of a failure only its text."""

    def __init__(self, job: ScoringJob, groups: Sequence[RowGroup]) -> None:
        self._job, self._groups = job, groups
        self._error = b""

    def __call__(self, row: dict[str, int]) -> dict[str, bytes]:
        if not self._error:
            try:
                self._job.run(self._groups[row["place"]])
            except TriwardError as error:
                self._error = pickle.dumps(error)
        return {"error": self._error}


def _first_error(rows: Iterable[dict[str, bytes]]) -> bytes:
    # In a function of its own: Ray stops the job when nothing holds its iterator any more.
    return next((row["error"] for row in rows if row["error"]), b"")
