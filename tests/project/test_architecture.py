"""The rules of DESIGN that keep the code readable: who imports whom, and one wire contract."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.conftest import ROOT
from triward import protocol
from triward_server import schema
from triward_server.serving.repository import DRAINING_VERSION

# In the order in which data flows; a module imports only what stands above it.
ROOMS = {
    "": "errors schema contract config memory device model_configs examples",
    "intake": "workers tiles image_codec video_codec codec_worker conversation decoding media "
    "video resizing family qwen sheet ixc families token_bound tokenization "
    "preprocess",
    "engine": "naming geometry positions tree digests packing arena layers products pages kernels "
    "attention float8 decoder towers vision clip_tower planning prefixes prefix_cache "
    "architectures processors backbone passes weights checkpoint streaming scoring",
    "backend": "metrics draining onnx_inputs onnx_runner onnx_vision codec overlap triton_io",
    "serving": "canary log repository integrity triton_http installation signals child endpoints "
    "gpu progress ending launch instances watchdog switch",
    "export": "placement options sentencepiece lora prepared internlm2 reference ixc_tokens "
    "ixc_pictures ixc_network ixc_reference referees verify calibration onnx configuration draft "
    "build random_checkpoint random_sentencepiece random_text_checkpoint random_ixc_tokenizer "
    "random_ixc_checkpoint commands",
    "sizing": "queueing gpus models request measured speed demand footprint budgets planner report "
    "command",
    "testing": "oracle echo_models echo",
    "commands": "cli",
}
PACKAGE = ROOT / "triward_server"
ORDER = [
    Path(room if room != "commands" else "", name)
    for room, names in ROOMS.items()
    for name in names.split()
]
MODELS = ROOT / "model_repository"
ADAPTERS = sorted(MODELS.glob("*/1/model.py"))


def files(module: Path) -> list[Path]:
    """A module's file, or all of a package's."""
    folder = PACKAGE / module
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(module: Path) -> set[Path]:
    """Modules of triward_server that one of them imports."""
    return set().union(*map(imported_by, files(module)))


def imported_by(path: Path) -> set[Path]:
    """Modules of triward_server that a file imports."""
    names = set[str]()
    parents = path.relative_to(PACKAGE.parent).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*parents[: len(parents) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
            names.add(".".join(base))
    places = [Path(*name.split(".")[1:]) for name in names if name.startswith("triward_server.")]
    return {module for module in ORDER for place in places if place.is_relative_to(module)}


def test_every_module_has_its_place() -> None:
    rooms = [PACKAGE, *(path for path in PACKAGE.glob("*/") if (path / "__init__.py").is_file())]
    modules = {path.relative_to(PACKAGE).with_suffix("") for r in rooms for path in r.glob("*.py")}
    packages = {path.parent.relative_to(PACKAGE) for path in PACKAGE.glob("*/*/__init__.py")}
    assert {m for m in modules if m.name != "__init__"} | packages == set(ORDER)


@pytest.mark.parametrize("module", ORDER, ids=str)
def test_a_module_imports_only_modules_above_it(module: Path) -> None:
    below = set(ORDER[ORDER.index(module) + 1 :])
    assert imported(module) & below == set()


def test_files_and_functions_are_short() -> None:
    roots = (
        "triward_server", "export", "benchmarks", "examples", "model_repository", "client", "tools"
    )  # fmt: skip
    paths = [path for root in roots for path in (ROOT / root).rglob("*.py")]
    assert len(paths) > 90
    lengths = {path: len(path.read_text().splitlines()) for path in paths}
    assert {path: n for path, n in lengths.items() if n > 400} == {}
    functions = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert {name: n for name, n in functions.items() if n > 60} == {}


# Names that stand for one thing in several modules, with what that is.
SHARED_NAMES = {
    "add": "a tab of the playground, and the command of evaluation",
    "ForwardBackend": "what an adapter imports; the echo's is in its place",
    "InvalidRequest": "the error, on the server and in the client",
    "PreprocessBackend": "what an adapter imports; the echo's is in its place",
    "TensorSpec": "a tensor of the contract, on the server and in the client",
    "Tls": "encryption of gRPC, on the server and in the client",
    "TriwardError": "the base of errors, on the server and in the client",
    "best_of_n": "the same choice, of rows here and of a Ray dataset there",
    "main": "the entry point of a script",
    "make_checkpoint": "the command, and what it calls",
    "measure": "the central loop of a benchmark",
    "score_parquet": "the same job, on one machine and on a Ray cluster",
    "serve": "the command; and the loop that `workers.py` calls in a worker",
    "verify": "the command, and what it calls",
}


def test_no_two_unrelated_things_share_a_name() -> None:
    roots = ("triward_server", "benchmarks", "client/triward", "tools/triward_tools")
    defined: dict[str, list[Path]] = {}
    for path in (path for root in roots for path in sorted((ROOT / root).rglob("*.py"))):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined.setdefault(node.name, []).append(path.relative_to(ROOT))
    shared = {
        name: paths
        for name, paths in defined.items()
        if len(paths) > 1 and not name.startswith("_")
    }
    assert {name: paths for name, paths in shared.items() if name not in SHARED_NAMES} == {}
    assert SHARED_NAMES.keys() <= shared.keys()


def test_serving_does_not_import_the_test_code() -> None:
    test_code = {m for m in ORDER if m.parts[0] == "testing" or m.name.startswith("random_")}
    makes_them = Path("export", "commands")  # when `make-checkpoint` is what it was told
    users = [m for m in ORDER if m not in test_code and test_code & imported(m)]
    assert users == [makes_them]


def test_tritons_module_is_imported_by_adapters_alone() -> None:
    files = [p for p in ROOT.glob("*/**/*.py") if not {".venv", "build"} & set(p.parts)]
    needle = "import triton_python_" + "backend_utils"
    assert sorted(p for p in files if needle in p.read_text()) == ADAPTERS
    assert len(ADAPTERS) == 4


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.parts[-3])
def test_adapters_hold_no_logic(path: Path) -> None:
    logic = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.comprehension, ast.BoolOp)
    assert [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, logic)] == []


@pytest.mark.parametrize("module", ["cli", "backend.draining", "backend.onnx_runner"])
def test_commands_and_the_idle_model_load_nothing_heavy(module: str) -> None:
    """A probe starts the command every few seconds."""
    code = f"import sys, triward_server.{module}; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"torch", "transformers", "PIL", "onnx"} & set(modules) == set()


def test_the_process_that_decodes_is_small_and_soon_there() -> None:
    code = "import sys, triward_server.intake.codec_worker; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"torch", "transformers", "pydantic", "qwen_vl_utils"} & set(modules) == set()


def test_the_client_loads_nothing_heavy() -> None:
    code = "import sys, triward; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"torch", "transformers", "PIL", "triward_server"} & set(modules) == set()


def read_config(name: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(
        (MODELS / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )


def specs(tensors: object) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(name, datatype, dims) of config.pbtxt's, the schema's or the client's tensors."""
    result = []
    for t in tensors:  # type: ignore[attr-defined]
        if hasattr(t, "data_type"):
            kind = model_config_pb2.DataType.Name(t.data_type).removeprefix("TYPE_")
            result.append((t.name, "BYTES" if kind == "STRING" else kind, tuple(t.dims)))
        else:
            result.append((t.name, t.datatype, tuple(t.dims)))
    return tuple(result)


def test_client_and_server_agree_on_the_wire() -> None:
    assert specs(protocol.INPUTS) == specs(schema.REWARD_INPUTS)
    assert specs(protocol.FORWARD_INPUTS) == specs(schema.FORWARD_INPUTS)
    assert specs(protocol.OUTPUTS) == specs(schema.REWARD_OUTPUTS)
    assert protocol.MODEL == schema.ENSEMBLE
    assert protocol.CONTRACT_VERSION == schema.CONTRACT_VERSION
    assert str(DRAINING_VERSION) == protocol.DRAINING_VERSION
    assert protocol.forward_model(protocol.MODEL) == schema.FORWARD


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        (schema.ENSEMBLE, schema.REWARD_INPUTS, schema.REWARD_OUTPUTS),
        (schema.PREPROCESS, schema.REWARD_INPUTS, schema.FORWARD_INPUTS),
        (schema.FORWARD, schema.FORWARD_INPUTS, schema.REWARD_OUTPUTS),
        (schema.DRAINING, schema.REWARD_INPUTS, schema.REWARD_OUTPUTS),
    ],
)
def test_config_and_schema_agree(
    model: str, inputs: tuple[schema.TensorSpec, ...], outputs: tuple[schema.TensorSpec, ...]
) -> None:
    config = read_config(model)
    assert config.name == model
    assert config.max_batch_size == schema.MAX_BATCH_SIZE
    assert specs(config.input) == specs(inputs)
    assert specs(config.output) == specs(outputs)


@pytest.mark.parametrize("model", [schema.PREPROCESS, schema.FORWARD])
def test_requests_of_all_shapes_can_share_a_batch(model: str) -> None:
    config = read_config(model)
    assert config.HasField("dynamic_batching")
    # An empty list means "wait for a full batch"; none at all means "take what is there".
    assert list(config.dynamic_batching.preferred_batch_size) == []
    for tensor in config.input:
        assert tensor.allow_ragged_batch == (-1 in tensor.dims), tensor.name
