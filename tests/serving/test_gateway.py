"""The example gateway, with the real nginx and the real server behind it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2

from tests.conftest import ROOT, encode
from tests.ports import fixed
from triward import RewardClient, ServerUnavailable
from triward_server.serving.launch import TritonServer

METHOD = "/inference.GRPCInferenceService/ModelInfer"
BOMB = 200_000_000  # zeros, of which a thousandth travels


@pytest.fixture(scope="module")
def gateway(server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from run(server.endpoints.grpc, tmp_path_factory.mktemp("nginx"))


@pytest.fixture
def deserted(tmp_path: Path) -> Iterator[str]:
    """A gateway behind which nothing listens."""
    yield from run(fixed().grpc, tmp_path)


def run(behind: str, folder: Path) -> Iterator[str]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx (Debian: nginx) is not installed")
    url = fixed().grpc
    text = (ROOT / "docker" / "gateway" / "nginx.conf").read_text()
    changes = {"triward:8001": behind, "listen 8001": f"listen {url}", "/tmp/": f"{folder}/"}
    for there, here in changes.items():
        assert there in text
        text = text.replace(there, here)
    file = folder / "nginx.conf"
    file.write_text(text)
    command = [nginx, "-p", folder, "-c", file, "-e", "stderr", "-g", "daemon off;"]
    with subprocess.Popen(command, stderr=(folder / "nginx.log").open("w")) as process:
        try:
            with grpc.insecure_channel(url) as channel:
                grpc.channel_ready_future(channel).result(60)
            yield url
        finally:
            process.terminate()


def bomb(url: str, compression: grpc.Compression) -> grpc.RpcError:
    request = service_pb2.ModelInferRequest(model_name="reward")
    request.raw_input_contents.append(bytes(BOMB))
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(url, options=options) as channel:
        call = channel.unary_unary(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            call(request.SerializeToString(), compression=compression, timeout=120)
    return caught.value


def test_what_is_not_compressed_passes(gateway: str, client: RewardClient) -> None:
    image = encode(Image.fromarray(np.full((64, 64, 3), 9, np.uint8)))
    prompt = [
        {"role": "user", "content": [{"type": "image", "image": image},
                                     {"type": "text", "text": "Is it dark?"}]}
    ]  # fmt: skip
    responses = ["Yes.", "No."]
    with RewardClient(gateway, timeout=120) as through:
        scores = through.score_responses(prompt, responses)
    assert scores == pytest.approx(client.score_responses(prompt, responses), abs=1e-4)


def test_a_bomb_does_not_reach_the_server(gateway: str, server: TritonServer) -> None:
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    error = bomb(gateway, grpc.Compression.Gzip)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "send them without compression" in error.details()
    assert bomb(gateway, grpc.Compression.Deflate).code() is grpc.StatusCode.UNIMPLEMENTED
    assert process.memory_info().rss - before < BOMB / 4


def test_a_server_that_is_gone_is_unavailable(deserted: str) -> None:
    with (
        RewardClient(deserted, timeout=10, max_attempts=1) as client,
        pytest.raises(ServerUnavailable, match="the server is not there"),
    ):
        client.score([{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}])
