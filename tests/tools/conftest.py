"""The client's fake server, and a client of it."""

import pytest

from tests.client.conftest import server
from triward import RewardClient

__all__ = ["server"]


@pytest.fixture
def client(server):
    with RewardClient(server.url, timeout=20) as client:
        yield client
