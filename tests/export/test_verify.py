"""`triward-server verify` and what an export asks of it: a wrong architecture is never ready."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from tests.conftest import Exit
from tests.fonts import FREE_FONT
from triward_server.cli import app
from triward_server.config import ForwardConfig
from triward_server.engine import architectures, streaming
from triward_server.engine.architectures import ARCHITECTURES
from triward_server.engine.checkpoint import check_tensors as read
from triward_server.engine.checkpoint import empty_model
from triward_server.engine.decoder import DecoderConfig
from triward_server.engine.scoring import Scorer
from triward_server.engine.weights import read_state
from triward_server.errors import CheckpointError
from triward_server.export.prepared import prepared
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.export.random_ixc_checkpoint import make_ixc_checkpoint
from triward_server.export.random_text_checkpoint import KINDS, make_text_checkpoint
from triward_server.export.reference import fp32_budget
from triward_server.export.verify import CaseScores, Verification, cases, require_agreement, verify

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """As an export reads them, tokenizers made where they are remote code."""
    folder = tmp_path_factory.mktemp("verified")
    torch.set_num_threads(1)
    make_checkpoint("tiny", 0, folder / "qwen2_5_vl")
    for name in KINDS:
        make_text_checkpoint(name, "tiny", 0, folder / name)
    make_ixc_checkpoint("tiny", 0, folder / "internlmxcomposer2", font=FREE_FONT)
    with ExitStack() as stack:
        yield {each.name: stack.enter_context(prepared(each)) for each in folder.iterdir()}


@pytest.mark.parametrize("name", ["qwen2_5_vl", *KINDS])
def test_what_is_shipped_scores_as_transformers_does(folders: dict[str, Path], name: str) -> None:
    whole = verify(folders[name], CPU, streamed=False)
    assert whole.wrong == [] and 0 < whole.largest < 1e-4
    # Bit by bit: the same arithmetic on the same weights, wherever they come from.
    layer_by_layer = verify(folders[name], CPU, streamed=True)
    assert layer_by_layer.rows == whole.rows
    assert layer_by_layer.streamed and not whole.streamed
    if name == "gemma2":  # its template knows no such role, and says so to both
        [refused] = [row for row in whole.rows if row.name == "system prompt"]
        assert isinstance(refused.score, str) and isinstance(refused.reference, str)
    names = {row.name for row in whole.rows if isinstance(row.score, float)}
    assert names >= {"several turns", "unicode", "long", "control tokens as text"}
    sees = name in ("qwen2_5_vl", "internlmxcomposer2")
    assert ("video" in names) == ("image odd" in names) == ("several images" in names) == sees


WRONG: dict[str, tuple[str, Callable[[DecoderConfig], DecoderConfig]]] = {
    "offset of norms": ("gemma2", lambda d: replace(d, norm_offset=0.0)),
    "windows": ("gemma2", lambda d: replace(d, windows=(None,) * d.layers)),
    "scale of products": ("llama", lambda d: replace(d, scale=2 * d.scale)),
    "rope": (
        "qwen3",
        lambda d: replace(d, rope=replace(d.rope, inverse=tuple(0.5 * f for f in d.rope.inverse))),
    ),
    "eps": ("qwen2", lambda d: replace(d, eps=0.1)),
    "order of sections": (
        "qwen2_5_vl", lambda d: replace(d, rope=replace(d.rope, sections=d.rope.sections[::-1]))
    ),
}  # fmt: skip


def mistake(monkeypatch: pytest.MonkeyPatch, what: str) -> str:
    """Make an architecture wrong; its name."""
    name, change = WRONG[what]
    right = ARCHITECTURES[name]
    wrong = replace(right, decoder=lambda config: change(right.decoder(config)))
    monkeypatch.setitem(architectures.ARCHITECTURES, name, wrong)
    return name


@pytest.mark.parametrize("what", WRONG)
def test_an_architecture_that_is_wrong_never_becomes_ready(
    what: str,
    folders: dict[str, Path],
    export: Callable[..., Exit],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = mistake(monkeypatch, what)
    arguments = ("--checkpoint", folders[name], "--output", tmp_path / "models", "--device=cpu")
    result = export(*arguments)
    assert result.code == 1 and "transformers' own class has" in result.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was written, no draft either


def test_an_export_says_what_it_compared(
    folders: dict[str, Path], export: Callable[..., Exit], tmp_path: Path
) -> None:
    flags = ("--checkpoint", folders["qwen2_5_vl"], "--device=cpu", "--no-canary")
    # Limits of requests are not the comparison's.
    limits = ("--max-text-bytes=1", "--max-responses=1")
    result = export(*flags, *limits, "--output", tmp_path / "models")
    said = "verified: 3 scores are those of transformers' own class"
    assert result.code == 1 and said in result.stderr
    result = export(*flags, "--output", tmp_path / "models", "--no-verify")
    assert result.code == 0 and "verified" not in result.stderr


def test_the_command(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["verify", *map(str, arguments)])

    result = run("--checkpoint", folders["llama"], "--small")
    assert result.exit_code == 0
    assert "0 of 2 conversations differ; float32 on cpu, loaded whole" in result.stdout
    name = mistake(monkeypatch, "scale of products")
    result = run("--checkpoint", folders[name], "--small", "--streamed")
    assert result.exit_code == 1
    assert "2 of 2 conversations differ; float32 on cpu, loaded layer by layer" in result.stdout
    assert "DIFFERS" in result.stdout
    assert run("--checkpoint", folders["llama"] / "nowhere").exit_code == 1
    assert "cpu, cuda or cuda:N" in run("--checkpoint", "x", "--device", "gpu").stderr
    assert "leave it out" in run("--checkpoint", "x", "--small", "--dtype", "bfloat16").stderr


def test_bfloat16_is_judged_by_transformers_own(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = verify(folders["gemma2"], CPU, dtype="bfloat16")
    assert right.wrong == []
    [noise] = {row.noise for row in right.rows}
    assert noise > 0.01 and 10 * fp32_budget(1) < right.largest <= 2 * noise
    name = mistake(monkeypatch, "offset of norms")
    arguments = ["--checkpoint", str(folders[name]), "--dtype=bfloat16", "--streamed"]
    wrong = CliRunner().invoke(app, ["verify", *arguments])
    assert wrong.exit_code == 1 and "DIFFERS" in wrong.stdout
    assert "of 7 conversations differ; bfloat16 on cpu, loaded layer by layer" in wrong.stdout
    assert f"own class: its bfloat16 scores are up to {noise:.1e} from" in wrong.stdout


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj", "visual.blocks.1.mlp.down_proj"])
def test_weights_that_are_not_finite_are_no_model(
    name: str, streamed: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["qwen2_5_vl"], tmp_path / "copy")
    for file in sorted(tmp_path.glob("copy/*.safetensors")):
        tensors = load_file(file)
        for key in (key for key in tensors if name in key and key.endswith("weight")):
            tensors[key][0, 0] = float("nan")
            save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{name}.*1 of .* weights are NaN or infinite"):
        verify(tmp_path / "copy", CPU, streamed=streamed, small=True)


def test_nothing_to_compare_is_no_agreement() -> None:
    refused = Verification([CaseScores("system prompt", "refused: a", "refused: b")])
    with pytest.raises(CheckpointError, match="system prompt"):
        require_agreement(refused)
    require_agreement(Verification([*refused.rows, CaseScores("other", 2.0, 2.0001)]))
    with pytest.raises(CheckpointError, match="1 of 2 conversations differ"):
        require_agreement(Verification([*refused.rows, CaseScores("other", 2.0, 2.001)]))
    assert not CaseScores("one-sided", 1.0, "refused").agrees
    assert not CaseScores("not finite", float("nan"), 1.0).agrees


def test_a_model_that_does_not_fit_is_streamed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not verify(folders["llama"], CPU, small=True).streamed
    monkeypatch.setattr(streaming, "_cgroup_free", lambda: 1e6)  # the model has 3 MB
    assert verify(folders["llama"], CPU, small=True).streamed


def test_a_layers_weights_are_there_while_it_runs_alone(folders: dict[str, Path]) -> None:
    blueprint = read(folders["qwen2_5_vl"])
    model = empty_model(blueprint, torch.float32)
    layers: list[nn.Module] = [*model.language_model.layers]
    assert model.visual is not None
    layers += [*model.visual.blocks]
    held: list[int] = []

    def watch(*_: Any) -> None:
        held.append(sum(all(not p.is_meta for p in each.parameters()) for each in layers))

    def tensors(wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        return read_state(folders["qwen2_5_vl"], torch.float32, CPU, wanted)

    streaming.load_weights(model, tensors, str, streamed=True)
    resident = {n for n, p in model.named_parameters() if not p.is_meta}
    assert {"language_model.embed_tokens.weight", "visual.merger.mlp.0.weight"} <= resident
    assert not any(".layers." in name or ".blocks." in name for name in resident)
    for layer in layers:
        layer.get_submodule("mlp").register_forward_pre_hook(watch)
    config = ForwardConfig(dtype="float32", device="cpu")
    Scorer(folders["qwen2_5_vl"], config, model=model).warm_up()
    assert set(held) == {1} and len(held) >= len(layers)
    assert all(p.is_meta for layer in layers for p in layer.parameters())


def test_a_long_conversation_passes_the_window() -> None:
    def longest(window: int) -> int:
        return max(len(case.wire()[0]) for case in cases(False, window=window))

    assert longest(4096) > 4096 * 8 > longest(0)


def test_export_says_where_it_will_serve(
    folders: dict[str, Path],
    export: Callable[..., Exit],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(device: str) -> str:
        flags = ("--no-verify", "--no-canary", "--force", f"--device={device}")
        checkpoint = ("--checkpoint", folders["llama"], "--output", tmp_path / "models")
        result = export(*checkpoint, *flags)
        assert result.code == 0, result.stderr
        return result.stderr

    assert told("cpu") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU; the repository will serve only where there is one" in told("cuda")
    assert "For this machine: --device cpu" in told("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"H{index}00")
    assert "cuda:0 (H000), cuda:1 (H100), an instance on each" in told("cuda")
    assert "will serve on cuda:1 (H100)\n" in told("cuda:1")
    assert "this machine has cuda:0, cuda:1 only" in told("cuda:2")


def test_a_mistyped_flag_gets_a_suggestion(export: Callable[..., Exit]) -> None:
    result = export("--checkpiont", "x", "--output", "y")
    assert result.code == 2 and "--checkpoint" in result.stderr.replace("checkpiont", "", 1)
