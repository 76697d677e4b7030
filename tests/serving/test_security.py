"""Who may talk to the server, about what, and what it never does for them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from tests.certificates import write_certificates
from tests.commands import BIN, Command
from tests.conftest import LOCAL, brief
from triward import RewardClient
from triward_server.errors import LaunchError
from triward_server.serving.launch import Tls, TritonServer
from triward_server.serving.triton_http import GRPC_ADMIN_HEADER, HttpError, TritonHttp

ADMIN: dict[str, Callable[[Any, dict[str, str]], Any]] = {
    "model-repository": lambda c, h: c.get_model_repository_index(headers=h),
    "load": lambda c, h: c.load_model("reward", headers=h),
    "unload": lambda c, h: c.unload_model("no-such-model", headers=h),
    "model-config": lambda c, h: c.get_model_config("reward", headers=h),
    "shared memory": lambda c, h: c.get_system_shared_memory_status(headers=h),
    "map shared memory": lambda c, h: c.register_system_shared_memory(
        "x", "/triward-test", 1, headers=h
    ),
    "trace": lambda c, h: c.get_trace_settings(headers=h),
    "logging": lambda c, h: c.get_log_settings(headers=h),
}


@pytest.mark.parametrize("name", ADMIN)
def test_admin_protocols_want_the_key(name: str, server: TritonServer) -> None:
    header = GRPC_ADMIN_HEADER
    assert header == "triton-grpc-protocol-admin-key", "as documented"
    with triton.InferenceServerClient(server.endpoints.grpc) as client:
        for headers in ({}, {header: "wrong"}, {header: ""}):
            with pytest.raises(triton.InferenceServerException, match="restricted") as caught:
                ADMIN[name](client, headers)
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
        if name in ("load", "unload", "map shared memory"):
            return  # with the key they would change the server that other tests use
        ADMIN[name](client, {header: server.admin_key})


def test_over_http_too(server: TritonServer) -> None:
    for key in ("", "wrong"):
        nobody = TritonHttp("127.0.0.1", server.endpoints.http_port, key)
        for call in (nobody.index, lambda n=nobody: n.unload("reward"),
                     lambda n=nobody: n.config("reward", "1")):  # fmt: skip
            with pytest.raises(HttpError, match="restricted"):
                call()
    assert {m.name for m in server.http.index()} >= {"reward"}


def test_scoring_and_health_need_no_key(server: TritonServer, client: RewardClient) -> None:
    assert TritonHttp("127.0.0.1", server.endpoints.http_port).is_ready()
    with triton.InferenceServerClient(server.endpoints.grpc) as raw:
        assert raw.is_server_ready() and raw.get_inference_statistics("reward")


def test_every_start_has_another_key(server: TritonServer, repository: Path) -> None:
    other = TritonServer(repository)
    assert len(other.admin_key) >= 32 and other.admin_key != server.admin_key
    assert other.admin_key not in repr(other)


@pytest.mark.parametrize("key", ["", "a:b", "a,b", "ä", "a b"])
def test_a_key_that_would_not_arrive_is_refused(
    key: str, command: Callable[..., Command], tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(key + "\n")
    failed = command(BIN / "triward-server", "models", "--admin-key-file", file)
    assert failed.wait() == 1
    assert failed.output == f"triward-server: {file}: a key is one or more of A-Z a-z 0-9 - _ .\n"


def test_the_operators_own_key(server: TritonServer, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(server.admin_key + "\n")
    command = [BIN / "triward-server", "models", f"--http-port={server.endpoints.http_port}"]
    without = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert without.returncode == 1 and "restricted" in without.stderr
    with_it = subprocess.run(
        command, capture_output=True, text=True, timeout=60,
        env=os.environ | {"TRIWARD_ADMIN_KEY_FILE": str(file)},
    )  # fmt: skip
    assert with_it.returncode == 0 and "reward_forward" in with_it.stdout


@dataclass(frozen=True)
class Pki:
    """Certificates of one authority, as files."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


@pytest.fixture(scope="module")
def make_pki(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Pki]:
    def make() -> Pki:
        hosts = {name: ["127.0.0.1"] for name in ("server", "client")}
        folder = write_certificates(tmp_path_factory.mktemp("pki"), hosts)
        files = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
        return Pki(*(folder / name for name in files))

    return make


@pytest.fixture(scope="module")
def pki(make_pki: Callable[[], Pki]) -> Pki:
    return make_pki()


@pytest.fixture(scope="module")
def mutual(
    echo_repository: Path, pki: Pki, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    tls = Tls(pki.server, pki.server_key, client_ca=pki.ca)
    with brief(echo_repository, log, tls=tls) as running:
        yield running


def ask(url: str, **encryption: Any) -> Any:
    """One score over gRPC; a refused handshake is UNAVAILABLE."""
    inputs = []
    for name, value in (("messages", b'[{"role":"user","content":"?"}]'), ("responses", b"yes")):
        tensor = triton.InferInput(name, [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[value]], dtype=np.object_))
        inputs.append(tensor)
    media = triton.InferInput("media", [1, 0], "BYTES")
    media.set_data_from_numpy(np.empty((1, 0), dtype=np.object_))
    with triton.InferenceServerClient(url, **encryption) as client:
        return client.infer("reward", [*inputs, media], client_timeout=20).as_numpy("scores")


class TestMutualTls:
    """The strictest of the three ways to listen."""

    def files(self, pki: Pki, **changes: Path | None) -> dict[str, Any]:
        paths = {
            "root_certificates": pki.ca, "private_key": pki.client_key,
            "certificate_chain": pki.client,
        } | changes  # fmt: skip
        return {"ssl": True, **{k: v and str(v) for k, v in paths.items()}}

    def test_the_right_certificate(self, mutual: TritonServer, pki: Pki) -> None:
        assert np.isfinite(ask(mutual.endpoints.grpc, **self.files(pki))).all()

    def test_plain_text_is_refused(self, mutual: TritonServer) -> None:
        with pytest.raises(triton.InferenceServerException) as caught:
            ask(mutual.endpoints.grpc)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"

    def test_no_certificate_is_refused(self, mutual: TritonServer, pki: Pki) -> None:
        files = self.files(pki, private_key=None, certificate_chain=None)
        with pytest.raises(triton.InferenceServerException) as caught:
            ask(mutual.endpoints.grpc, **files)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"

    def test_somebody_elses_certificate_is_refused(
        self, mutual: TritonServer, pki: Pki, make_pki: Callable[[], Pki]
    ) -> None:
        other = make_pki()
        files = self.files(pki, private_key=other.client_key, certificate_chain=other.client)
        with pytest.raises(triton.InferenceServerException) as caught:
            ask(mutual.endpoints.grpc, **files)
        assert caught.value.status() == "StatusCode.UNAVAILABLE"

    def test_a_server_that_is_not_ours_is_refused(
        self, mutual: TritonServer, pki: Pki, make_pki: Callable[[], Pki]
    ) -> None:
        with pytest.raises(triton.InferenceServerException) as caught:
            ask(mutual.endpoints.grpc, **self.files(pki, root_certificates=make_pki().ca))
        assert caught.value.status() == "StatusCode.UNAVAILABLE"

    def test_http_stays_on_this_machine(self, mutual: TritonServer) -> None:
        """Triton cannot encrypt it."""
        connections = psutil.Process(mutual.pid).net_connections("inet")
        listening = {c.laddr.port: c.laddr.ip for c in connections if c.status == "LISTEN"}
        assert listening[mutual.endpoints.http_port] == "127.0.0.1"
        assert mutual.http.is_ready()


def test_tls_without_client_certificates(serve: Callable[..., Command], pki: Pki) -> None:
    """By the command's flags, listening on all addresses but for HTTP."""
    running = serve("--tls-certificate", pki.server, "--tls-key", pki.server_key, "--host=0.0.0.0")
    url = running.wait_for(r"ready\s+grpc\s+0.0.0.0:(\d+)")[1]
    assert running.wait_for(r"http\s+http://(\S+):")[1] == "127.0.0.1"
    scores = ask(f"127.0.0.1:{url}", ssl=True, root_certificates=str(pki.ca))
    assert np.isfinite(scores).all()
    with pytest.raises(triton.InferenceServerException):
        ask(f"127.0.0.1:{url}")


@pytest.mark.parametrize("flags", [["--tls-key"], ["--tls-certificate"], ["--tls-client-ca"]])
def test_half_of_tls_is_no_tls(flags: list[str], serve: Callable[..., Command], pki: Pki) -> None:
    failed = serve(*flags, pki.ca)
    assert failed.wait() == 1
    assert failed.output.startswith("triward-server: --tls-certificate and --tls-key come together")


def test_a_certificate_that_is_not_there(repository: Path, pki: Pki) -> None:
    tls = Tls(pki.server, pki.server.with_name("missing.key"))
    with (
        pytest.raises(LaunchError, match=r"missing\.key: No such file"),
        TritonServer(repository, LOCAL, tls=tls),
    ):
        pass


def test_what_a_request_names_is_never_opened(server: TritonServer, tmp_path: Path) -> None:
    """Every field of a part that could be taken for a place, against a file that tells of reads."""
    trap = tmp_path / "trap.png"
    os.mkfifo(trap)  # whoever opens it waits, and the request with it
    places = (str(trap), f"file://{trap}", f"http://127.0.0.1:{server.endpoints.http_port}/")
    for field in ("image", "image_url", "url", "path", "video", "file"):
        for place in places:
            text = f'[{{"role":"user","content":[{{"type":"image","{field}":"{place}"}}]}}]'
            inputs = []
            for name, values in (("messages", [text.encode()]), ("responses", [b"a"]),
                                 ("media", [place.encode()])):  # fmt: skip
                tensor = triton.InferInput(name, [1, 1], "BYTES")
                tensor.set_data_from_numpy(np.array([values], dtype=np.object_))
                inputs.append(tensor)
            with (
                triton.InferenceServerClient(server.endpoints.grpc) as client,
                pytest.raises(triton.InferenceServerException) as caught,
            ):
                client.infer("reward", inputs, client_timeout=20)
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
