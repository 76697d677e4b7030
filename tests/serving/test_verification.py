"""Files that are no longer what was exported are found before they are loaded, and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import load_file, save_file
from tritonclient.grpc import model_config_pb2

from tests.conftest import Exit
from triward_server.engine.checkpoint import load_model
from triward_server.engine.weights import check_finite
from triward_server.errors import CheckpointError, LaunchError
from triward_server.schema import REWARD, ModelNames
from triward_server.serving import integrity
from triward_server.serving.canary import FILE, Canary
from triward_server.serving.integrity import MANIFEST, Verify, check_served, check_version, describe
from triward_server.serving.repository import Canaries, loads_all, pin, pinned

STEPS = ("reward_preprocess", "reward_forward")
SHARD = "checkpoint/model-00001-of-00004.safetensors"


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """A repository that serves version 1 and has a version 3 beside it."""
    folder = Path(shutil.copytree(repository, tmp_path / "models"))
    for model in ("reward", *STEPS):
        shutil.copytree(folder / model / "1", folder / model / "3")
    return folder


@pytest.mark.parametrize("how", [Verify.SAMPLED, Verify.OFF])
@pytest.mark.parametrize(
    ("file", "old"),
    [
        ("reward_forward/1/model.py", "triward_server.triton_io"),
        ("reward_preprocess/1/model.py", "triward_server.gone.triton_io"),
        ("reward_draining/1/model.py", "triward_server.draining"),
    ],
)
def test_what_an_earlier_release_wrote_is_refused_by_name(
    how: Verify, file: str, old: str, copy: Path
) -> None:
    adapter = copy / file
    text = adapter.read_text()
    adapter.write_text(re.sub(r"triward_server\.backend\.\w+", old, text))
    with pytest.raises(LaunchError) as refused:
        check_served(copy, how, lambda line: None)
    assert f"{file}: written by another release" in str(refused.value)
    assert f"no module {old}; export it again" in str(refused.value)
    adapter.write_text(text)
    check_served(copy, how, lambda line: None)


def load_everything(repository: Path) -> None:
    """As an earlier release wrote the configuration of the steps."""
    for step in STEPS:
        path = repository / step / "config.pbtxt"
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        config.version_policy.all.SetInParent()
        path.write_text(text_format.MessageToString(config))


def forget_sizes(repository: Path, version: str) -> None:
    """As an earlier release wrote the manifest."""
    path = repository / "reward" / version / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"]
    path.write_text(json.dumps(manifest))


def truncate(repository: Path, version: str) -> str:
    path = repository / "reward_forward" / version / SHARD
    content = path.read_bytes()
    path.unlink()  # it may be a link to the checkpoint's own
    path.write_bytes(content[:-1000])
    return f"reward_forward/{version}/{SHARD}: {len(content) - 1000:,} bytes, {len(content):,} at"


def lose_weights(repository: Path, version: str) -> str:
    (repository / "reward_forward" / version / SHARD).unlink()
    return f"reward_forward/{version}/{SHARD}: missing"


def lose_tokenizer(repository: Path, version: str) -> str:
    (repository / "reward_preprocess" / version / "checkpoint/tokenizer.json").unlink()
    return f"reward_preprocess/{version}/checkpoint/tokenizer.json: missing"


def lose_adapter(repository: Path, version: str) -> str:
    (repository / "reward_forward" / version / "model.py").unlink()
    return f"reward_forward/{version}/model.py: missing"


def lose_a_step(repository: Path, version: str) -> str:
    shutil.rmtree(repository / "reward_preprocess" / version)
    return f"reward_preprocess/{version}/model.py: missing"


def lose_everything(repository: Path, version: str) -> str:
    for model in ("reward", *STEPS):
        shutil.rmtree(repository / model / version)
        (repository / model / version).mkdir()
    return f"reward/{version}/manifest.json: missing"


def spoil(repository: Path, version: str) -> str:
    """NaN in 200 weights; nothing else about the file has changed."""
    path = repository / "reward_forward" / version / SHARD
    make_nan(path, path)
    return f"reward_forward/{version}/{SHARD}: not what was exported: sampled "


def mix_up(repository: Path, version: str) -> str:
    """Another tokenizer of the same size."""
    path = repository / "reward_preprocess" / version / "checkpoint/tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content[:-9][::-1] + content[-9:])
    return f"reward_preprocess/{version}/checkpoint/tokenizer.json: not what was exported"


def add_a_head(repository: Path, version: str) -> str:
    """A file that changes every score of a model without trl's value head."""
    file = f"reward_forward/{version}/checkpoint/other_head.safetensors"
    save_file({"v_head.summary.bias": torch.zeros(1)}, repository / file)
    return f"{file}: not in the manifest of version {version}; delete it, or export"


def add_a_module(repository: Path, version: str) -> str:
    """Beside the adapter, where Python looks for modules first."""
    (repository / "reward_preprocess" / version / "json.py").touch()
    return f"reward_preprocess/{version}/json.py: not in the manifest of version {version}"


def add_to_the_public_model(repository: Path, version: str) -> str:
    (repository / "reward" / version / "notes.txt").symlink_to("nowhere")
    return f"reward/{version}/notes.txt: not in the manifest of version {version}"


def damage_manifest(repository: Path, version: str) -> str:
    path = repository / "reward" / version / MANIFEST
    path.write_text(path.read_text()[:-100])
    return f"reward/{version}/manifest.json: JSONDecodeError"


def empty_manifest(repository: Path, version: str) -> str:
    (repository / "reward" / version / MANIFEST).write_text("[]")
    return f"reward/{version}/manifest.json: no manifest of ours"


def wrong_manifest(repository: Path, version: str) -> str:
    path = repository / "reward" / version / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {"x/y": {}}}))
    return f"reward/{version}/manifest.json: KeyError"


def damage_canary(repository: Path, version: str) -> str:
    (repository / "reward" / version / FILE).write_text("{")
    return f"reward/{version}/canary.json: no canary"


FAULTS = [
    truncate, lose_weights, lose_tokenizer, lose_adapter, lose_a_step, lose_everything, spoil,
    mix_up, add_a_head, add_a_module, add_to_the_public_model, damage_manifest, empty_manifest,
    wrong_manifest, damage_canary,
]  # fmt: skip
Damage = Callable[[Path, str], str]


def make_nan(source: Path, target: Path) -> str:
    """Copy a file with NaN in 200 weights of its largest tensor, whose name this is."""
    tensors = {name: tensor.clone() for name, tensor in load_file(source).items()}
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[:200] = float("nan")
    source.unlink()
    save_file(tensors, target, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("damage", FAULTS)
def test_a_broken_version_that_nobody_serves_is_named(damage: Damage, copy: Path) -> None:
    words = damage(copy, "3")
    said: list[str] = []
    check_served(copy, Verify.SAMPLED, said.append)
    whole, broken = said
    assert whole.startswith("reward: version 1: ") and "files verified (sampled): read " in whole
    assert broken.startswith("reward: version 3 is broken, and not served: ") and words in broken


@pytest.mark.parametrize("damage", FAULTS)
def test_a_broken_version_that_is_served_is_not_loaded(damage: Damage, copy: Path) -> None:
    words = damage(copy, "1")
    with pytest.raises(LaunchError) as caught:
        check_served(copy, Verify.SAMPLED, print)
    assert str(caught.value).startswith("reward: version 1, which is served, is broken: ")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    said: list[str] = []
    check_served(copy, Verify.OFF, said.append)
    assert said == []


def test_what_is_whole_is_said_with_its_cost(copy: Path) -> None:
    files = [f for step in STEPS for f in (copy / step / "1" / "checkpoint").iterdir()]
    size = sum(file.stat().st_size for file in files)
    for how in (Verify.SAMPLED, Verify.FULL):
        checked = check_version(copy, REWARD, "1", how)
        assert (checked.files, checked.size, checked.read) == (len(files), size, size)
        assert f"{len(files)} files verified ({how.value}): read {size:,} of" in str(checked)
        assert "earlier release" not in str(checked)


def test_what_python_leaves_beside_an_adapter_is_no_fault(copy: Path) -> None:
    placeholder = copy / "reward_forward/1/__pycache__"
    assert placeholder.is_file()
    placeholder.unlink()
    placeholder.mkdir()
    (placeholder / "model.cpython-311.pyc").touch()
    check_version(copy, REWARD, "1", Verify.SAMPLED)


class TestLargeFiles:
    """Of which only samples are read."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "weights"
        path.write_bytes(bytes(range(251)) * 60_000)  # 15 MB
        return path

    @pytest.mark.parametrize(
        ("place", "found"), [(0, True), (-1, True), (65_535, True), (65_536, False)]
    )
    def test_what_samples_find(self, place: int, found: bool, file: Path) -> None:
        [entry] = describe([("forward/weights", file)]).values()
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        with pytest.raises(LaunchError, match="not what was exported: sha256"):
            integrity._compare(file, entry, Verify.FULL)
        if found:
            with pytest.raises(LaunchError, match="not what was exported: sampled"):
                integrity._compare(file, entry, Verify.SAMPLED)
        else:
            assert integrity._compare(file, entry, Verify.SAMPLED) == 64 * 65_536

    def test_blocks_are_where_the_module_says(self, file: Path) -> None:
        content = file.read_bytes()
        starts = [i * (len(content) - 65_536) // 63 for i in range(64)]
        blocks = b"".join(content[start : start + 65_536] for start in starts)
        [entry] = describe([("forward/weights", file)]).values()
        assert entry["sampled"] == integrity.hashlib.sha256(blocks).hexdigest()


class TestEarlierReleases:
    """Manifests without sizes, steps that load every version."""

    def test_only_full_compares(self, copy: Path) -> None:
        forget_sizes(copy, "1")
        assert "--verify full compares" in str(check_version(copy, REWARD, "1", Verify.SAMPLED))
        checked = check_version(copy, REWARD, "1", Verify.FULL)
        assert checked.read == checked.size and "--verify" not in str(checked)
        mix_up(copy, "1")
        check_version(copy, REWARD, "1", Verify.SAMPLED)
        with pytest.raises(LaunchError, match=r"tokenizer.json: not what was exported: sha256"):
            check_version(copy, REWARD, "1", Verify.FULL)

    def test_a_cut_file_is_found_by_its_header(self, copy: Path) -> None:
        forget_sizes(copy, "1")
        truncate(copy, "1")
        with pytest.raises(LaunchError, match=rf"{SHARD}: [\d,]+ bytes, [\d,]+ by its header"):
            check_version(copy, REWARD, "1", Verify.SAMPLED)
        (copy / "reward_forward/1" / SHARD).write_bytes(b"x" * 99)
        with pytest.raises(LaunchError, match=rf"{SHARD}: no safetensors header"):
            check_version(copy, REWARD, "1", Verify.SAMPLED)
        lose_weights(copy, "1")
        with pytest.raises(LaunchError, match=rf"reward_forward/1/{SHARD}: missing"):
            check_version(copy, REWARD, "1", Verify.SAMPLED)

    def test_steps_that_load_everything_are_brought_up_to_date(self, copy: Path) -> None:
        configs = [copy / step / "config.pbtxt" for step in STEPS]
        exported = [path.read_text() for path in configs]
        load_everything(copy)
        assert loads_all(copy, REWARD)
        truncate(copy, "3")
        check_served(copy, Verify.SAMPLED, print)
        assert not loads_all(copy, REWARD) and pinned(copy) == "1"
        assert [path.read_text() for path in configs] == exported

    def test_where_they_cannot_be_written(
        self, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read_only(self: Path, text: str) -> int:
            raise OSError(30, "Read-only file system")

        load_everything(copy)
        monkeypatch.setattr(Path, "write_text", read_only)
        check_served(copy, Verify.SAMPLED, print)  # as ever: all of them are whole
        monkeypatch.undo()
        truncate(copy, "3")
        monkeypatch.setattr(Path, "write_text", read_only)
        with pytest.raises(LaunchError, match=r"loads the broken version 3, too.*Read-only"):
            check_served(copy, Verify.SAMPLED, print)
        monkeypatch.undo()
        pin(copy, "1")
        monkeypatch.setattr(Path, "write_text", read_only)
        check_served(copy, Verify.SAMPLED, print)


class TestCanaries:
    """What the watchdog keeps of a repository."""

    def test_they_outlive_the_folder(self, copy: Path) -> None:
        canaries = Canaries(copy)
        one = Canary.of(copy, "1")
        replace(one, scores=(1.0, 2.0)).write(copy / "reward" / "3")
        three = Canary.of(copy, "3")
        assert canaries.served(REWARD) == one
        assert canaries.of(REWARD, "3") == three == canaries.served(REWARD), "it was switched to"
        shutil.rmtree(copy)
        assert canaries.models() == [REWARD]
        assert (canaries.of(REWARD, "1"), canaries.of(REWARD, "3")) == (one, three)

    def test_one_that_could_not_be_read_in_time(
        self, copy: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        canaries = Canaries(copy)
        shutil.rmtree(copy)
        for _ in range(2):
            unknown = canaries.of(REWARD, "3")
            assert unknown.problem([9.0, -9.0]) is None and unknown.problem([float("nan"), 0.0])
        assert capsys.readouterr().err.count("of version 3 only finite scores are asked") == 1
        assert canaries.served(REWARD).scores

    def test_a_model_that_is_being_copied(self, copy: Path) -> None:
        """The server it is copied beside goes on; it is asked when it is whole."""
        canaries = Canaries(copy)
        for part in ("_preprocess", "_forward", ""):
            shutil.copytree(copy / f"reward{part}", copy / f"judge{part}")
        canary = copy / "judge/1" / FILE
        content = canary.read_text()
        canary.unlink()
        assert canaries.models() == [REWARD]
        canary.write_text(content[:99])
        assert canaries.models() == [REWARD]
        canary.write_text(content)
        assert canaries.models() == [REWARD, ModelNames("judge")]


class TestFiniteWeights:
    """A weight that is no number is no weight."""

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_refused_by_name_and_count(
        self, value: str, dtype: torch.dtype, checkpoint: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
        check_finite(folder)
        file = folder / Path(SHARD).name
        tensors = {name: t.to(dtype) for name, t in load_file(file).items()}
        name = max(tensors, key=lambda name: tensors[name].numel())
        tensors[name].view(-1)[77:277] = float(value)
        save_file(tensors, file, metadata={"format": "pt"})
        words = rf"{file.name}: tensor '{name}': 200 of {tensors[name].numel():,} weights are NaN"
        for load in (
            check_finite,
            lambda f: load_model(f, torch.bfloat16, torch.device("cpu")),
        ):
            with pytest.raises(CheckpointError, match=words):
                load(folder)

    @pytest.mark.parametrize("flags", [(), ("--no-canary",)])
    def test_not_exported(
        self, flags: tuple[str, ...], checkpoint: Path, export: Callable[..., Exit], tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
        make_nan(folder / Path(SHARD).name, folder / Path(SHARD).name)
        output = tmp_path / "models"
        result = export("--checkpoint", folder, "--output", output, "--device=cpu", *flags)
        assert result.code == 1 and ": 200 of " in result.stderr
        assert not output.exists()
