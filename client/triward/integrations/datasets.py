"""A column of scores for a Hugging Face dataset: `dataset.map(DatasetScorer(...), batched=True)`.

`datasets` itself is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from triward.integrations.rows import RowScorer


class DatasetScorer(RowScorer):
    """A `RowScorer` for `Dataset.map` and `IterableDataset.map`, with any `num_proc`.

    It adds two columns: a score or None, and "" or why there is no score.
    """

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Score a batch.

        Raises:
            TriwardError: as for `score_rows`; it ends the whole `map`.
        """
        scores, errors = self.score_rows(batch)
        # An error is "" and not None, or a batch without errors would decide that the column's type
        # is null, and the first error would not fit.
        return {self.score: scores, self.error: errors}
