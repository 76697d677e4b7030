"""The command `triward gateway`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from triward.arguments import examples, port, whole_number
from triward.client import RewardClient


def add_gateway(commands: Any, server: argparse.ArgumentParser) -> None:
    """Add the command, whose `run` loads what it needs only when it is called."""
    command = commands.add_parser(
        "gateway",
        help="HTTP for trainers that know vLLM, SGLang, OpenRLHF, LLaMA-Factory or slime",
        description="Answer the HTTP requests of other projects with rewards. There is no access "
        "control: listen where only trainers can connect.",
        epilog=examples("triward gateway --url rewards:8001 --port 8010"),
        parents=[server],
    )
    command.set_defaults(run=_run, error=command.error)
    command.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    command.add_argument("--port", type=port, default=8010, help="0 takes a free one (%(default)s)")
    command.add_argument(
        "--served-name",
        action="append",
        metavar="NAME",
        help="what vLLM's clients call the model (the ensemble's name); may repeat",
    )
    command.add_argument(
        "--prompts",
        choices=("chatml", "plain"),
        default="chatml",
        help="how OpenRLHF's and slime's texts are read (%(default)s)",
    )
    command.add_argument(
        "--end", action="append", metavar="TOKEN", help="a token that ends responses; may repeat"
    )
    command.add_argument(
        "--allow-urls",
        action="store_true",
        help="fetch images from http(s) URLs of public addresses; data: URLs are always taken",
    )
    command.add_argument(
        "--max-body-bytes", type=whole_number, default=64 * 2**20, help="of a request (%(default)s)"
    )
    command.add_argument(
        "--max-requests",
        type=whole_number,
        default=128,
        help="at once; more are answered 503 (%(default)s)",
    )


def _run(client: RewardClient, options: argparse.Namespace) -> int:
    """Serve until a signal."""
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            options.error(
                f"needs {package}; in a checkout of Triward: pip install './tools[gateway]'"
            )
    from triward.integrations.chatml import ENDS, chatml, plain

    from triward_tools.gateway.run import serve
    from triward_tools.gateway.settings import Settings

    settings = Settings(
        models=tuple(options.served_name or [client.model]),
        parse={"chatml": chatml, "plain": plain}[options.prompts],
        ends=tuple(options.end or ENDS),
        timeout=options.timeout,
        max_body_bytes=options.max_body_bytes,
        max_requests=options.max_requests,
        allow_urls=options.allow_urls,
    )
    serve(client, settings, options.host, options.port)
    return 0
