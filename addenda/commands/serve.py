"""The `serve` command, and the `keys` commands for the API keys of its clients."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from addenda.commands import options
from addenda.exceptions import AddendaError, KeyFileError
from addenda.files import expanded
from addenda.terminal import minute, print_result, table

KeysOption = Annotated[
    Path, Option("--keys", envvar="ADDENDA_KEYS", help="JSON file of API keys; `addenda keys` writes it.")
]
DEFAULT_KEYS = Path("addenda-keys.json")

app = typer.Typer(no_args_is_help=True, help="API keys for the server.")


def serve(
    host: Annotated[
        str, Option(help="Address to listen on; any but 127.0.0.1, ::1 and localhost requires API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
    alias: Annotated[
        str | None,
        Option(help="Serve only the versions that this alias points at. Default: the newest version of each task."),
    ] = None,
    keys: KeysOption = DEFAULT_KEYS,
    metrics_port: Annotated[
        int | None,
        Option(
            min=0,
            max=65535,
            help="Port on --host for Prometheus metrics, without API key; not with --ray. Default: none.",
        ),
    ] = None,
    max_waiting: Annotated[
        int,
        Option(
            min=1, help="Images queued or being computed, at most; beyond it the server answers 503 with Retry-After."
        ),
    ] = 256,
    cache_mb: Annotated[
        float,
        Option(
            min=0,
            callback=options.finite,
            help="Memory in MB for outputs of images that may be sent again; 0 caches nothing.",
        ),
    ] = 0,
    timeout: Annotated[float, Option(min=0.001, callback=options.finite, help="Request timeout in seconds.")] = 30.0,
    drain: Annotated[
        float,
        Option(
            min=0,
            callback=options.finite,
            help="Drain time in seconds after SIGTERM: requests are served while /readyz answers 503.",
        ),
    ] = 5.0,
    workers: Annotated[
        int,
        Option(
            min=0,
            max=64,
            help="Processes that accept connections and decode images beside the one that computes; not with --ray "
            "or --cache-mb. 0: one process for all.",
        ),
    ] = 0,
    log_level: Annotated[str, Option(help="Log level: debug, info, warning or error.")] = "info",
    registry: options.Registry = options.DEFAULT_REGISTRY,
    backbone: Annotated[
        str | None, Option(help="Backbone of the registry, by its name or its fingerprint. Default: the only one.")
    ] = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
    ray: Annotated[
        str | None, Option(help=f"Serve replicas on a Ray cluster: {options.RAY} Default: one process, without Ray.")
    ] = None,
    replicas: Annotated[int | None, Option(min=1, help="With --ray: number of replicas. Default: 1.")] = None,
    min_replicas: Annotated[
        int | None, Option(min=1, help="With --ray and --max-replicas: minimum number of replicas. Default: 1.")
    ] = None,
    max_replicas: Annotated[
        int | None,
        Option(min=1, help="With --ray: scale with the load up to this number of replicas. Default: no scaling."),
    ] = None,
    cpus: Annotated[
        int | None, Option(min=1, help="With --ray: CPUs, and so threads, per replica. Default: 1.")
    ] = None,
    gpus: Annotated[
        float | None,
        Option(min=0, callback=options.finite, help="With --ray: GPUs per replica; may be a fraction. Default: 0."),
    ] = None,
) -> None:
    """Serves every task over HTTP and picks up new tasks while it runs; stop it with SIGTERM or Ctrl-C."""
    try:
        from addenda.serving.routes import LOOPBACK
        from addenda.serving.server import STOP_S, Server, bind, keep_memory, log_as_json, make_app, serve_metrics
        from addenda.serving.supervisor import Supervisor, WorkerSettings
    except ImportError as error:
        raise AddendaError(f"Serving requires {error.name}: pip install 'addenda[serve]'.") from error
    from addenda.combined import recorded_backbone
    from addenda.serving.keys import KeyFile
    from addenda.serving.model_thread import ModelThread
    from addenda.serving.service import Limits, Service

    ray_options = {
        "--replicas": replicas, "--min-replicas": min_replicas, "--max-replicas": max_replicas, "--cpus": cpus,
        "--gpus": gpus,
    }  # fmt: skip
    for option, value in ray_options.items():
        if value is not None and ray is None:
            raise AddendaError(f"{option} requires --ray.")
    if log_level not in ("debug", "info", "warning", "error"):
        raise AddendaError(f"--log-level must be debug, info, warning or error, not {log_level!r}.")
    key_file = KeyFile(keys)
    if host not in LOOPBACK and not key_file.keys():
        raise KeyFileError(
            f"Listening on {host!r} requires API keys, and {str(keys)!r} has none. Create one: addenda keys create "
            f"NAME --scope predict --keys {keys}"
        )
    if workers and cache_mb:
        raise AddendaError("--cache-mb cannot be used with --workers: the cache is of the process that decodes images.")
    limits = Limits(waiting_images=max_waiting, timeout_s=timeout, cache_bytes=int(cache_mb * 1e6))
    if ray is not None:
        if metrics_port is not None:
            raise AddendaError(
                "--metrics-port cannot be used with --ray; docs/scale.md describes the metrics of replicas."
            )
        if workers:
            raise AddendaError("--workers cannot be used with --ray; use --replicas.")
        from addenda.distributed.cluster import Workplace, connected
        from addenda.distributed.replicas import Serving, serve_replicas

        scale = _scale(replicas, min_replicas, max_replicas)
        location = registry if "://" in registry else str(expanded(registry).resolve())
        weights_file = None if weights is None else str(weights.resolve())
        serving = Serving(
            Workplace(location, backbone, weights_file, device), keys.resolve(), key_file.guards,
            host in LOOPBACK, alias, limits, cpus or 1, gpus or 0, log_level,
        )  # fmt: skip
        with connected(ray):
            serve_replicas(serving, host, port, scale, drain, lambda line: typer.echo(line, err=True))
        return
    log_as_json(log_level)
    keep_memory()
    with options.open_registry(registry) as opened, bind(host, port) as listening, ExitStack() as stack:
        model_thread = ModelThread.of_process()
        loaded = recorded_backbone(opened, weights, device, backbone)
        app = make_app(
            lambda: Service(loaded, opened, alias, limits, model_thread), key_file, loopback=host in LOOPBACK
        )
        notes = [] if alias is None else [f"only the versions of alias {alias!r}"]
        if metrics_port is not None:
            notes.append(f"metrics on port {serve_metrics(app, host, metrics_port)}")
        address, bound_port = listening.getsockname()[:2]
        url, notes_line = f"http://{address}:{bound_port}", f" ({'; '.join(notes)})" if notes else ""

        def say(line: str) -> None:
            typer.echo(line)  # standard error is the log, JSON in every line
            sys.stdout.flush()

        say(f"Listening on {url} while {opened.location} is loaded")
        settings = WorkerSettings(
            workers, loaded.name, loaded.preprocessing, limits, str(keys), host in LOOPBACK, log_level, STOP_S
        )
        supervisor = stack.enter_context(Supervisor(app, settings, listening)) if workers else None
        server = Server(app, drain, STOP_S, supervisor, lambda: say(f"Serving {opened.location} on {url}{notes_line}"))
        server.run([listening])
        if not server.started:
            sys.exit(1)


def _scale(replicas: int | None, least: int | None, most: int | None) -> tuple[int, int]:
    """The minimum and maximum number of replicas."""
    if least is None and most is None:
        return replicas or 1, replicas or 1
    if replicas is not None or most is None or (least or 1) > most:
        raise AddendaError("Give --replicas N, or --min-replicas A and --max-replicas B with A <= B.")
    return least or 1, most


@app.command("create")
def create(
    name: Annotated[str, Argument(help="Name of the key, such as its holder's.")],
    scope: Annotated[str, Option(help="Scope: predict, register or admin; each includes the scopes before it.")],
    keys: KeysOption = DEFAULT_KEYS,
) -> None:
    """Creates a key and prints it; it cannot be printed again.

    A new key file can be read by its creator only: run this as the server's user.
    """
    from addenda.serving.keys import KeyFile

    typer.echo(KeyFile(keys).create(name, scope))
    typer.echo(
        f"Only its SHA-256 is stored, in {keys}. Servers that use this file accept the key from now on, and require a "
        "key from every client.",
        err=True,
    )


@app.command("list")
def list_(keys: KeysOption = DEFAULT_KEYS, as_json: options.Json = False) -> None:
    """Lists the keys."""
    from addenda.serving.keys import KeyFile

    listed = KeyFile(keys).keys()
    values = [{"name": key.name, "scope": key.scope, "created_at": key.created_at} for key in listed]
    rows = [(key.name, key.scope, minute(key.created_at)) for key in listed]
    print_result(as_json, values, table(f"Keys in {keys}", ("name", "scope", "created"), rows))


@app.command("revoke")
def revoke(name: Annotated[str, Argument(help="Name of the key.")], keys: KeysOption = DEFAULT_KEYS) -> None:
    """Revokes a key; a running server rejects it from the next request on."""
    from addenda.serving.keys import KeyFile

    KeyFile(keys).revoke(name)
    typer.echo(f"Revoked key {name!r}.")
