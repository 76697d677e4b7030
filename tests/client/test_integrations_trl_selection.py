"""The choice of samples in front of a trainer that makes batches as TRL 1.10 does."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from triward import InvalidRequest
from triward.integrations.trl_selection import Selection, SelectiveSampling
from triward.rewards import SelectiveSampleBuffer, group_advantages

PAD = 9


class Trainer:
    """Makes the tensors that GRPOTrainer makes; a prompt is (length of its text, rewards)."""

    num_generations = 2

    def __init__(self, dataset=()):
        self.train_dataset = dataset
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(num_processes=1, process_index=0, gather=lambda x: x)
        self.args = SimpleNamespace(per_device_train_batch_size=4)
        self.processing_class = SimpleNamespace(pad_token_id=PAD)
        self.reward_weights = torch.tensor([1.0, 0.5])
        self._metrics = {"train": defaultdict(list)}
        self.policy = 0
        self.generated = []
        self.more = {}

    def _calculate_rewards(self, inputs):
        # Of two functions; the second does not apply.
        return torch.tensor([[row["reward"], float("nan")] for row in inputs])

    def _get_per_token_logps_and_entropies(self, model, ids, mask, keep, batch_size, **media):
        return torch.full((len(ids), keep), float(self.policy)), None, None

    def _generate_and_score_completions(self, inputs):
        self.generated.append(len(inputs))
        rewards = self._calculate_rewards(inputs).nansum(1)
        width = max(row["prompt"] for row in inputs)
        ids = torch.full((len(inputs), width), PAD)
        for place, row in enumerate(inputs):
            ids[place, width - row["prompt"] :] = row["name"]
        longest = max(row["completion"] for row in inputs)
        completions = torch.full((len(inputs), longest), PAD)
        for place, row in enumerate(inputs):
            completions[place, : row["completion"]] = row["name"]
        return {
            "prompt_ids": ids,
            "prompt_mask": (ids != PAD).long(),
            "completion_ids": completions,
            "completion_mask": (completions != PAD).long(),
            "advantages": torch.tensor(group_advantages(rewards, 2), dtype=torch.float32),
            "num_items_in_batch": torch.tensor(0),
            **self.more,
        }


class Choosing(SelectiveSampling, Trainer):
    pass


def prompt(name, *rewards, prompt=2, completion=1):
    shape = {"name": name, "prompt": prompt, "completion": completion}
    return [{**shape, "reward": reward} for reward in rewards]


def made(trainer, inputs):
    """(name, advantage, log-probability) of each row, and the batch."""
    batch = trainer._generate_and_score_completions(inputs)
    names = [int(row[row != PAD][0]) for row in batch["completion_ids"]]
    assert names == [int(row[row != PAD][0]) for row in batch["prompt_ids"]]
    for side in ("prompt", "completion"):
        assert torch.equal(batch[f"{side}_mask"], (batch[f"{side}_ids"] != PAD).long())
    assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum())
    return list(zip(names, batch["advantages"].round().tolist(), strict=True)), batch


def figures(trainer):
    return {name.split("/")[1]: values for name, values in trainer._metrics["train"].items()}


def test_what_vanished_makes_place_for_what_did_not():
    buffer = SelectiveSampleBuffer(8, threshold=0.1)
    trainer = Choosing(selection=Selection(buffer, spread=0.05))
    assert made(trainer, prompt(1, 0.0, 2.0) + prompt(2, 5.0, 5.01))[0] == [
        (1, -1), (1, 1), (2, 0), (2, 0)
    ]  # fmt: skip
    trainer.policy = 7
    rows, batch = made(
        trainer, prompt(3, 1.0, 1.0, prompt=5, completion=4) + prompt(4, 9.0, 0.0, completion=3)
    )
    assert rows[:2] == [(4, 1), (4, -1)]
    assert sorted(rows[2:]) == [(1, -1), (1, 1)]
    # A sample keeps the probabilities under the policy that wrote it.
    assert batch["old_per_token_logps"][:, 0].tolist() == [7, 7, 0, 0]
    assert batch["prompt_ids"].shape == (4, 5) and batch["completion_ids"].shape == (4, 4)
    assert figures(trainer) == {
        "rounds": [1, 1], "fresh": [0.5, 0.5], "drawn": [0, 0.5], "with_gradient": [0.5, 1.0]
    }  # fmt: skip
    assert len(buffer) == 4
    for row in buffer.state_dict()["samples"]:
        for value in row.values():
            size = value.numel() * value.element_size()
            assert value.untyped_storage().nbytes() == size, "a view keeps its whole batch"


def test_a_spread_below_the_threshold_is_no_signal():
    """Normalised, its advantages are as large as any other group's."""
    trainer = Choosing(selection=Selection(spread=0.0))
    assert {a for _, a in made(trainer, prompt(1, 5.0, 5.01) + prompt(2, 0.0, 9.0))[0]} == {-1, 1}
    trainer = Choosing(selection=Selection(spread=0.05))
    rows = made(trainer, prompt(1, 5.0, 5.01) + prompt(2, 0.0, 9.0))[0]
    assert sorted(rows) == [(1, 0), (1, 0), (2, -1), (2, 1)]


def dataset(*names, spread):
    return [prompt(name, 0.0)[0] | {"reward": spread} for name in names]


class Prompts(Choosing):
    """Whose completions of a dataset's row differ by its `reward`."""

    def _further(self, size):
        rows = super()._further(size)
        return [{**row, "reward": row["reward"] * (k % 2)} for k, row in enumerate(rows)]


def test_further_prompts_fill_the_batch():
    trainer = Prompts(dataset(3, 4, 5, spread=6.0), selection=Selection(spread=0.1, max_rounds=5))
    rows = made(trainer, prompt(1, 1.0, 1.0) + prompt(2, 0.0, 1.0))[0]
    assert trainer.generated == [4, 4]
    assert rows[:2] == [(2, -1), (2, 1)]
    assert rows[2][0] == rows[3][0] in (3, 4, 5)
    assert figures(trainer)["rounds"] == [2]
    seen = [rows[2][0]]
    for _ in range(3):
        seen += [name for name, _ in made(trainer, prompt(1, 1, 1) + prompt(2, 1, 1))[0][::2]]
    assert set(seen) == {3, 4, 5}, "all prompts come up"


def test_the_last_round_is_told_and_the_batch_keeps_its_size():
    trainer = Prompts(dataset(3, 4, spread=0.0), selection=Selection(max_rounds=3))
    with pytest.warns(RuntimeWarning, match="1 of 2 groups after 3 rounds"):
        rows = made(trainer, prompt(1, 1.0, 1.0) + prompt(2, 0.0, 1.0))[0]
    assert rows == [(2, -1), (2, 1), (1, 0), (1, 0)]


def test_an_evaluation_is_left_alone():
    buffer = SelectiveSampleBuffer(8)
    trainer = Choosing(selection=Selection(buffer, spread=100.0))
    trainer.model.training = False
    batch = trainer._generate_and_score_completions(prompt(1, 0.0, 2.0))
    assert batch["advantages"].tolist() != [0, 0]
    assert "old_per_token_logps" not in batch and len(buffer) == 0


def test_images_go_with_their_rows():
    """As for Qwen's models: the patches of all rows in one tensor."""
    buffer = SelectiveSampleBuffer(8, threshold=0.1)
    trainer = Choosing(selection=Selection(buffer))

    def shown(*names):
        grid = [[1, 1, name] for name in names]
        return {
            "pixel_values": torch.cat([torch.full((name, 2), name) for name in names]),
            "image_grid_thw": torch.tensor(grid),
            "num_images": [1] * len(names),
            "mm_token_type_ids": torch.tensor([[name] * 3 for name in names]),
        }

    trainer.more = shown(1, 1, 2, 2)
    made(trainer, prompt(1, 0.0, 2.0) + prompt(2, 5.0, 5.0))
    trainer.more = shown(3, 3, 4, 4) | {"mm_token_type_ids": torch.zeros(4, 7, dtype=torch.long)}
    rows, batch = made(trainer, prompt(3, 1, 1, prompt=4) + prompt(4, 9, 0, completion=3))
    names = [name for name, _ in rows]
    assert sorted(names) == [1, 1, 4, 4]
    assert batch["image_grid_thw"][:, 2].tolist() == names
    assert batch["pixel_values"][:, 0].tolist() == [name for name in names for _ in range(name)]
    types = batch["mm_token_type_ids"]
    assert types[names.index(1)].tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_what_it_does_not_know_is_refused():
    trainer = Choosing(selection=Selection())
    trainer.more = {"image_sizes": torch.zeros(2)}
    with pytest.raises(InvalidRequest, match="TRL's batch holds image_sizes, unknown here"):
        trainer._generate_and_score_completions(prompt(1, 0.0, 2.0))
    with pytest.raises(InvalidRequest, match="needs a dataset with an index"):
        Choosing(iter([]), selection=Selection(max_rounds=2))


def test_several_processes_have_no_further_prompts():
    class Several(Trainer):
        def __init__(self):
            super().__init__([])
            self.accelerator.num_processes = 2

    with pytest.raises(InvalidRequest, match="in one process only"):
        type("Choosing2", (SelectiveSampling, Several), {})(selection=Selection(max_rounds=2))


def test_the_state_draws_the_same_rows():
    buffer = SelectiveSampleBuffer(8, threshold=0.1, seed=3)
    trainer = Choosing(selection=Selection(buffer))
    for name in range(1, 4):
        made(trainer, prompt(name, 0.0, 2.0) + prompt(name, 5.0, 5.0))
    other = SelectiveSampleBuffer(8, threshold=0.1)
    other.load_state_dict(buffer.state_dict())
    again = Choosing(selection=Selection(other))
    inputs = prompt(7, 1.0, 1.0) + prompt(8, 1.0, 1.0)
    assert made(trainer, inputs)[0] == made(again, inputs)[0]
