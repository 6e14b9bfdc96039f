"""Serving: every task of a registry over HTTP, and the keys of those who may ask."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from addenda.commands.options import DEFAULT_REGISTRY, DeviceOption, JsonOption, RegistryOption, WeightsOption
from addenda.exceptions import AddendaError, KeyFileError

KeysOption = Annotated[Path, typer.Option("--keys", envvar="ADDENDA_KEYS", help="File of API keys.")]
DEFAULT_KEYS = Path("addenda-keys.json")

app = typer.Typer(no_args_is_help=True, help="API keys of the server.")


def serve(
    host: Annotated[str, typer.Option(help="Address to answer on; beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    alias: Annotated[str | None, typer.Option(help="Serve only versions that this alias points at.")] = None,
    keys: KeysOption = DEFAULT_KEYS,
    metrics_port: Annotated[int | None, typer.Option(help="Answer Prometheus on this port, without a key.")] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Images that may wait; more are told to come again.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for an answer, at most.")] = 30.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to answer on, unready, when told to stop.")] = 5.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    registry: RegistryOption = DEFAULT_REGISTRY,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Answers every task over HTTP, and takes in new ones while it runs; stop it with SIGTERM or Ctrl-C."""
    try:
        from addenda.serving.access import LOOPBACK
        from addenda.serving.app import make_app
        from addenda.serving.server import Server, bind, log_as_json, serve_metrics
    except ImportError as error:
        raise AddendaError(f"Serving needs {error.name}: pip install 'addenda[serve]'.") from error
    from addenda import Registry
    from addenda.combined import recorded_backbone
    from addenda.serving.keys import KeyFile
    from addenda.serving.service import Limits, Service

    if log_level not in ("debug", "info", "warning", "error"):
        raise AddendaError(f"There is no log level {log_level!r}: debug, info, warning or error.")
    known = KeyFile(keys)
    if host not in LOOPBACK and not known.keys():
        raise KeyFileError(
            f"Without keys, answering on {host!r} would let everybody in. Make one: addenda keys create NAME "
            f"--keys {keys}"
        )
    log_as_json(log_level)
    with Registry.open(registry, create=False) as opened, bind(host, port) as listening:
        loaded = recorded_backbone(opened, weights, device)
        limits = Limits(waiting=max_waiting, timeout_s=timeout)
        made = make_app(
            lambda metrics: Service(loaded, opened, alias, limits, metrics.report),
            known,
            loopback=host in LOOPBACK,
        )
        if metrics_port is not None:
            serve_metrics(made, host, metrics_port)
        address, found_port = listening.getsockname()[:2]
        typer.echo(f"Serving {opened.location} on http://{address}:{found_port}", err=True)
        server = Server(made, listening, drain, stop_s=30)
        server.run_until_stopped()
        if not server.started:
            sys.exit(1)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Who holds it.")],
    scope: Annotated[str, typer.Option(help="predict, register or admin; each allows what those before it do.")],
    keys: KeysOption = DEFAULT_KEYS,
) -> None:
    """Makes a key and prints it, this once."""
    from addenda.serving.keys import KeyFile

    typer.echo(KeyFile(keys).create(name, scope))
    typer.echo(f"Only its SHA-256 is kept, in {keys}. A server that runs with keys takes it from now on.", err=True)


@app.command("list")
def list_(keys: KeysOption = DEFAULT_KEYS, as_json: JsonOption = False) -> None:
    """Lists the keys."""
    from addenda.serving.keys import KeyFile
    from addenda.terminal import console, print_json, table

    found = KeyFile(keys).keys()
    if as_json:
        print_json([{"name": key.name, "scope": key.scope, "created_at": key.created_at} for key in found])
        return
    rows = [(key.name, key.scope, key.created_at[:16].replace("T", " ")) for key in found]
    console.print(table(f"Keys in {keys}", ("name", "scope", "created"), rows))


@app.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="Whose key.")], keys: KeysOption = DEFAULT_KEYS) -> None:
    """Takes a key away; a running server refuses it from the next request on."""
    from addenda.serving.keys import KeyFile

    KeyFile(keys).revoke(name)
    typer.echo(f"The key of {name!r} counts no more.")
