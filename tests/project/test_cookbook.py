"""docs/cookbook.md: every recipe is a whole script, runs as it stands, and prints what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.commands import BIN
from tests.conftest import ROOT
from triward_server.serving.launch import TritonServer

PAGE = ROOT / "docs" / "cookbook.md"
POLICY = "Qwen/Qwen2.5-0.5B-Instruct"  # what the recipes train; a tiny one takes its place here
# A heading, what is said about it, its script, and lines of its output where "…" is any text.
_RECIPE = re.compile(
    r"^## (?P<title>[^\n]+)\n(?P<text>(?:(?!^## ).)*?)```python\n(?P<script>.*?)```\n"
    r"(?:(?!^## ).)*?```text\n(?P<output>.*?)```\n",
    re.DOTALL | re.MULTILINE,
)
RECIPES = {match["title"]: match for match in _RECIPE.finditer(PAGE.read_text(encoding="utf-8"))}


def test_every_section_is_a_recipe_and_the_contents_name_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert titles == list(RECIPES)
    anchors = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) == anchors


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe(title: str, server: TritonServer, checkpoint: Path, tmp_path: Path) -> None:
    script = RECIPES[title]["script"]
    assert "localhost:8001" in script, "it names the server that a reader would have"
    script = script.replace("localhost:8001", server.endpoints.grpc)
    if POLICY in script:
        _save_policy(checkpoint, tmp_path / "policy")
        script = script.replace(POLICY, str(tmp_path / "policy"))
    (tmp_path / "recipe.py").write_text(script)
    shutil.copy(ROOT / "examples" / "chart.png", tmp_path)
    done = subprocess.run(
        [sys.executable, "recipe.py"],
        cwd=tmp_path,
        env={"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    expected = RECIPES[title]["output"].rstrip("\n")
    assert re.fullmatch(_pattern(expected), done.stdout.rstrip("\n")), done.stdout


def _save_policy(checkpoint: Path, folder: Path) -> None:
    """A tiny random one with the checkpoint's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pattern(output: str) -> str:
    """What the page shows; fractions are the model's and differ, as do texts where "…" stands."""
    fraction = r"[-+]?\d+\.\d+"
    pieces = re.split(rf"(…|{fraction})", output)
    return "".join(
        "[^\n]+"
        if piece == "…"
        else fraction
        if re.fullmatch(fraction, piece)
        else re.escape(piece)
        for piece in pieces
    )


@pytest.mark.parametrize("other", ["6 rows, 6 without", "best of 2: 1", "3 rows, 0 without", ""])
def test_the_pattern_is_not_content_with_anything(other: str) -> None:
    assert re.fullmatch(_pattern("6 rows, 0 without"), "6 rows, 0 without")
    assert re.fullmatch(_pattern("best of 2: 1.5 …"), "best of 2: -0.25 x")
    for shown in ("6 rows, 0 without", "best of 2: 1.5", "…"):
        assert not re.fullmatch(_pattern(shown), other if shown != "…" else "")
