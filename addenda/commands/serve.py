"""Serving: every task of a registry over HTTP, and the keys of those who may ask."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from addenda.commands import options
from addenda.exceptions import AddendaError, KeyFileError
from addenda.terminal import answer, minute, table

KeysOption = Annotated[Path, Option("--keys", envvar="ADDENDA_KEYS", help="File of API keys.")]
DEFAULT_KEYS = Path("addenda-keys.json")

app = typer.Typer(no_args_is_help=True, help="API keys of the server.")


def serve(
    host: Annotated[str, Option(help="Address to answer on; beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    alias: Annotated[str | None, Option(help="Serve only versions that this alias points at.")] = None,
    keys: KeysOption = DEFAULT_KEYS,
    metrics_port: Annotated[
        int | None, Option(min=0, max=65535, help="Answer Prometheus on this port, without a key.")
    ] = None,
    max_waiting: Annotated[int, Option(min=1, help="Images that may wait; more are told to come again.")] = 256,
    timeout: Annotated[float, Option(min=0.001, help="Seconds for an answer, at most.")] = 30.0,
    drain: Annotated[float, Option(min=0, help="Seconds to answer on, unready, when told to stop.")] = 5.0,
    log_level: Annotated[str, Option(help="debug, info, warning or error.")] = "info",
    registry: options.Registry = options.DEFAULT_REGISTRY,
    weights: options.Weights = None,
    device: options.Device = "auto",
    ray: Annotated[str | None, Option(help="Serve replicas on a Ray cluster: local, auto or HOST:PORT.")] = None,
    replicas: Annotated[int | None, Option(min=1, help="How many, with --ray. Default: 1.")] = None,
    min_replicas: Annotated[int | None, Option(min=1, help="As many as the load needs, at least.")] = None,
    max_replicas: Annotated[int | None, Option(min=1, help="As many as the load needs, at most.")] = None,
    cpus: Annotated[int | None, Option(min=1, help="CPUs and threads of a replica. Default: 1.")] = None,
    gpus: Annotated[float | None, Option(min=0, help="GPUs of a replica, or a part of one. Default: 0.")] = None,
) -> None:
    """Answers every task over HTTP, and takes in new ones while it runs; stop it with SIGTERM or Ctrl-C."""
    try:
        from addenda.serving.access import LOOPBACK
        from addenda.serving.app import make_app
        from addenda.serving.server import Server, bind, keep_memory, log_as_json, serve_metrics
    except ImportError as error:
        raise AddendaError(f"Serving needs {error.name}: pip install 'addenda[serve]'.") from error
    from addenda.combined import recorded_backbone
    from addenda.serving.keys import KeyFile
    from addenda.serving.service import Limits, Service

    of_ray = {"--replicas": replicas, "--min-replicas": min_replicas, "--max-replicas": max_replicas, "--cpus": cpus}
    for option, value in (of_ray | {"--gpus": gpus}).items():
        if value is not None and ray is None:
            raise AddendaError(
                f"{option} is for replicas on a Ray cluster: say where with --ray local, auto or HOST:PORT."
            )
    if log_level not in ("debug", "info", "warning", "error"):
        raise AddendaError(f"There is no log level {log_level!r}: debug, info, warning or error.")
    known = KeyFile(keys)
    if host not in LOOPBACK and not known.keys():
        raise KeyFileError(
            f"Without keys, answering on {host!r} would let everybody in. Make one: addenda keys create NAME "
            f"--scope predict --keys {keys}"
        )
    limits = Limits(waiting=max_waiting, timeout_s=timeout)
    if ray is not None:
        if metrics_port is not None:
            raise AddendaError(
                "--metrics-port is one process's: leave it out with --ray (docs/scale.md says what there is)."
            )
        from addenda.distributed.cluster import Workplace, connected
        from addenda.distributed.replicas import Serving, serve_replicas

        scale = _scale(replicas, min_replicas, max_replicas)
        place = registry if "://" in registry else str(Path(registry).expanduser().resolve())
        found = None if weights is None else str(weights.resolve())
        serving = Serving(
            Workplace(place, weights=found, device=device), keys.resolve(), known.guards, host in LOOPBACK, alias,
            limits, cpus or 1, gpus or 0, log_level,
        )  # fmt: skip
        with connected(ray):
            serve_replicas(serving, host, port, scale, drain, lambda line: typer.echo(line, err=True))
        return
    log_as_json(log_level)
    keep_memory()
    with options.open_registry(registry) as opened, bind(host, port) as listening:
        loaded = recorded_backbone(opened, weights, device)
        made = make_app(
            lambda metrics: Service(loaded, opened, alias, limits, metrics.report), known, loopback=host in LOOPBACK
        )
        also = [] if alias is None else [f"only what {alias!r} points at"]
        if metrics_port is not None:
            also.append(f"metrics on port {serve_metrics(made, host, metrics_port)}")
        address, found_port = listening.getsockname()[:2]
        more = f" ({'; '.join(also)})" if also else ""
        line = f"Serving {opened.location} on http://{address}:{found_port}"
        typer.echo(f"{line}{more}")  # on standard output: the other one is the log, JSON in every line
        sys.stdout.flush()
        logging.getLogger(__name__).info("%s as generation %d", line, opened.generation)
        server = Server(made, listening, drain, stop_s=30)
        server.run_until_stopped()
        if not server.started:
            sys.exit(1)


def _scale(replicas: int | None, least: int | None, most: int | None) -> tuple[int, int]:
    """How many replicas at least and at most."""
    if least is None and most is None:
        return replicas or 1, replicas or 1
    if replicas is not None or most is None or (least or 1) > most:
        raise AddendaError("Give --replicas N, or else --min-replicas A and --max-replicas B with A at most B.")
    return least or 1, most


@app.command("create")
def create(
    name: Annotated[str, Argument(help="Who holds it.")],
    scope: Annotated[str, Option(help="predict, register or admin; each allows what those before it do.")],
    keys: KeysOption = DEFAULT_KEYS,
) -> None:
    """Makes a key and prints it, this once."""
    from addenda.serving.keys import KeyFile

    typer.echo(KeyFile(keys).create(name, scope))
    typer.echo(
        f"Only its SHA-256 is kept, in {keys}. A server with these keys takes it from now on, and asks "
        "everybody for one.",
        err=True,
    )


@app.command("list")
def list_(keys: KeysOption = DEFAULT_KEYS, as_json: options.Json = False) -> None:
    """Lists the keys."""
    from addenda.serving.keys import KeyFile

    found = KeyFile(keys).keys()
    rows = [(key.name, key.scope, minute(key.created_at)) for key in found]
    shown = table(f"Keys in {keys}", ("name", "scope", "created"), rows)
    answer(as_json, [{"name": key.name, "scope": key.scope, "created_at": key.created_at} for key in found], shown)


@app.command("revoke")
def revoke(name: Annotated[str, Argument(help="Whose key.")], keys: KeysOption = DEFAULT_KEYS) -> None:
    """Takes a key away; a running server refuses it from the next request on."""
    from addenda.serving.keys import KeyFile

    KeyFile(keys).revoke(name)
    typer.echo(f"The key of {name!r} counts no more.")
