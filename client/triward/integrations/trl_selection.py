"""Selective sample buffer and dynamic sampling for TRL's GRPOTrainer, 1.10.

    class Trainer(SelectiveSampling, GRPOTrainer): ...

    Trainer(..., selection=Selection(SelectiveSampleBuffer(512), spread=0.05, max_rounds=3))

TRL has no hook between rewards and loss: this overrides two of its private methods, and its tests
run them in the version above. docs/rewards.md says what is done, docs/integrations/trl.md how.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from triward.errors import InvalidRequest
from triward.rewards import SelectiveSampleBuffer, fill_batch, varied

# A row of a batch: what stands in it at any width, and rows of another width are padded to.
Row = dict[str, Any]

_LEFT = ("prompt_ids", "prompt_mask")
_RIGHT = (
    "completion_ids", "completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps",
    "sampling_per_token_logps", "importance_sampling_ratio",
)  # fmt: skip
_BOTH = ("token_type_ids", "mm_token_type_ids")
_MEDIA = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
    "num_tiles", "image_position_ids",
)  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """Settings of `SelectiveSampling`.

    Attributes:
        buffer: of samples with an advantage; they take the places of those without. Or None.
        spread: the std of a group's rewards up to which its advantages count as 0, in the
            rewards' unit, before any normalisation.
        max_rounds: generate for further prompts, up to so many times, until the batch is full of
            groups above `spread`. 1 is no dynamic sampling.
        seed: of the order of further prompts.
    """

    buffer: SelectiveSampleBuffer[Row] | None = None
    spread: float = 0.0
    max_rounds: int = 1
    seed: int = 0


class SelectiveSampling:
    """Choice of what the policy learns from, in front of a GRPOTrainer.

    Args:
        selection: how it is chosen.
        arguments: the trainer's, as `options`.

    Raises:
        InvalidRequest: there is dynamic sampling, and several processes or an iterable dataset.
    """

    def __init__(self, *arguments: Any, selection: Selection, **options: Any) -> None:  # noqa: D107
        super().__init__(*arguments, **options)
        trainer: Any = self
        if selection.max_rounds > 1:
            if trainer.accelerator.num_processes > 1:
                raise InvalidRequest("max_rounds: dynamic sampling runs in one process only")
            if not hasattr(trainer.train_dataset, "__len__"):
                raise InvalidRequest("max_rounds: dynamic sampling needs a dataset with an index")
        self.selection = selection
        self._totals: Any = None
        self._order: list[int] = []
        self._generator = np.random.default_rng(selection.seed)

    def _calculate_rewards(self, *arguments: Any, **options: Any) -> Any:
        """Remember the rewards, of which TRL passes on no more than advantages."""
        trainer: Any = super()
        rewards = trainer._calculate_rewards(*arguments, **options)
        weights = self.reward_weights.to(rewards.device)  # type: ignore[attr-defined]
        # None of a function is nan here, and left out; a row of nothing else stays nan.
        self._totals = (rewards * weights).nansum(1).where(~rewards.isnan().all(1), float("nan"))
        return rewards

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        trainer: Any = self
        if not trainer.model.training:
            parent: Any = super()
            made: dict[str, Any] = parent._generate_and_score_completions(inputs)
            return made
        rows, rounds, fresh = self._chosen(inputs)
        buffer, drawn = self.selection.buffer, 0
        if buffer is not None:
            found = [row for row in rows if abs(float(row["advantages"])) > buffer.threshold]
            drawn = min(len(rows) - len(found), len(buffer))
            vanished = [row for row in rows if abs(float(row["advantages"])) <= buffer.threshold]
            device = rows[0]["advantages"].device
            old = [_moved(each.sample, device) for each in buffer.draw(drawn)]
            rows = [*found, *old, *vanished[drawn:]]
            kept = [_moved(row, "cpu") for row in found]
            buffer.add(kept, [float(row["advantages"]) for row in kept])
            buffer.advance()
        self._log({"rounds": rounds, "fresh": fresh, "drawn": drawn / len(rows)}, rows)
        return self._merged(rows)

    def _chosen(self, inputs: list[Row]) -> tuple[list[Row], int, float]:
        """Return a batch's rows, the rounds that it took, and the first round's share with signal.

        Rows of groups without a spread have the advantage 0.
        """
        size, group = len(inputs), self.num_generations  # type: ignore[attr-defined]
        first, rewards = self._round(inputs)
        good = varied(rewards, group, self.selection.spread)[self._local(size)]
        fresh = [row for row, kept in zip(first, good, strict=True) if kept]
        seen, rounds = list(first), 1
        if self.selection.max_rounds > 1:
            filled = fill_batch(
                self._rounds(first, rewards, seen),
                size // group,
                threshold=self.selection.spread,
                max_rounds=self.selection.max_rounds,
            )
            fresh = [row for each in filled.groups for row in each.samples]
            rounds = filled.rounds
        taken = {id(row) for row in fresh}
        rest = [row for row in seen if id(row) not in taken][: size - len(fresh)]
        vanished = [{**row, "advantages": row["advantages"] * 0} for row in rest]
        return [*fresh, *vanished], rounds, float(good.mean())

    def _rounds(self, rows: list[Row], rewards: list[float], seen: list[Row]) -> Iterator[Any]:
        size = len(rows)
        while True:
            yield rows, rewards, self.num_generations  # type: ignore[attr-defined]
            rows, rewards = self._round(self._further(size))
            seen += rows

    def _round(self, inputs: list[Row]) -> tuple[list[Row], list[float]]:
        """Generate; return this process's rows, and all processes' rewards."""
        parent: Any = super()
        made = parent._generate_and_score_completions(inputs)
        if self.selection.buffer is not None and "old_per_token_logps" not in made:
            made["old_per_token_logps"] = self._log_probabilities(made)
        return _rows(made), self._totals.tolist()

    def _further(self, size: int) -> list[Row]:
        """Return the next prompts of the dataset, in an order of its own."""
        trainer: Any = self
        dataset, group = trainer.train_dataset, trainer.num_generations
        while len(self._order) < size // group:
            self._order += self._generator.permutation(len(dataset)).tolist()
        places, self._order = self._order[: size // group], self._order[size // group :]
        return [dict(dataset[place]) for place in places for _ in range(group)]

    def _local(self, size: int) -> slice:
        index = self.accelerator.process_index  # type: ignore[attr-defined]
        return slice(index * size, (index + 1) * size)

    def _log_probabilities(self, made: dict[str, Any]) -> Any:
        """Return the tokens' log-probabilities under the policy that wrote them; it will change."""
        trainer: Any = self
        torch: Any = importlib.import_module("torch")
        ids = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
        mask = torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1)
        media = {name: made[name] for name in (*_MEDIA, *_BOTH) if name in made}
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, made["completion_ids"].size(1),
                trainer.args.per_device_train_batch_size, **media,
            )[0]  # fmt: skip

    def _merged(self, rows: list[Row]) -> dict[str, Any]:
        """Return a batch as TRL makes it."""
        trainer: Any = self
        batch = _padded(rows, trainer.processing_class)
        mask = batch["completion_mask"]
        mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask
        batch["num_items_in_batch"] = trainer.accelerator.gather(mask.sum()).sum()
        return batch

    def _log(self, figures: dict[str, float], rows: Sequence[Row]) -> None:
        signal = [float(row["advantages"]) != 0 for row in rows]
        metrics = self._metrics["train"]  # type: ignore[attr-defined]
        for name, value in {**figures, "with_gradient": sum(signal) / len(rows)}.items():
            metrics[f"selection/{name}"].append(value)


def _rows(made: dict[str, Any]) -> list[Row]:
    """Return a batch's rows.

    Raises:
        InvalidRequest: it holds what no known width has.
    """
    utils: Any = importlib.import_module("trl.trainer.utils")
    split = utils.split_pixel_values_by_grid(made)
    columns = {name: each for name, each in split.items() if name != "num_items_in_batch"}
    unknown = set(columns) - {*_LEFT, *_RIGHT, *_BOTH, *_MEDIA, "advantages"}
    if unknown:
        raise InvalidRequest(f"selection: TRL's batch holds {min(unknown)}, unknown here")
    places = range(len(columns["advantages"]))
    return [{n: each[i] for n, each in columns.items() if each is not None} for i in places]


def _moved(row: Row, device: Any) -> Row:
    """Return a copy: a row of a batch is a view, which would keep the whole batch in memory."""
    return {
        name: value.to(device, copy=True) if hasattr(value, "to") else value
        for name, value in row.items()
    }


def _padded(rows: Sequence[Row], processor: Any) -> dict[str, Any]:
    """Return the rows as columns; prompts begin, and completions end, with padding."""
    torch: Any = importlib.import_module("torch")
    utils: Any = importlib.import_module("trl.trainer.utils")
    partial = set().union(*rows).difference(set(rows[0]).intersection(*rows))
    if partial:
        raise InvalidRequest(f"selection: only some rows hold {min(partial)}")
    token = getattr(processor, "tokenizer", processor).pad_token_id
    widths = {name: max(len(row[name]) for row in rows) for name in (_LEFT[0], _RIGHT[0])}
    batch: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in _MEDIA:
            batch[name] = values
            continue
        if name != "advantages":
            fill = {"prompt_ids": token, "completion_ids": token, "tool_mask": 1}.get(name, 0)
            values = [_wide(row, name, widths, fill) for row in rows]
        batch[name] = torch.stack(values)
    merged: dict[str, Any] = utils.unsplit_pixel_values_by_grid(batch)
    return merged


def _wide(row: Row, name: str, widths: dict[str, int], fill: int) -> Any:
    torch: Any = importlib.import_module("torch")
    left, right = (width - len(row[side]) for side, width in widths.items())
    if name in _LEFT:
        right = 0
    elif name in _RIGHT:
        left = 0
    if name == "importance_sampling_ratio" and len(row[name]) == 1:
        return row[name]  # of a whole sequence
    return torch.nn.functional.pad(row[name], (left, right), value=fill)
