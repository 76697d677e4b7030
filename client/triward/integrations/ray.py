"""On a Ray cluster: scores for a Ray Dataset, or for Parquet files in a job that can be resumed."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence

import pyarrow as pa
import ray.data

from triward.errors import TriwardError
from triward.integrations.offline import AnyPath, Job, RowGroup, Summary, begin, score_table
from triward.integrations.rows import RowScorer

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
        """The batch with its scores and errors."""
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
) -> Summary:
    """Like `offline.score_parquet`, by `actors` actors of a Ray cluster.

    Input and output lie where all nodes find them under the same path. An actor that is lost is
    replaced. Row groups are what actors share among them.

    Raises:
        The same; the first error of an actor ends the job.
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


class _Worker:
    """Runs row groups until one fails. Ray's own error would keep of a failure only its text."""

    def __init__(self, job: Job, groups: Sequence[RowGroup]) -> None:
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
