"""verl's own dataset, agent loop, reward manager and reward workers, with a real Triton's rewards.

A stand-in is the policy's server alone (vLLM), whose answers are given; no model is trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from tests.conftest import encode
from tests.conversations import picture, says, user
from tests.trainers.conftest import Page, Side
from triward import RewardClient
from triward_server.serving.launch import TritonServer

pytestmark = pytest.mark.slow

PAGE = Page("verl.md")
GROUP = 2  # rollouts of a prompt
PICTURES = [picture(64, 48, seed) for seed in range(5)]
PNGS = [encode(image) for image in PICTURES]
JPEG = encode(PICTURES[4], "JPEG")


def row(index: int, text: str, images: list[Any] | None) -> dict[str, Any]:
    columns = {"images": images} if images is not None else {}
    return {
        "prompt": [{"role": "user", "content": text}], **columns, "data_source": "mine",
        "reward_model": {"style": "model", "ground_truth": ""}, "extra_info": {"index": index},
    }  # fmt: skip


def shown(text: str, *images: bytes) -> dict[str, Any]:
    """A user message whose `<image>`s are these files."""
    files = iter(images)
    pieces = [piece for piece in re.split("(<image>)", text) if piece]
    return user(
        *(
            {"type": "image", "image": next(files)} if piece == "<image>" else piece
            for piece in pieces
        )
    )


def structs(*files: bytes, path: str | None = None) -> list[dict[str, Any]]:
    return [{"bytes": file, "path": path} for file in files]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Any]]:
    """Parquet files with images in each shape in which users store them, and what they show.

    The page's own file, which the page's train.sh names, comes before these.
    """
    monkeypatch.chdir(tmp_path)
    PICTURES[0].save("chart.png")
    made: dict[str, Any] = {}
    exec(PAGE.code("python", "# data.py"), made)
    own = [
        [shown("<image>Which bar is the tallest?", PNGS[0])],
        [user("In one word: which season follows spring?")],
    ]
    # For a function the page repeats the prompt in `extra_info`.
    exec(PAGE.code("python", 'row["extra_info"] |='), made)
    for n, copy in enumerate(made["rows"]):
        copy["extra_info"]["index"] = 2 + n
    Dataset.from_list(made["rows"]).to_parquet("function.parquet")

    both = "<image>One, <image>two: which is brighter?"
    plain = [
        row(4, "<image>What?", structs(PNGS[1])),
        row(5, both, structs(PNGS[2], JPEG, path="there.png")),
        row(6, "No picture.", []),
    ]
    pq.write_table(pa.Table.from_pylist(plain), "structs.parquet")
    decoded = Dataset.from_list(
        [row(7, both, structs(PNGS[3], PNGS[4])), row(8, "None here.", [])],
        Features(
            prompt=List({"role": Value("string"), "content": Value("string")}),
            images=List(Image()), data_source=Value("string"),
            reward_model={"style": Value("string"), "ground_truth": Value("string")},
            extra_info={"index": Value("int64")},
        ),
    )  # fmt: skip
    decoded.to_parquet("decoded.parquet")
    PICTURES[2].save("stored.png")
    paths = [row(9, "<image>From a file?", ["stored.png"])]
    pq.write_table(pa.Table.from_pylist(paths), "paths.parquet")
    pq.write_table(pa.Table.from_pylist([row(10, "Just text.", None)]), "text.parquet")
    others = [
        [shown("<image>What?", PNGS[1])],
        [shown(both, PNGS[2], JPEG)],
        [user("No picture.")],
        [shown(both, PNGS[3], PNGS[4])],
        [user("None here.")],
        [shown("<image>From a file?", PNGS[2])],
        [user("Just text.")],
    ]
    names = [f"{n}.parquet" for n in ("function", "structs", "decoded", "paths", "text")]
    return names, [*own, *own, *others]


def overrides(snippet: str, url: str) -> list[str]:
    """The options of a snippet, for the server of a test."""
    words = [word for word in PAGE.words(snippet) if "=" in word]
    return [word.replace("rewards:8001", url) for word in words]


def training(url: str, checkpoint: Path) -> list[str]:
    """The options of the page's train.sh, for a tiny policy and few processes."""
    return [
        *overrides("# train.sh, verl 0.7.1", url),
        f"actor_rollout_ref.model.path={checkpoint}", f"actor_rollout_ref.rollout.n={GROUP}",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "actor_rollout_ref.rollout.agent.num_workers=1", "reward.num_workers=2",
    ]  # fmt: skip


def test_a_step(
    side: Callable[..., Side], files: tuple[list[str], list[Any]], checkpoint: Path,
    mortal: TritonServer, asked: RewardClient, tmp_path: Path,
) -> None:  # fmt: skip
    url = mortal.endpoints.grpc
    names, prompts = files
    answers = [f"Answer{': ' if n % 2 else ''}{n}." for n in range(GROUP * len(prompts))]
    (tmp_path / "rule.py").write_text(PAGE.code("python", "# rule.py"))
    base = training(url, checkpoint)
    function = [*base, *overrides("name=async_compute_score", url)]
    mixed = [
        word.replace("/path/to/rule.py", str(tmp_path / "rule.py"))
        for word in [*base, *overrides("reward_kwargs.rule_weight", url)]
    ]
    frozen = [*base, *overrides("learn: false", url)]
    running = side(
        "verl_side.py", overrides=base, files=names, answers=answers, free=GROUP,
        variants=[function, mixed, frozen],
    )  # fmt: skip

    found = running.result("scored.json")
    expected = [
        asked.score([*prompts[n // GROUP], says(answer)]) for n, answer in enumerate(answers)
    ]
    assert len(set(expected)) == len(expected)
    assert found["indices"] == [n // GROUP for n in range(len(answers))]
    assert found["streamed"] == expected
    assert found["managed"] == expected
    assert found["places"] == [[length - 1] for length in found["lengths"]]
    assert_shapes(found["prompts"][::GROUP])

    # Of the rows whose `extra_info` repeats the prompt.
    repeated = expected[2 * GROUP : 4 * GROUP]
    by_function, with_rule, frozen = found["variants"]
    assert by_function == repeated
    bonus = [2.0 * ("Answer: " in answer) for answer in answers[2 * GROUP : 4 * GROUP]]
    assert set(bonus) == {0.0, 2.0}
    assert with_rule == pytest.approx([a + b for a, b in zip(repeated, bonus, strict=True)])
    deviation = (81000.0 / 4999) ** 0.5
    assert frozen == pytest.approx([(score + 3.2) / deviation for score in repeated], rel=1e-4)

    running.kill_after(mortal, requests=GROUP)
    found = running.result("interrupted.json")
    assert "rewards" not in found, "made up"
    assert {"RayTaskError", "ServerUnavailable", "TriwardError"} <= {*found["error"]}
    running.finish()


@pytest.mark.parametrize("strict", [False, True], ids=["its own buffer", "ours"])
def test_the_trainer_v1(
    side: Callable[..., Side], files: tuple[list[str], list[Any]], checkpoint: Path,
    mortal: TritonServer, asked: RewardClient, strict: bool,
) -> None:  # fmt: skip
    """verl's default trainer goes on without the rollouts that have no reward; ours does not."""
    url = mortal.endpoints.grpc
    prompts = files[1][:2]
    answers = [f"Answer {n}." for n in range(GROUP * len(prompts))]
    options = overrides("custom_sampler", url) if strict else []
    running = side(
        "verl_v1_side.py", overrides=training(url, checkpoint), files=[], answers=answers,
        free=len(answers) - 1, options=[options] * 3,
    )  # fmt: skip

    def assert_scored(found: dict[str, Any]) -> None:
        pairs = zip(found["indices"], found["answers"], strict=True)
        assert found["rewards"] == [expected[index, answer] for index, answer in pairs]
        assert found["advantages"] == pytest.approx(advantages(found), abs=1e-5)

    expected = {
        (index, answer): asked.score([*prompt, says(answer)])
        for index, prompt in enumerate(prompts)
        for answer in answers
    }
    whole = running.result("step0.json")
    assert sorted(whole["answers"]) == answers
    assert_scored(whole)

    running.kill_after(mortal, requests=len(answers) - 1)
    partial = running.result("step1.json")
    if strict:
        assert partial["error"] == "RolloutsFailed"
        assert "rollouts of 1 prompts out of 2 failed" in partial["message"]
    else:
        assert len(partial["rewards"]) == len(answers) - 1
        assert_scored(partial)
    assert "no materializable trajectories" in running.result("step2.json")["message"]
    running.finish()


def advantages(found: dict[str, Any]) -> list[float]:
    """GRPO's, as verl has it: what is left alone of a group keeps its reward as it is.

    In float32, as there: a mean that is rounded counts where a group's rewards lie close together.
    """
    groups: dict[int, list[float]] = {}
    for index, reward in zip(found["indices"], found["rewards"], strict=True):
        groups.setdefault(index, []).append(reward)
    return [
        reward if len(group := torch.tensor(groups[index])) == 1
        else ((reward - group.mean()) / (group.std() + 1e-6)).item()
        for index, reward in zip(found["indices"], found["rewards"], strict=True)
    ]  # fmt: skip


def assert_shapes(prompts: list[Any]) -> None:
    """What verl made of the files: structs keep their file beside the picture."""
    struct = {"type": "str", "bytes": "bytes", "image": "PngImageFile"}
    text = {"type": "str", "text": "str"}
    page = [[{**struct, "path": "NoneType"}, text]]
    [(first, _, second, _)] = prompts[5]
    assert prompts[0] == prompts[2] == prompts[4] == page
    assert first == {**struct, "path": "str"}
    assert second == {**first, "image": "JpegImageFile"}
    assert prompts[7][0][::2] == [{"type": "str", "image": "Image"}] * 2
    assert prompts[9][0][0] == {"type": "str", "image": "str"}
    assert all(isinstance(prompts[n][0], str) for n in (1, 3, 6, 8, 10))
