"""Float8 is exported only where it keeps the order of responses; the figure is in the manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.conftest import Exit
from triward_server.cli import app
from triward_server.config import ForwardConfig, PreprocessConfig
from triward_server.engine.scoring import Scorer
from triward_server.errors import ConfigError, NonFiniteScore
from triward_server.export import calibration
from triward_server.export.calibration import (
    BUILT_IN,
    LEAST_PAIRS,
    LIMIT,
    OrderKept,
    built_in,
    calibrate,
    compare_margins,
    read_prompts,
    require_order,
)
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Scores

CPU = torch.device("cpu")
EXACT = ForwardConfig(dtype="float32", device="cpu", prefix_cache_bytes=0)
MESSAGES = [{"role": "user", "content": "Which one?"}]
FOUND = OrderKept("set", "0", "cpu", 896, 800, 0.995, LIMIT, 1.0, 0.2, 0.02)


@pytest.fixture(scope="module")
def preprocessor(checkpoint: Path) -> Preprocessor:
    return Preprocessor(checkpoint, PreprocessConfig())


@pytest.fixture(scope="module")
def apart(
    checkpoint: Path, preprocessor: Preprocessor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A set whose pairs are far apart in float32: the best against the worst of 96 responses."""
    rng = np.random.default_rng(0)
    words = ("red", "blue", "seven", "no", "it", "rises", "again", "?", "图", "{x}", "\n", "Why")
    texts = [" ".join(rng.choice(words, rng.integers(2, 12))) for _ in range(96)]
    item = preprocessor.features(json.dumps(MESSAGES).encode(), [t.encode() for t in texts], [])
    [scored] = Scorer(checkpoint, EXACT).score([item])
    assert isinstance(scored, Scores)
    order = [texts[i] for i in scored.scores.argsort()]
    file = tmp_path_factory.mktemp("apart") / "apart.jsonl"
    rows = [{"messages": MESSAGES, "responses": [a, b]} for a in order[:12] for b in order[-12:]]
    file.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    return file


def with_an_unread_channel(checkpoint: Path, folder: Path) -> Path:
    """Copy a model and make a channel enormous, by its norm, that no matrix reads.

    In float32 and bfloat16 it adds 0 to every sum. In float8 it is the row's largest value, beside
    which the others are 0.
    """
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "visual" in name:
                continue
            if name.endswith("post_attention_layernorm.weight"):
                tensor[5] = 1e9
            elif name.endswith(("gate_proj.weight", "up_proj.weight")):
                tensor[:, 5] = 0
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


class TestCompare:
    def test_clear_pairs_are_beyond_bfloat16s_noise(self) -> None:
        exact = np.array([3.0, -2.0, 0.19, -0.19, 1.0])
        found = compare_margins({
            "float32": exact,
            "bfloat16": exact + np.array([0.1, -0.1, 0.1, 0.1, 0.1]),
            "float8": np.array([2.0, 1.0, -1.0, -1.0, 0.5]),
        })  # fmt: skip
        assert found["pairs"] == 5 and found["clear"] == 3
        assert found["agreement"] == pytest.approx(2 / 3)
        assert found["bfloat16_agreement"] == 1.0
        assert found["bfloat16_rms"] == pytest.approx(0.1)
        assert found["rms"] == pytest.approx(np.sqrt((1 + 9 + 1.19**2 + 0.81**2 + 0.25) / 5))

    def test_a_tie_is_no_agreement(self) -> None:
        exact = np.ones(4)
        found = compare_margins(
            {"float32": exact, "bfloat16": exact, "float8": np.array([1, 0, 1, 1.0])}
        )
        assert found["agreement"] == 0.75

    def test_the_limit(self) -> None:
        require_order(FOUND)
        with pytest.raises(ConfigError, match=r"98\.99% of 800 clear pairs.* the limit is 99%"):
            require_order(replace(FOUND, agreement=0.9899))

    def test_too_few_pairs_tell_nothing(self) -> None:
        require_order(replace(FOUND, clear=LEAST_PAIRS))
        with pytest.raises(
            ConfigError, match=r"99 of the 896 pairs of the set set .* at least 100"
        ):
            require_order(replace(FOUND, clear=LEAST_PAIRS - 1, agreement=1.0))


class TestSets:
    @pytest.mark.parametrize("sees", [True, False])
    def test_the_built_in_one(self, sees: bool) -> None:
        rows = built_in(sees)
        assert sum(len(row.responses) * (len(row.responses) - 1) // 2 for row in rows) == 896
        assert len({row.messages for row in rows}) == 32
        assert sum(bool(row.media) for row in rows) == (8 if sees else 0)
        assert all(len(set(row.responses)) == 8 for row in rows)

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("{", "no object with messages"),
            ("[1]", "no object with messages"),
            ('{"messages": []}', "KeyError: 'responses'"),
            ('{"messages": [], "responses": [1, 2]}', "no object with messages"),
            ('{"messages": [], "responses": ["a"]}', "2 or more"),
            ('{"messages": [], "responses": "ab"}', "2 or more"),
        ],
    )
    def test_a_wrong_line_is_named(self, line: str, problem: str) -> None:
        good = '{"messages": [], "responses": ["a", "b"]}'
        with pytest.raises(ConfigError, match=r"set\.jsonl: line 3: .*" + problem):
            read_prompts(f"{good}\n\n{line}\n".encode(), Path("set.jsonl"))

    def test_nothing_to_ask(
        self, checkpoint: Path, preprocessor: Preprocessor, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="no rows"):
            read_prompts(b"\n", Path("set.jsonl"))
        with pytest.raises(ConfigError, match=r"nowhere: No such file"):
            calibrate(checkpoint, preprocessor, CPU, tmp_path / "nowhere")
        file = tmp_path / "set.jsonl"
        file.write_text(json.dumps({"messages": [{"role": "?"}], "responses": ["a", "b"]}))
        with pytest.raises(ConfigError, match=r"line 1: messages\[0\]"):
            calibrate(checkpoint, preprocessor, CPU, file)


class TestCalibrate:
    def test_pairs_far_apart_keep_their_order(
        self, checkpoint: Path, preprocessor: Preprocessor, apart: Path
    ) -> None:
        found = calibrate(checkpoint, preprocessor, CPU, apart)
        assert found.pairs == found.clear == 144 and found.agrees
        assert found.bfloat16_agreement == 1.0
        assert 3 * found.bfloat16_rms < found.rms < 2
        assert (found.source, found.device) == ("apart.jsonl", "cpu")
        assert found.sha256 == hashlib.sha256(apart.read_bytes()).hexdigest()
        assert found.tolerance == 4 * found.rms

    def test_a_channel_that_drowns_the_others(
        self, checkpoint: Path, apart: Path, tmp_path: Path
    ) -> None:
        """The control: the same function in float32 and bfloat16, and no float8 model."""
        spoilt = with_an_unread_channel(checkpoint, tmp_path / "copy")
        preprocessor = Preprocessor(spoilt, PreprocessConfig())
        found = calibrate(spoilt, preprocessor, CPU, apart)
        assert found.bfloat16_agreement > 0.97
        assert found.agreement < 0.9, found
        with pytest.raises(ConfigError, match="--dtype float8 is refused"):
            require_order(found)

    def test_a_score_that_is_not_finite(
        self, checkpoint: Path, preprocessor: Preprocessor, apart: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def answer(self: Scorer, batch: Any) -> list[Any]:
            return [NonFiniteScore("the model's score is nan")] * len(batch)

        monkeypatch.setattr(Scorer, "score", answer)
        with pytest.raises(NonFiniteScore, match=r"line 1, float32: the model's score is nan"):
            calibrate(checkpoint, preprocessor, CPU, apart)


class TestCommands:
    def test_export(
        self, checkpoint: Path, apart: Path, export: Callable[..., Exit], tmp_path: Path
    ) -> None:
        output = tmp_path / "models"
        flags = ("--dtype=float8", "--device=cpu", f"--calibration={apart}", "--no-verify")
        done = export("--checkpoint", checkpoint, "--output", output, *flags)
        assert done.code == 0, done.stderr
        assert "calibrated: float8 orders" in done.stderr
        manifest = json.loads((output / "reward/1/manifest.json").read_text())
        said = manifest["calibration"]
        assert said.keys() == vars(FOUND).keys()
        assert said["agreement"] >= said["limit"] == LIMIT and said["clear"] == 144
        assert manifest["options"]["forward"]["dtype"] == "float8"
        canary = json.loads((output / "reward/1/canary.json").read_text())
        assert canary["tolerance"] == pytest.approx(4 * said["rms"])

    def test_random_weights_are_refused(
        self, checkpoint: Path, export: Callable[..., Exit], tmp_path: Path
    ) -> None:
        """Their answers are near each other; --no-verify does not skip this."""
        output = tmp_path / "models"
        flags = ("--dtype=float8", "--device=cpu", "--no-verify", "--no-canary")
        done = export("--checkpoint", checkpoint, "--output", output, *flags)
        assert done.code == 1 and not output.exists()
        assert f"({BUILT_IN} set, cpu); the limit is 99%" in done.stderr

    def test_no_other_dtype_is_calibrated(
        self, checkpoint: Path, apart: Path, export: Callable[..., Exit], tmp_path: Path
    ) -> None:
        flags = ("--output", tmp_path / "models", f"--calibration={apart}")
        done = export("--checkpoint", checkpoint, *flags)
        assert done.code == 1 and "--dtype bfloat16 is not calibrated" in done.stderr

    def test_verify(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def ask(*arguments: str) -> Any:
            return CliRunner().invoke(app, ["verify", "--checkpoint=x", *arguments])

        monkeypatch.setattr(calibration, "calibrate_checkpoint", lambda *_: FOUND)
        done = ask("--dtype=float8")
        assert done.exit_code == 0 and "99.50% of 800 clear pairs" in done.stdout
        monkeypatch.setattr(
            calibration, "calibrate_checkpoint", lambda *_: replace(FOUND, agreement=0.9)
        )
        assert ask("--dtype=float8").exit_code == 1
        assert "--small and --dtype float8" in ask("--dtype=float8", "--small").stderr
        assert "--dtype float32 do not go" in ask("--calibration=set.jsonl").stderr
        monkeypatch.undo()
        assert "cpu, cuda or cuda:N" in ask("--dtype=float8", "--device=gpu").stderr
