"""Repositories are complete, exact, never half-written and never overwritten by accident."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from safetensors.torch import load_file, save_file
from tritonclient.grpc import model_config_pb2

from tests.commands import Command
from tests.conftest import EXPORT, ROOT, Exit
from triward import RewardClient
from triward_server.engine.checkpoint import check_tensors
from triward_server.export.configuration import comparable

Export = Callable[..., Exit]


def config(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    text = (repository / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def parameters(repository: Path, model: str) -> dict[str, str]:
    return {k: v.string_value for k, v in config(repository, model).parameters.items()}


def test_flags_reach_the_configuration(checkpoint: Path, export: Export, tmp_path: Path) -> None:
    output = tmp_path / "models"
    result = export(
        "--checkpoint", checkpoint, "--output", output, "--dtype=float32", "--device=cpu",
        "--preprocess-instances=3", "--preprocess-batch-size=5", "--queue-delay-us=777",
        "--max-batch-tokens=4096",
        "--max-batch-patches=9999", "--threads=1", "--max-responses=8", "--max-text-bytes=1000",
        "--max-batch-tflop=2.5", "--max-batch-bytes=777777", "--compile",
        "--embedding-cache-bytes=12345", "--prefix-cache-bytes=6789", "--deterministic",
        "--overlap-batches",
        "--max-media=5", "--max-media-bytes=2000", "--max-image-pixels=3000",
        "--max-video-frames=44", "--max-video-pixels=5000",
        "--max-parts=7", "--max-request-bytes=4000", "--max-decode-seconds=1.5",
        "--max-tokens=900", "--max-request-tokens=901", "--max-queue-size=11",
        "--queue-timeout-ms=2222",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert parameters(output, "reward_forward") == {
        "dtype": "float32", "device": "cpu", "max_batch_tokens": "4096",
        "max_batch_patches": "9999", "threads": "1", "max_batch_tflop": "2.5",
        "embedding_cache_bytes": "12345", "prefix_cache_bytes": "6789", "deterministic": "True",
        "max_batch_bytes": "777777", "compile": "True", "max_responses": "8",
        "max_tokens": "900", "max_request_tokens": "901", "vision": "torch",
        "contract_version": "1", "overlap_batches": "True",
    }  # fmt: skip
    assert parameters(output, "reward_preprocess") == {
        "device": "cpu", "resize": "pillow", "hd_num": "0",
        "max_responses": "8", "max_text_bytes": "1000", "max_media": "5",
        "max_media_bytes": "2000", "max_image_pixels": "3000", "max_parts": "7",
        "max_request_bytes": "4000", "max_decode_seconds": "1.5", "max_tokens": "900",
        "max_request_tokens": "901", "max_video_frames": "44", "max_video_pixels": "5000",
        "contract_version": "1",
    }  # fmt: skip
    for model in ("reward_preprocess", "reward_forward"):
        policy = config(output, model).dynamic_batching.default_queue_policy
        assert policy.max_queue_size == 11
        assert policy.default_timeout_microseconds == 2_222_000
        assert policy.allow_timeout_override and policy.timeout_action == policy.REJECT
    forward = config(output, "reward_forward")
    assert forward.dynamic_batching.max_queue_delay_microseconds == 777
    assert [(g.kind, g.count) for g in forward.instance_group] == [
        (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    ]
    assert config(output, "reward_preprocess").instance_group[0].count == 3
    assert config(output, "reward_preprocess").max_batch_size == 5
    assert config(output, "reward").max_batch_size == 5
    assert forward.max_batch_size == 64
    assert config(output, "reward").platform == "ensemble"


def test_the_forward_models_queue_can_do_without_bounds(
    checkpoint: Path, export: Export, tmp_path: Path
) -> None:
    """With any bound Triton hands a batch over only when the one before it is done."""
    output = tmp_path / "models"
    flags = ("--device=cpu", "--max-queue-size=11", "--no-bound-forward-queue")
    assert export("--checkpoint", checkpoint, "--output", output, *flags).code == 0
    batching = config(output, "reward_forward").dynamic_batching
    assert not batching.HasField("default_queue_policy")
    assert batching.max_queue_delay_microseconds, "what waits is joined to one batch"
    policy = config(output, "reward_preprocess").dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 11


def test_defaults_are_for_a_gpu(checkpoint: Path, export: Export, tmp_path: Path) -> None:
    output = tmp_path / "models"
    assert export("--checkpoint", checkpoint, "--output", output).code == 0
    assert parameters(output, "reward_forward")["dtype"] == "bfloat16"
    assert parameters(output, "reward_forward")["compile"] == "True"
    kinds = model_config_pb2.ModelInstanceGroup
    assert config(output, "reward_forward").instance_group[0].kind == kinds.KIND_GPU
    assert config(output, "reward_preprocess").instance_group[0].kind == kinds.KIND_CPU
    assert parameters(output, "reward_preprocess")["resize"] == "pillow"


def test_resizing_on_the_gpu(checkpoint: Path, export: Export, tmp_path: Path) -> None:
    output = tmp_path / "models"
    flag = "--preprocess-device=cuda:1"
    assert export("--checkpoint", checkpoint, "--output", output, flag).code == 0
    group = config(output, "reward_preprocess").instance_group[0]
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU and list(group.gpus) == [1]
    values = parameters(output, "reward_preprocess")
    assert (values["device"], values["resize"]) == ("cuda:1", "torch")


def test_on_a_cpu_nothing_is_compiled(checkpoint: Path, export: Export, tmp_path: Path) -> None:
    output = tmp_path / "models"
    assert export("--checkpoint", checkpoint, "--output", output, "--device=cpu").code == 0
    assert parameters(output, "reward_forward")["compile"] == "False"


def test_manifest_accounts_for_every_file(checkpoint: Path, repository: Path) -> None:
    manifest = json.loads((repository / "reward/1/manifest.json").read_text())
    assert manifest["source"] == str(checkpoint)
    assert set(manifest["packages"]) >= {"torch", "transformers", "qwen-vl-utils", "pillow"}
    for folder in ("reward_forward", "reward_preprocess"):
        for file in (repository / folder / "1" / "checkpoint").iterdir():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            assert manifest["sha256"][file.name] == digest
    assert set(manifest["sha256"]) == {file.name for file in checkpoint.iterdir()}


@pytest.mark.parametrize("how", ["link", "copy"])
def test_weights_are_linked_or_copied(
    how: str, checkpoint: Path, export: Export, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    output = tmp_path / "models"
    assert export("--checkpoint", source, "--output", output, "--weights", how).code == 0
    served = output / "reward_forward/1/checkpoint/value_head.safetensors"
    assert served.samefile(source / served.name) == (how == "link")
    shutil.rmtree(source)  # the repository stands by itself
    assert load_file(served).keys() == {"v_head.summary.weight", "v_head.summary.bias"}


def test_refuses_to_overwrite(checkpoint: Path, export: Export, tmp_path: Path) -> None:
    output = tmp_path / "models"
    arguments = ("--checkpoint", checkpoint, "--output", output, "--device=cpu")
    assert export(*arguments).code == 0
    (output / "mark").touch()
    (output / "reward" / "mark").touch()
    again = export(*arguments)
    assert again.code == 1 and "exists" in again.stderr and "--force" in again.stderr
    assert (output / "reward" / "mark").exists()
    assert export(*arguments, "--force").code == 0
    assert not (output / "reward" / "mark").exists()
    assert (output / "mark").exists(), "only the model is replaced"
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_force_replaces_repositories_only(checkpoint: Path, export: Export, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.touch()
    (tmp_path / "reward" / "1").mkdir(parents=True)
    (tmp_path / "reward/1/manifest.json").write_text('{"name": "somebody else\'s web app"}')
    result = export("--checkpoint", checkpoint, "--output", tmp_path, "--force")
    assert result.code == 1 and "not a repository" in result.stderr
    assert precious.exists()


def break_head(folder: Path) -> None:
    (folder / "value_head.safetensors").unlink()


def break_tensor(folder: Path) -> None:
    file = folder / "value_head.safetensors"
    tensors = load_file(file)
    tensors["v_head.summary.weight"] = tensors["v_head.summary.weight"][:, :-1].contiguous()
    save_file(tensors, file)


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def break_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(break_head, "value_head.safetensors"), (break_tensor, "shape [1, 127]"),
     (break_tokenizer, "processor cannot be loaded"),
     (break_processor, "processor cannot be loaded")],
)  # fmt: skip
def test_nothing_is_written_for_a_broken_checkpoint(
    damage: Callable[[Path], None], words: str, checkpoint: Path, export: Export, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    damage(source)
    result = export("--checkpoint", source, "--output", tmp_path / "out" / "models")
    assert result.code == 1 and words in result.stderr
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The script as a user runs it."""
    command = [sys.executable, str(EXPORT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_a_write_that_fails_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """As on a full disk: the first weight file cannot be written to its end."""
    limit = 300_000
    assert (checkpoint / "model-00001-of-00004.safetensors").stat().st_size > limit
    result = run(
        "--checkpoint", checkpoint, "--output", tmp_path / "models", "--weights=copy",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 1
    assert "\nbuild_repository: " in result.stderr and "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_neither_folder_nor_hub_id(export: Export, tmp_path: Path) -> None:
    result = export("--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "models")
    assert result.code == 1 and "nowhere" in result.stderr
    assert not (tmp_path / "models").exists()


def test_hub_id_is_resolved_through_the_cache(checkpoint: Path, tmp_path: Path) -> None:
    """The cache's own layout, as a download leaves it; the hub is not asked."""
    commit, other = "0123456789abcdef0123456789abcdef01234567", "f" * 40
    cached = tmp_path / "hub" / "models--Skywork--Skywork-VL-Reward-7B"
    (cached / "blobs").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(other)
    (cached / "refs" / "v2").write_text(commit)
    for revision in (commit, other):
        (cached / "snapshots" / revision).mkdir(parents=True)
    for file in checkpoint.iterdir():
        shutil.copy(file, cached / "blobs" / file.name[::-1])
        (cached / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name[::-1]}")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    output = tmp_path / "models"
    result = run(
        "--checkpoint", "Skywork/Skywork-VL-Reward-7B", "--revision=v2", "--output", output,
        env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    manifest = json.loads((output / "reward/1/manifest.json").read_text())
    assert manifest["source"] == "Skywork/Skywork-VL-Reward-7B"
    assert manifest["revision"] == commit
    shutil.rmtree(tmp_path / "hub")  # the repository stands by itself
    check_tensors(output / "reward_forward" / "1" / "checkpoint")


def test_hub_id_that_is_not_there(export: Export, tmp_path: Path) -> None:
    result = export("--checkpoint", "Skywork/Not-There", "--output", tmp_path / "other")
    assert result.code == 1 and "Skywork/Not-There: neither" in result.stderr


def test_one_gpu_of_several(checkpoint: Path, export: Export, tmp_path: Path) -> None:
    output = tmp_path / "models"
    assert export("--checkpoint", checkpoint, "--output", output, "--device=cuda:3").code == 0
    assert list(config(output, "reward_forward").instance_group[0].gpus) == [3]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--revision=v2", "has no revisions"),
        ("--dtype=int8", "dtype"),
        ("--device=tpu", "device"),
        ("--preprocess-device=tpu", "device"),
        ("--max-batch-bytes=0", "max_batch_bytes"),
        ("--max-batch-tokens=0", "max_batch"),
    ],
)
def test_wrong_options_are_named(
    flag: str, words: str, checkpoint: Path, export: Export, tmp_path: Path
) -> None:
    result = export("--checkpoint", checkpoint, "--output", tmp_path / "models", flag)
    assert result.code == 1 and words in result.stderr


@pytest.mark.slow
def test_the_wheel_alone_exports_and_serves(
    command: Callable[..., Command], tmp_path: Path
) -> None:
    """Outside the checkout, with nothing of it on the path."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("triward_server", "model_repository"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-build-isolation", "--no-index", "--target", packages,
         source],
        check=True,
    )  # fmt: skip
    shutil.rmtree(source)
    path = {"PYTHONPATH": str(packages)}
    code = "import triward_server; print(triward_server.__file__)"
    where = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | path, text=True
    )
    assert where.startswith(str(packages))
    checkpoint, repository = tmp_path / "checkpoint", tmp_path / "models"

    def triward_server(*arguments: object) -> Command:
        return command(sys.executable, packages / "bin" / "triward-server", *arguments, **path)

    made = triward_server("make-checkpoint", "--size=tiny", "--seed=3", "--output", checkpoint)
    assert made.wait() == 0, made.output
    asked = ("--requests-per-second=1", "--prompt-tokens=100")
    planned = triward_server("plan", "--gpus=cpu", "--model=small", *asked)
    assert planned.wait() == 0, planned.output
    flags = ("--device=cpu", "--dtype=float32", "--threads=1", "--preprocess-instances=1")
    exported = triward_server("export", "--checkpoint", checkpoint, "--output", repository, *flags)
    assert exported.wait() == 0, exported.output
    ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    serving = triward_server("serve", "--repository", repository, "--host=127.0.0.1", *ports)
    address = serving.wait_for(r"ready  grpc +(\S+)")[1]
    with RewardClient(address, timeout=60) as client:
        [score] = client.score_responses([{"role": "user", "content": "?"}], ["Yes."])
    assert score != 0
    serving.process.terminate()
    assert serving.wait() == 0, serving.output
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "model_repository").glob("*/1/model.py")}
    packed = packages / "triward_server"
    assert there == {str(p.relative_to(packed)) for p in packed.glob("model_repository/*/1/*.py")}


@pytest.mark.parametrize("model", ["reward_preprocess", "reward_forward"])
def test_what_an_earlier_export_did_not_write_has_its_default(
    model: str, echo_repository: Path, tmp_path: Path
) -> None:
    """Or a repository could get no version more once an option has been added."""
    today = echo_repository / model / "config.pbtxt"
    earlier = tmp_path / "config.pbtxt"
    for name, other in (("hd_num", "4"), ("vision", "onnx"), ("contract_version", "7")):
        written = config(echo_repository, model)
        if name not in written.parameters:
            continue
        del written.parameters[name]
        earlier.write_text(text_format.MessageToString(written))
        assert comparable(earlier) == comparable(today), name
        written.parameters[name].string_value = other
        earlier.write_text(text_format.MessageToString(written))
        assert comparable(earlier) != comparable(today), name
