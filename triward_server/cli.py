"""The command `triward-server`."""

from __future__ import annotations

# First of all, and so that it stays first:
from .serving.signals import STOP_SIGNALS, farewell  # isort: split

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isnan
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from . import __version__, examples, schema
from .config import Dtype
from .errors import ConfigError, LaunchError, TriwardError
from .export.commands import COMMANDS
from .memory import half_of_the_machine
from .serving import repository as repositories
from .serving.integrity import Verify
from .serving.launch import Endpoints, Tls, TritonServer
from .serving.log import LineWriter
from .serving.switch import switch_version
from .serving.triton_http import HttpError, TritonHttp
from .serving.watchdog import Watchdog, check_once
from .sizing.command import plan_replicas

# A GPU's forward passes take a second or two; a CPU's may take minutes.
_HANG_TIMEOUT_GPU = 10.0
_HANG_TIMEOUT_CPU = 120.0
_WATCH_INTERVAL = 2.0

# Help and usage errors without boxes, which leave text few columns.
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Repository = Annotated[Path, typer.Option(help="What `triward-server export` wrote.")]
Verified = Annotated[
    Verify,
    typer.Option(help="Compare files with the manifest: whole contents, sizes and samples, not."),
]
Host = Annotated[
    str,
    typer.Option(help="Where its HTTP listens; by default only on its own machine."),
]
HttpPort = Annotated[int, typer.Option(help="The server's, for HTTP.")]
MetricsPort = Annotated[int, typer.Option(help="The server's, for metrics.")]
AdminKeyFile = Annotated[
    Path | None,
    typer.Option(envvar="TRIWARD_ADMIN_KEY_FILE", help="File with the key of the admin protocols."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"triward-server {__version__}, wire contract {schema.CONTRACT_VERSION}")
        raise typer.Exit


@app.callback(epilog=examples.example_lines(["triward-server serve --repository skywork"]))
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Serve reward models from Triton Inference Server."""


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    repository: Repository,
    host: Annotated[
        str, typer.Option(help="IPv4 address for gRPC and metrics; 0.0.0.0: all of them.")
    ] = Endpoints.host,
    http_host: Annotated[
        str, typer.Option(help="IPv4 address for HTTP, which only this machine's commands need.")
    ] = Endpoints.http_host,
    grpc_port: Annotated[int, typer.Option(help="0: a free one.")] = Endpoints.grpc_port,
    http_port: Annotated[int, typer.Option(help="0: a free one.")] = Endpoints.http_port,
    metrics_port: Annotated[int, typer.Option(help="0: a free one.")] = Endpoints.metrics_port,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM; encrypts gRPC.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM; callers must show a certificate that it signed.")
    ] = None,
    admin_key_file: AdminKeyFile = None,
    trace_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry collector, http://HOST:4318/v1/traces.")
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for requests in flight when told to stop.")
    ] = TritonServer.drain_timeout,
    max_memory: Annotated[
        float | None,
        typer.Option(
            min=4,
            help="GiB that tritonserver itself may take, its models' processes not included; "
            "half of the machine's or the container's, at least 4.",
        ),
    ] = None,
    hang_timeout: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds without progress that end the server; 10 on a GPU."),
    ] = None,
    verify: Verified = Verify.SAMPLED,
) -> None:
    """Run tritonserver on a repository until SIGTERM or Ctrl-C.

    Ends with 1 when the server no longer scores. Flags behind `--` go to tritonserver as they are.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    with _errors():
        server = TritonServer(
            repository,
            Endpoints(host, grpc_port, http_port, metrics_port, http_host),
            flags=context.args,
            drain_timeout=drain_timeout,
            tls=_tls(tls_certificate, tls_key, tls_client_ca),
            trace_endpoint=trace_endpoint,
            admin_key=_admin_key(admin_key_file) or secrets.token_hex(16),
            max_memory=int(max_memory * 2**30) if max_memory else half_of_the_machine(),
            verify=verify,
        )
        with server:
            watchdog = _watchdog(server, repository, hang_timeout)
            _announce(server)
            server.wait(watchdog.check, _WATCH_INTERVAL)


@app.command()
def health(
    host: Host = "127.0.0.1",
    http_port: HttpPort = Endpoints.http_port,
    metrics_port: MetricsPort = Endpoints.metrics_port,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds.")] = 10.0,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also score the repository's canaries, on each instance.")
    ] = False,
    repository: Annotated[
        Path | None,
        typer.Option(
            help=f"What is served: all its models are asked, not {schema.ENSEMBLE} alone."
        ),
    ] = None,
) -> None:
    """Say whether a server is well; exits with 1 when it is not."""
    with _errors():
        if deep and repository is None:
            raise LaunchError("--deep needs --repository, where the canaries are")
        check_once(TritonHttp(host, http_port), repository, timeout, deep, metrics_port)
    typer.echo("well")


@app.command()
def models(
    host: Host = "127.0.0.1",
    http_port: HttpPort = Endpoints.http_port,
    admin_key_file: AdminKeyFile = None,
) -> None:
    """List what is loaded."""
    table = Table("model", "version", "state")
    with _errors():
        for model in _triton(host, http_port, admin_key_file).index():
            table.add_row(model.name, model.version, model.state)
    Console().print(table)


@app.command()
def load(
    model: Annotated[str, typer.Argument(help="Its name.")],
    host: Host = "127.0.0.1",
    http_port: HttpPort = Endpoints.http_port,
    admin_key_file: AdminKeyFile = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds.")] = 900.0,
) -> None:
    """Load a model, or what has changed of it: versions that came, versions that went."""
    with _errors():
        _triton(host, http_port, admin_key_file).load(model, timeout)
    typer.echo(f"{model}: loaded")


@app.command()
def unload(
    model: Annotated[str, typer.Argument(help="Its name.")],
    host: Host = "127.0.0.1",
    http_port: HttpPort = Endpoints.http_port,
    admin_key_file: AdminKeyFile = None,
) -> None:
    """Unload a model with all its versions; requests that it has taken finish."""
    with _errors():
        _triton(host, http_port, admin_key_file).unload(model)
    typer.echo(f"{model}: unloaded")


@app.command()
def switch(
    version: Annotated[int, typer.Argument(help="Which one to serve from now on.")],
    repository: Repository,
    name: Annotated[str, typer.Option(help="Of which model.")] = schema.ENSEMBLE,
    host: Host = "127.0.0.1",
    http_port: HttpPort = Endpoints.http_port,
    admin_key_file: AdminKeyFile = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for loading it.")] = 900.0,
    verify: Verified = Verify.SAMPLED,
) -> None:
    """Serve another version, without a failed request; going back works the same way.

    Loads it beside the one that is served and asks its canary; changes over if that scores what it
    did at export. If not, unloads it again and exits with 1.
    """
    with _errors():
        triton = _triton(host, http_port, admin_key_file)
        names = schema.ModelNames(name)
        before = switch_version(triton, repository, str(version), timeout, names, verify, _say)
    typer.echo(f"{name}: version {version} is served, was {before}")


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.command("plan")(plan_replicas)


def _watchdog(server: TritonServer, repository: Path, hang_timeout: float | None) -> Watchdog:
    gpu = repositories.serves_on_gpu(repository)
    patience = hang_timeout or (_HANG_TIMEOUT_GPU if gpu else _HANG_TIMEOUT_CPU)
    port = server.endpoints.metrics_port
    return Watchdog(server.http, port, repository, server.pid, patience)


def _announce(server: TritonServer) -> None:
    """Say where it listens; nobody has to be there to read it."""
    schemes = {"grpc": "", "http": "http://", "metrics": "http://"}
    paths = {"metrics": "/metrics"}
    lines = [
        f"{name:<8} {schemes[name]}{address}{paths.get(name, '')}"
        for name, address in sorted(server.listening().items())
    ]
    try:
        typer.echo("ready  " + "\n       ".join(lines))
        sys.stdout.flush()
    except OSError:
        # What is still in the buffer would fail once more at the exit, and change its code.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint's folder.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="The engine's.")] = "float32",
    streamed: Annotated[
        bool | None,
        typer.Option(
            "--streamed/--whole",
            help="One layer's weights at a time, or all; by default what fits into free memory.",
        ),
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="The few that an export asks.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="For float8: JSONL of messages and responses.")
    ] = None,
) -> None:
    """Score built-in conversations with a reference and with the engine, and compare.

    The reference is transformers' own class, or where it has none a restatement of the model's
    code. Exits with 1 when a float32 score is further from it than 1e-4, relative above 1. A
    bfloat16 score may be twice as far as the reference's own bfloat16 is in the worst conversation.
    Float8 must order pairs of responses as float32 does, as for an export.
    """
    if dtype == "float8" or calibration:
        _calibrate(checkpoint, device, dtype, streamed, small, calibration)
    from .export.verify import Verification, run  # torch, which no other command needs

    table = Table("conversation", "score", "reference", "distance", "")
    with _errors():
        report: Verification = run(checkpoint, device, streamed, small, dtype)
    for row in report.rows:
        scores = [s if isinstance(s, str) else f"{s:.6f}" for s in (row.score, row.reference)]
        distance = "" if isnan(row.distance) else f"{row.distance:.1e}"
        table.add_row(row.name, *scores, distance, "ok" if row.agrees else "DIFFERS")
    Console().print(table)
    how = "layer by layer" if report.streamed else "whole"
    verdict = f"{len(report.wrong)} of {len(report.rows)} conversations differ"
    typer.echo(f"{verdict}; {dtype} on {device}, loaded {how}, {report.seconds:.1f} s")
    if dtype != "float32":
        farthest = max((row.noise for row in report.rows), default=0.0)
        typer.echo(
            f"{report.referee}: its {dtype} scores are up to {farthest:.1e} from its float32"
        )
    raise typer.Exit(1 if report.wrong else 0)


def _calibrate(
    checkpoint: Path,
    device: str,
    dtype: Dtype,
    streamed: bool | None,
    small: bool,
    file: Path | None,
) -> NoReturn:
    from .export.calibration import OrderKept, calibrate_checkpoint

    with _errors():
        if small or dtype != "float8":
            flag = "--small" if small else f"--calibration {file}"
            raise ConfigError(f"{flag} and --dtype {dtype} do not go together")
        found: OrderKept = calibrate_checkpoint(checkpoint, device, streamed, file)
    typer.echo(str(found))
    raise typer.Exit(0 if found.agrees else 1)


for _registered in app.registered_commands:
    assert _registered.callback and _registered.callback.__doc__
    _registered.epilog = examples.epilog(_registered.name or _registered.callback.__name__)
    # The first sentence whole, which typer would cut.
    _registered.short_help = " ".join(_registered.callback.__doc__.partition("\n\n")[0].split())


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (TriwardError, HttpError) as error:
        _say(str(error))
        raise typer.Exit(1) from None


def _say(line: str) -> None:
    LineWriter(None).write(f"triward-server: {line}\n")


def _triton(host: str, port: int, admin_key_file: Path | None) -> TritonHttp:
    return TritonHttp(host, port, _admin_key(admin_key_file))


def _admin_key(file: Path | None) -> str:
    """Return the file's key; empty without a file."""
    if file is None:
        return ""
    try:
        key = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{file}: {error}") from None
    # It travels in a header and in a flag that is cut at colons and commas.
    if not key or not key.isascii() or not all(c.isalnum() or c in "-_." for c in key):
        raise LaunchError(f"{file}: a key is one or more of A-Z a-z 0-9 - _ .")
    return key


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    if certificate and key:
        return Tls(certificate, key, client_ca)
    if certificate or key or client_ca:
        raise LaunchError("--tls-certificate and --tls-key come together, before --tls-client-ca")
    return None


def _stop(number: int, frame: object) -> NoReturn:
    """Unwinds through `TritonServer`, which drains and ends; once is enough."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    with suppress(OSError):
        os.write(2, farewell(number).encode())
    raise SystemExit(0)
