"""A client and a server, or a server and a repository, of different versions of the contract."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.conftest import LOCAL, ROOT, Exit
from tests.serving.test_security import ask
from triward import RewardClient, ServerError, contract, protocol
from triward_server import schema
from triward_server.contract import check_caller, check_repository
from triward_server.errors import ConfigError, ContractMismatch, InvalidRequest, LaunchError
from triward_server.serving.launch import TritonServer

CONVERSATION = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
VERSION = "CONTRACT_VERSION = "
TOO_OLD = (
    "contract_version: the client speaks version 1 of the wire contract, this server version 2; "
    "upgrade the client"
)


@pytest.mark.parametrize("parameters", ["", "{}", '{"other": 5}', '{"contract_version": 1}'])
def test_callers_that_are_taken(parameters: str) -> None:
    check_caller(parameters)


@pytest.mark.parametrize(("said", "older"), [(0, "client"), (2, "server")])
def test_callers_of_another_version(said: int, older: str) -> None:
    with pytest.raises(ContractMismatch) as caught:
        check_caller(f'{{"contract_version": {said}}}')
    assert str(caught.value) == (
        f"contract_version: the client speaks version {said} of the wire contract, this server "
        f"version 1; upgrade the {older}"
    )


@pytest.mark.parametrize("said", ["true", "1.0", '"1"', "[1]"])
def test_callers_that_name_no_version(said: str) -> None:
    with pytest.raises(InvalidRequest, match=r"contract_version: .*; must be a whole number"):
        check_caller(f'{{"contract_version": {said}}}')


def test_repositories() -> None:
    device = {"device": {"string_value": "cpu"}}
    named = {**device, "contract_version": {"string_value": "1"}}
    assert check_repository(device) == check_repository(named) == device
    with pytest.raises(ConfigError, match=r"for version 2 of .* speaks version 1; export it again"):
        check_repository({"contract_version": {"string_value": "2"}})


def configure(path: Path, change: Callable[[model_config_pb2.ModelConfig], object]) -> None:
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    change(config)
    path.unlink()  # it may be a link to another test's
    path.write_text(text_format.MessageToString(config))


def test_an_export_says_its_version(repository: Path) -> None:
    for model in schema.REWARD.steps:
        text = (repository / model / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert config.parameters["contract_version"].string_value == str(schema.CONTRACT_VERSION)


def test_a_repository_of_before_takes_another_version(
    export: Callable[..., Exit], checkpoint: Path, tmp_path: Path
) -> None:
    """What does not say its contract's version is of the first one."""
    flags = ("--checkpoint", checkpoint, "--output", tmp_path / "models", "--device=cpu")
    assert export(*flags, "--dtype=float32", "--threads=1").code == 0
    for model in schema.REWARD.steps:
        path = tmp_path / "models" / model / "config.pbtxt"
        configure(path, lambda config: config.parameters.pop("contract_version"))
    added = export(*flags, "--dtype=float32", "--threads=1", "--version=2")
    assert added.code == 0, added.stderr


def code_of_version(folder: Path, version: int) -> Path:
    """A copy of the server's package that speaks another version."""
    package = shutil.copytree(ROOT / "triward_server", folder / "triward_server")
    text = (package / "schema.py").read_text()
    assert text.count(VERSION) == 1
    now = f"{VERSION}{schema.CONTRACT_VERSION}\n"
    (package / "schema.py").write_text(text.replace(now, f"{VERSION}{version}\n"))
    return folder


@pytest.fixture(scope="module")
def newer(
    echo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server of version 2, with a repository of its time and a model that has other tensors."""
    folder = tmp_path_factory.mktemp("newer")
    code = code_of_version(folder / "code", 2)
    models = folder / "models"
    shutil.copytree(echo_repository, models, copy_function=shutil.copy)

    def raise_version(config: model_config_pb2.ModelConfig) -> None:
        config.parameters["contract_version"].string_value = "2"

    def add_input(config: model_config_pb2.ModelConfig) -> None:
        config.name = "strange"
        config.input.add(name="more", data_type=model_config_pb2.TYPE_STRING, dims=[1])

    for model in schema.REWARD.steps:
        configure(models / model / "config.pbtxt", raise_version)
    shutil.copytree(models / schema.DRAINING, models / "strange")
    configure(models / "strange" / "config.pbtxt", add_input)
    with (folder / "triton.log").open("w") as log:
        running = TritonServer(models, LOCAL, log=log)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schema, "CONTRACT_VERSION", 2)
            patch.setenv("PYTHONPATH", str(code))
            patch.chdir(code)  # where Triton's Python looks first
            running.__enter__()
        try:
            yield running
        finally:
            running.stop()


def test_an_older_client_learns_both_versions(newer: TritonServer) -> None:
    with RewardClient(newer.endpoints.grpc, timeout=120) as client:
        for call in (lambda: client.score(CONVERSATION), lambda: client.score_tokens([1], [[2]])):
            with pytest.raises(ServerError) as caught:
                call()
            assert str(caught.value) == TOO_OLD
        client.check_ready()


def test_a_caller_that_names_no_version_is_taken(newer: TritonServer) -> None:
    assert ask(newer.endpoints.grpc).shape == (1, 1)


def test_the_same_version_is_taken(newer: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CONTRACT_VERSION", 2)
    with RewardClient(newer.endpoints.grpc, timeout=120) as client:
        assert isinstance(client.score(CONVERSATION), float)


def test_a_newer_client_learns_both_versions(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "CONTRACT_VERSION", 2)
    with RewardClient(server.endpoints.grpc, timeout=120) as client:
        for call in (lambda: client.score(CONVERSATION), lambda: client.score_tokens([1], [[2]])):
            with pytest.raises(ServerError, match=r"version 2 .* version 1; upgrade the server"):
                call()


def test_tensors_that_triton_refuses(newer: TritonServer) -> None:
    """No code of ours sees such a request; the server's name tells its version."""
    assert protocol.CONTRACT_VERSION == 1
    with (
        RewardClient(newer.endpoints.grpc, model="strange", timeout=120) as client,
        pytest.raises(ServerError) as caught,
    ):
        client.score(CONVERSATION)
    sentence = str(caught.value)
    mine = "the client speaks version 1 of the wire contract, the server version 2"
    assert sentence.startswith(f"{newer.endpoints.grpc}: {mine}; upgrade the client. Triton says: ")
    assert "expected 4 inputs but got 3" in sentence


@pytest.mark.parametrize(
    "words",
    [
        "[request id: <id_unknown>] expected 3 inputs but got 4 inputs for model 'reward'. Got",
        "unexpected inference input 'extra' for model 'reward'",
        "unexpected inference output 'nope' for model 'reward'",
        "[request id: <id_unknown>] inference input 'messages' data-type is 'INT32', but model "
        "'reward' expects 'BYTES'",
        "[request id: <id_unknown>] unexpected shape for input 'messages' for model 'reward'. Exp",
    ],
)
def test_tritons_words(words: str) -> None:
    """Of release 24.10."""
    assert contract.is_refusal(words)


def test_a_repository_of_another_version_is_not_served(
    echo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = code_of_version(tmp_path / "code", 3)
    monkeypatch.setenv("PYTHONPATH", str(code))
    monkeypatch.chdir(code)
    with (
        (tmp_path / "triton.log").open("w") as log,
        pytest.raises(LaunchError, match=r"for version 1 of .* speaks version 3; export it again"),
        TritonServer(echo_repository, LOCAL, log=log),
    ):
        pass
