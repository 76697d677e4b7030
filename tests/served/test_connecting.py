"""Mistakes in connecting, with the real server; tests/client/test_client_connection.py has more."""

from __future__ import annotations

from typing import Any

import pytest

from triward import RewardClient, ServerError, ServerUnavailable, Tls
from triward_server.serving.launch import TritonServer

CONVERSATION = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]


def sentence(url: str, error: type[Exception], **settings: Any) -> str:
    with RewardClient(url, timeout=120, **settings) as client:
        with pytest.raises(error) as caught:
            client.score(CONVERSATION)
        with pytest.raises(error) as said:
            client.check_ready()
    assert str(caught.value).startswith(str(said.value))
    return str(said.value)


def test_tritons_other_ports(server: TritonServer) -> None:
    for port in (server.endpoints.http_port, server.endpoints.metrics_port):
        url = f"localhost:{port}"
        assert sentence(url, ServerUnavailable) == (
            f"{url} speaks HTTP, not gRPC: Triton's HTTP port is 8000, its metrics port 8002; "
            "gRPC is 8001"
        )


def test_tls_to_a_server_without(server: TritonServer) -> None:
    said = sentence(server.endpoints.grpc, ServerUnavailable, tls=Tls())
    assert said.startswith(f"{server.endpoints.grpc} does not speak TLS; ")


def test_a_model_that_is_not_served(server: TritonServer) -> None:
    said = sentence(server.endpoints.grpc, ServerError, model="nope")
    assert said.startswith(f"{server.endpoints.grpc} does not serve the model 'nope'; an export ")


def test_a_server_that_is_ready(server: TritonServer) -> None:
    with RewardClient(server.endpoints.grpc, wait_ready=60, timeout=120) as client:
        client.check_ready()
        assert client.is_ready()
        assert isinstance(client.score(CONVERSATION), float)
