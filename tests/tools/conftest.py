"""The client's fixtures."""

from tests.client.conftest import client, deadline, deliver, server_process, transport, web

__all__ = ["client", "deadline", "deliver", "server_process", "transport", "web"]
