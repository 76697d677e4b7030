"""The command `triward-server`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .errors import LaunchError
from .launch import STOP_SIGNALS, Endpoints, TritonServer

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Serve reward models from Triton Inference Server."""


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    repository: Annotated[Path, typer.Option(help="What export/build_repository.py wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = Endpoints.host,
    grpc_port: Annotated[int, typer.Option(help="0: a free one.")] = Endpoints.grpc_port,
    http_port: Annotated[int, typer.Option(help="0: a free one.")] = Endpoints.http_port,
    metrics_port: Annotated[int, typer.Option(help="0: a free one.")] = Endpoints.metrics_port,
) -> None:
    """Run tritonserver on a repository until SIGTERM or Ctrl-C.

    Flags behind `--` go to tritonserver as they are.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    endpoints = Endpoints(host, grpc_port, http_port, metrics_port)
    try:
        with TritonServer(repository, endpoints, flags=context.args) as server:
            e = server.endpoints
            typer.echo(f"ready  grpc     {e.host}:{e.grpc_port}")
            typer.echo(f"       http     http://{e.host}:{e.http_port}")
            typer.echo(f"       metrics  http://{e.host}:{e.metrics_port}/metrics")
            sys.stdout.flush()
            server.wait()
    except LaunchError as error:
        typer.echo(f"triward-server: {error}", err=True)
        raise typer.Exit(1) from None


def _stop(number: int, frame: object) -> NoReturn:
    """Unwinds through `TritonServer`, which forwards SIGTERM and waits; once is enough."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)
