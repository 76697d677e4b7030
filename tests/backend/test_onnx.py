"""The vision tower and the value head as ONNX: valid graphs, the same numbers, the same scores."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from onnx.reference import ReferenceEvaluator
from tritonclient.grpc import model_config_pb2

from tests.conftest import Served
from tests.conversations import Messages
from triward import RewardClient, ServerError
from triward_server import schema
from triward_server.backend.onnx_inputs import graph_inputs, grid_inputs
from triward_server.backend.onnx_runner import open_session
from triward_server.config import ForwardConfig, VisionConfig
from triward_server.engine.checkpoint import load_model, load_vision
from triward_server.engine.scoring import Scorer
from triward_server.engine.vision import VisionTower
from triward_server.errors import CheckpointError, ConfigError, ForwardError
from triward_server.export.onnx import OPSET, export_value_head, export_vision
from triward_server.schema import Array, Features, Grid, Scores, TensorSpec, UInt8Array
from triward_server.serving.triton_http import read_metrics
from triward_server.testing.oracle import Oracle, fp32_budget

TOLERANCE = 1e-4  # of the largest value
# Runs a graph's file on inputs by name. ONNX's own evaluator says what the file means; ONNX
# Runtime is what serves it.
Run = Callable[[Path, dict[str, Array]], Array]
SIZES = {
    "one-token": [(28, 28)],
    "two-tokens": [(28, 56)],
    "one-window": [(112, 112)],
    "edge-windows": [(140, 84)],
    "many-windows": [(476, 308)],
    "narrow": [(28, 784)],
    "several": [(28, 28), (140, 84), (252, 196), (112, 112), (56, 28)],
}


@dataclass(frozen=True)
class Exported:
    """The graphs of the tiny checkpoint, and what they were made from."""

    folder: Path
    tower: VisionTower

    @property
    def vision(self) -> Path:
        return self.folder / "vision.onnx"

    def inputs(self, media: list[UInt8Array]) -> dict[TensorSpec, Array]:
        return graph_inputs(media, [grid_of(item) for item in media], self.tower.cut)

    def expected(self, media: list[UInt8Array]) -> Array:
        grids = [grid_of(item) for item in media]
        with torch.inference_mode():
            return self.tower([torch.from_numpy(item) for item in media], grids).numpy()


def grid_of(pixels: UInt8Array) -> Grid:
    *frames, height, width, _ = pixels.shape
    return Grid(frames[0] // 2 if frames else 1, height // 14, width // 14)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("onnx")
    tower, head = load_vision(checkpoint)
    export_vision(tower, folder)
    export_value_head(head, folder)
    return Exported(folder, tower)


def by_reference(file: Path, inputs: dict[str, Array]) -> Array:
    return ReferenceEvaluator(str(file)).run(None, inputs)[0]


def by_runtime(file: Path, inputs: dict[str, Array]) -> Array:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.fixture(params=[by_reference, by_runtime], ids=["reference", "onnxruntime"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


def named(inputs: dict[TensorSpec, Array]) -> dict[str, Array]:
    return {spec.name: array for spec, array in inputs.items()}


def pictures(sizes: list[tuple[int, int]]) -> list[UInt8Array]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def difference(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape and found.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ["vision.onnx", "value_head.onnx"])
def test_graphs_are_valid(name: str, exported: Exported) -> None:
    file = exported.folder / name
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(str(file), load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]


def test_a_damaged_graph_is_not(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(str(exported.vision))
    model.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model, full_check=True)


def test_weights_are_beside_the_graph(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(str(exported.vision), load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    weights = sum(p.numel() * 4 for p in exported.tower.parameters())
    data = exported.folder / "vision.onnx.data"
    assert outside and 0.95 * weights < data.stat().st_size < 1.05 * weights + 100_000
    assert {(e.key, e.value) for t in outside for e in t.external_data if e.key == "location"} == {
        ("location", data.name)  # no path: the folder can be moved
    }
    assert exported.vision.stat().st_size < 500_000
    shutil.copy(exported.vision, tmp_path)
    with pytest.raises(onnx.checker.ValidationError):  # the weights are not there
        onnx.checker.check_model(str(tmp_path / "vision.onnx"))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_embeddings_equal_the_towers(
    sizes: list[tuple[int, int]], exported: Exported, run: Run
) -> None:
    images = pictures(sizes)
    found = run(exported.vision, named(exported.inputs(images)))
    assert difference(found, exported.expected(images)) <= TOLERANCE


def test_a_video_equals_the_reference_towers(exported: Exported, oracle: Oracle, run: Run) -> None:
    """Pairs of frames attend among themselves, as in transformers' own tower."""
    rng = np.random.default_rng(1)
    video = rng.integers(0, 256, (6, 140, 168, 3), dtype=np.uint8)
    inputs = exported.inputs([video, *pictures([(84, 56)])])
    grids = torch.tensor([[3, 10, 12], [1, 6, 4]])
    visual = oracle.model.pretrained_model.model.visual
    with torch.inference_mode():
        expected = visual(torch.from_numpy(inputs[schema.PATCHES]), grid_thw=grids).pooler_output
    assert difference(run(exported.vision, named(inputs)), torch.as_tensor(expected).numpy()) < 1e-4


def test_patches_are_the_processors(exported: Exported, oracle: Oracle) -> None:
    images = pictures(SIZES["several"][1:4])
    processed = oracle.processor.image_processor(images, return_tensors="np")
    inputs = exported.inputs(images)
    np.testing.assert_allclose(inputs[schema.PATCHES], processed["pixel_values"], atol=1e-6)


def test_the_value_head_equals_torchs(checkpoint: Path, exported: Exported, run: Run) -> None:
    _, head = load_vision(checkpoint)
    for rows in (1, 2, 7, 64):
        hidden = np.random.default_rng(rows).normal(0, 3, (rows, 128)).astype(np.float32)
        found = run(exported.folder / "value_head.onnx", {"hidden": hidden})
        assert difference(found, head(torch.from_numpy(hidden)).numpy()) <= TOLERANCE


# Controls: the comparison must notice each, or it proves nothing.


def shuffled_windows(inputs: dict[TensorSpec, Array]) -> None:
    rectangle, places = (inputs[t] for t in (schema.WINDOWS, schema.WINDOW_PLACES))
    rows = np.random.default_rng(0).permutation(len(places))
    rectangle[rectangle >= 0] = rows
    places[rows] = np.flatnonzero(rectangle.reshape(-1) >= 0)


def without_masks(inputs: dict[TensorSpec, Array]) -> None:
    for spec in (schema.WINDOWS, schema.FRAMES):
        np.maximum(inputs[spec], 0, out=inputs[spec])


def one_frame(inputs: dict[TensorSpec, Array]) -> None:
    """All images attend to each other."""
    count = len(inputs[schema.FRAME_PLACES])
    inputs[schema.FRAMES] = np.arange(count)[None]
    inputs[schema.FRAME_PLACES] = np.arange(count)


def columns_first(inputs: dict[TensorSpec, Array]) -> None:
    inputs[schema.POSITIONS] = inputs[schema.POSITIONS][:, ::-1].copy()


@pytest.mark.parametrize(
    "mistake", [shuffled_windows, without_masks, one_frame, columns_first],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_mistakes_are_seen(
    mistake: Callable[[dict[TensorSpec, Array]], None], exported: Exported
) -> None:
    images = pictures(SIZES["several"])
    inputs = exported.inputs(images)
    inputs = {spec: array.copy() for spec, array in inputs.items()}
    mistake(inputs)
    found = by_reference(exported.vision, named(inputs))
    assert difference(found, exported.expected(images)) > 10 * TOLERANCE


def test_windows_hold_every_patch_once(exported: Exported) -> None:
    grids = [Grid(1, 34, 22), Grid(3, 10, 12), Grid(1, 2, 2)]
    inputs = grid_inputs(grids, exported.tower.cut)
    count = sum(grid.patches for grid in grids)
    for rectangle, places in (
        (schema.WINDOWS, schema.WINDOW_PLACES), (schema.FRAMES, schema.FRAME_PLACES),
    ):  # fmt: skip
        rows = inputs[rectangle].reshape(-1)
        assert sorted(rows[rows >= 0]) == list(range(count))
        np.testing.assert_array_equal(rows[inputs[places]], np.arange(count))
    assert inputs[schema.WINDOWS].shape[1] == 64, "a window is 8 x 8 patches"
    assert len(inputs[schema.FRAMES]) == 5


# Serving it.


def read_config(repository: Path) -> Any:
    text = (repository / schema.VISION / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.fixture(scope="module")
def with_python(build: Callable[..., Path]) -> Path:
    return build("--dtype=float32", "--vision=onnx", "--vision-backend=python")


@pytest.fixture(scope="module")
def with_onnxruntime(build: Callable[..., Path]) -> Path:
    return build("--dtype=float32", "--vision=onnx", "--version=3")


def test_tritons_backend_finds_the_graphs_own_tensors(with_onnxruntime: Path) -> None:
    config = read_config(with_onnxruntime)
    folder = with_onnxruntime / schema.VISION / "3"
    assert config.backend == "onnxruntime" and config.max_batch_size == 0
    assert {file.name for file in folder.iterdir()} == {"vision.onnx", "vision.onnx.data"}
    model = onnx.load(str(folder / config.default_model_filename))
    kinds = {"TYPE_FP32": onnx.TensorProto.FLOAT, "TYPE_INT64": onnx.TensorProto.INT64}
    for described, found in (
        (config.input, model.graph.input), (config.output, model.graph.output),
    ):  # fmt: skip
        assert [
            (t.name, kinds[model_config_pb2.DataType.Name(t.data_type)], list(t.dims))
            for t in described
        ] == [
            (
                t.name, t.type.tensor_type.elem_type,
                [d.dim_value or -1 for d in t.type.tensor_type.shape.dim],
            )
            for t in found
        ]  # fmt: skip


def test_who_runs_the_graph_is_one_line(with_python: Path, with_onnxruntime: Path) -> None:
    python, runtime = read_config(with_python), read_config(with_onnxruntime)
    assert python.backend == "python" and not python.default_model_filename
    policies = [list(config.version_policy.specific.versions) for config in (python, runtime)]
    assert policies == [[1], [3]], "each loads what it serves"
    for field in ("name", "input", "output", "max_batch_size"):
        assert getattr(python, field) == getattr(runtime, field), field


def test_the_graph_is_in_the_manifest(with_python: Path) -> None:
    manifest = json.loads((with_python / "reward/1/manifest.json").read_text())
    assert {"vision.onnx", "vision.onnx.data"} < manifest["sha256"].keys()
    assert manifest["options"]["vision_backend"] == "python"


def test_without_the_flag_there_is_no_vision_step(repository: Path) -> None:
    assert not (repository / schema.VISION).exists()


def test_a_version_cannot_bring_a_vision_step(
    checkpoint: Path, export: Callable[..., Any], build: Callable[..., Path]
) -> None:
    output = build("--dtype=float32")
    result = export(
        "--checkpoint", checkpoint, "--output", output, "--device=cpu", "--dtype=float32",
        "--preprocess-instances=2", "--threads=1", "--vision=onnx", "--version=2",
    )  # fmt: skip
    assert result.code == 1 and "would change" in result.stderr
    assert not (output / schema.VISION).exists()


@pytest.fixture(scope="module")
def model(served: Callable[..., Served]) -> Served:
    return served("graph", "--vision=onnx", "--vision-backend=python")


@pytest.fixture(scope="module")
def client(model: Served) -> RewardClient:
    return model.client


def test_served_scores_equal_the_oracle(
    client: RewardClient, cases: dict[str, Messages], reference: dict[str, float]
) -> None:
    groups = ("images", "turns", "system", "limits", "format", "prompt")
    names = [name for name in cases if name.split("/")[0] in groups]
    found = dict(zip(names, client.score_many([cases[n] for n in names]), strict=True))
    wrong = {
        name: (score, reference[name])
        for name, score in found.items()
        if abs(score - reference[name]) > fp32_budget(reference[name])
    }
    assert wrong == {}
    shown = [name for name in names if '"image"' in json.dumps(cases[name])]
    assert len(shown) >= 10 and len(names) - len(shown) >= 3


def test_kept_embeddings_are_not_computed_again(
    model: Served, client: RewardClient, cases: dict[str, Messages]
) -> None:
    def executions() -> float:
        series = read_metrics("127.0.0.1", model.server.endpoints.metrics_port, 10)
        return sum(
            one.value for one in series
            if one.name == "nv_inference_count" and one.labels["model"] == model.names.vision
        )  # fmt: skip

    client.score(cases["images/2"])
    before = executions()
    client.score(cases["images/2"])
    assert executions() == before
    client.score(cases["size/333x777"])
    assert executions() == before + 1


def test_without_its_vision_step_images_fail_and_text_is_scored(
    model: Served,
    client: RewardClient,
    cases: dict[str, Messages],
    reference: dict[str, float],
) -> None:
    model.server.http.unload(model.names.vision)
    try:
        with pytest.raises(ServerError, match="vision step graph_vision, version 1: "):
            client.score(cases["size/28x2000"])
        expected = reference["text/plain"]
        assert abs(client.score(cases["text/plain"]) - expected) <= fp32_budget(expected)
    finally:
        model.server.http.load(model.names.vision, 60)
    expected = reference["size/28x2000"]
    assert abs(client.score(cases["size/28x2000"]) - expected) <= fp32_budget(expected)


def test_a_failing_vision_step_fails_those_who_need_it(
    checkpoint: Path, cases: dict[str, Messages]
) -> None:
    """Beside them, text is scored; and what the step said reaches the caller."""

    def broken(media: list[UInt8Array], grids: list[Grid]) -> torch.Tensor:
        raise ForwardError("the vision step reward_vision, version 1: no such model")

    config = ForwardConfig(dtype="float32", device="cpu", vision="onnx")
    scorer = Scorer(checkpoint, config, broken)
    text = Features(np.arange(1, 9, dtype=np.int32), (np.arange(3, dtype=np.int32),))
    pads = np.full(1, scorer.geometry.image_token_id, np.int32)
    seen = replace(text, prompt_ids=pads, media=tuple(pictures([(28, 28)])))
    results = scorer.score([text, seen, text])
    assert [type(result) for result in results] == [Scores, ForwardError, Scores]
    assert str(results[1]).startswith("the vision step reward_vision")


def test_no_weights_of_the_tower_are_loaded(checkpoint: Path) -> None:
    model = load_model(
        checkpoint, torch.float32, torch.device("cpu"), encoder=lambda media, grids: torch.empty(0)
    )
    assert [name for name, _ in model.named_parameters() if name.startswith("visual.")] == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="onnxruntime is not installed"):
        open_session(tmp_path / "vision.onnx", VisionConfig())


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vision\.onnx"):
        open_session(tmp_path / "vision.onnx", VisionConfig())


def test_another_graph_is_named(exported: Exported) -> None:
    with pytest.raises(CheckpointError, match=r"hidden.*embeddings"):
        open_session(exported.folder / "value_head.onnx", VisionConfig())
