"""The commands that choose with scores, through a real Triton; and TRL trains on their pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Image, List, load_dataset
from PIL import Image as Pil
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import DPOConfig, DPOTrainer

from tests.commands import BIN, Command
from tests.conversations import image, picture, user
from tests.rowfiles import read_rows, write_rows
from triward import RewardClient
from triward_server.serving.launch import TritonServer
from triward_server.testing.oracle import fp32_budget

Rows = list[dict[str, Any]]
RESPONSES = [["Four.", "It is 4, as 2 + 2.", "No", "5"], ["Red", "A red square.", "I see nothing."]]


def rows(shown: bool, folder: Path, count: int = 6) -> Rows:
    """Prompts with and without an image, each with some responses of its own."""
    found = []
    for n in range(count):
        question = user(f"What is shown, and what is {n} + {n}?")
        if shown and n % 2:
            path = folder / f"{n}.png"
            picture(60 + n, 48, n).save(path)
            question = user(image(str(path)), f"What is shown in {n}?")
        responses = [f"{text} ({n})" for text in RESPONSES[n % 2]]
        found.append({"id": n, "messages": [question], "responses": responses})
    return found


@pytest.fixture
def triward(command: Callable[..., Command], server: TritonServer) -> Callable[..., str]:
    """Runs a command in a process of its own; its output."""

    def run(*arguments: object) -> str:
        done = command(BIN / "triward", *arguments, "--url", server.endpoints.grpc)
        assert done.wait() == 0, done.output
        return done.output

    return run


def test_the_commands_choose_by_the_servers_scores(
    triward: Callable[..., str], client: RewardClient, tmp_path: Path
) -> None:
    data = rows(True, tmp_path)
    source = write_rows(tmp_path / "in.jsonl", data)
    expected = [client.score_responses(row["messages"], row["responses"]) for row in data]
    every = sorted(score for scores in expected for score in scores)

    told = triward("best-of-n", "--input", source, "--output", tmp_path / "best.jsonl")
    assert "6 rows in, 6 rows out" in told
    for row, scores in zip(read_rows(tmp_path / "best.jsonl"), expected, strict=True):
        for got, score in zip(row["scores"], scores, strict=True):
            assert got == pytest.approx(score, abs=fp32_budget(score))
        assert row["index"] == scores.index(max(scores))
        assert row["response"] == row["responses"][row["index"]]

    middle = (every[len(every) // 2 - 1] + every[len(every) // 2]) / 2
    triward("filter", "--input", source, "--output", tmp_path / "kept.parquet", "--min", middle)
    kept = pq.read_table(tmp_path / "kept.parquet").to_pylist()
    assert [(row["id"], row["responses"]) for row in kept] == [
        (row["id"], [text for text, score in zip(row["responses"], scores, strict=True)
                     if score > middle])
        for row, scores in zip(data, expected, strict=True)
        if max(scores) > middle
    ]  # fmt: skip

    triward("pairs", "--input", source, "--output", tmp_path / "pairs.jsonl")
    pairs = read_rows(tmp_path / "pairs.jsonl")
    for row, before, scores in zip(pairs, data, expected, strict=True):
        best, worst = (before["responses"][scores.index(end)] for end in (max(scores), min(scores)))
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == (best, worst)
        margin = max(scores) - min(scores)
        assert row["margin"] == pytest.approx(margin, abs=2 * fp32_budget(max(scores)))
        assert len(row["images"]) == before["id"] % 2
    assert (tmp_path / "pairs.jsonl.svg").exists()


def mpo(folder: Path, **settings: Any) -> DPOConfig:
    """Mixed preference optimization: three losses in one step."""
    return DPOConfig(
        output_dir=str(folder / "run"), use_cpu=True, bf16=False, report_to="none", seed=0,
        save_strategy="no", logging_steps=1, disable_tqdm=True, max_steps=1,
        per_device_train_batch_size=2, loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0], **settings,
    )  # fmt: skip


def assert_trained(trainer: DPOTrainer) -> None:
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert torch.isfinite(torch.tensor(entry["loss"]))
    moved = [name for name, value in trainer.model.named_parameters()
             if not torch.equal(value, before[name])]  # fmt: skip
    assert moved, "no parameter changed"


def test_trl_trains_on_pairs_of_text(
    triward: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(False, tmp_path))
    triward("pairs", "--input", source, "--output", tmp_path / "pairs.jsonl", "--strategy=all")
    dataset = loaded(tmp_path / "pairs.jsonl")
    assert "images" not in dataset.column_names
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(tmp_path / "policy")  # fmt: skip
    policy = Qwen2ForCausalLM.from_pretrained(tmp_path / "policy")  # the reference comes from there
    trainer = DPOTrainer(
        policy, args=mpo(tmp_path), train_dataset=dataset, processing_class=tokenizer
    )
    assert_trained(trainer)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_trl_trains_on_pairs_with_images(
    triward: Callable[..., str], checkpoint: Path, tmp_path: Path, suffix: str
) -> None:
    source = write_rows(tmp_path / "in.jsonl", rows(True, tmp_path))
    triward("pairs", "--input", source, "--output", tmp_path / f"pairs.{suffix}")
    dataset = loaded(tmp_path / f"pairs.{suffix}").cast_column("images", List(Image()))
    shown = [row["images"] for row in dataset]
    assert [len(images) for images in shown] == [0, 1, 0, 1, 0, 1]
    assert all(isinstance(each, Pil.Image) for images in shown for each in images)
    trainer = DPOTrainer(
        AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32),
        args=mpo(tmp_path, max_length=None),
        train_dataset=dataset.filter(lambda row: len(row["images"]) == 1),
        processing_class=AutoProcessor.from_pretrained(checkpoint),
    )
    assert_trained(trainer)


def loaded(path: Path) -> Dataset:
    kind = "json" if path.suffix == ".jsonl" else "parquet"
    cache = str(path.parent / "cache")
    return load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)
