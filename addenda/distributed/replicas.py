"""Serving on Ray Serve: replicas of the application, each of which follows the registry by itself."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from addenda.backbones import FrozenBackbone
from addenda.combined import numerics, numerics_fingerprint
from addenda.distributed.cluster import Workplace, check_shared, fetched
from addenda.exceptions import AddendaError, ExactnessError, KeyFileError
from addenda.registry import Registry
from addenda.serving.app import make_app
from addenda.serving.keys import KeyFile
from addenda.serving.server import CONNECTIONS, bind, keep_memory, log_as_json
from addenda.serving.service import Limits, Service

NAME = "addenda"
ROUTER = "ray.serve.experimental.round_robin_router:RoundRobinRouter"
"""In turn: by default the proxy fills the replicas of its own node before it thinks of others."""
EVERYWHERE = ("0.0.0.0", "::")
STOP_S = 30
"""Seconds that what was begun may still take when a replica is to stop."""
HEALTH_S = 2
"""Between questions whether a replica lives."""
UPSCALE_S = 10
"""Seconds of load after which there are more replicas."""
PATIENCE_S = 20
"""Seconds until it is said what is waited for."""


@dataclass(frozen=True)
class Serving:
    """What each replica serves, and with what; nothing that is open travels."""

    workplace: Workplace
    keys: Path  # at the same path on every node
    guarded: bool  # whether that file is there, so that a node without it lets nobody in
    loopback: bool  # whether the proxy is bound to one machine alone
    alias: str | None
    limits: Limits
    cpus: int  # of each replica, and threads on which it computes
    gpus: float  # a part of one lets several replicas share it
    log_level: str

    @contextmanager
    def opened(self) -> Iterator[tuple[Registry, FrozenBackbone, dict[str, Any]]]:
        """The registry, the backbone, and what bits depend on where it is opened."""
        torch.set_num_threads(self.cpus)
        with self.workplace.opened() as (registry, backbone):
            yield registry, backbone, numerics(backbone)


class Replica:
    """One replica: an application with a service of its own, which is there before a request comes."""

    def __init__(self, serving: Serving, expected: Mapping[str, Any]) -> None:
        log_as_json(serving.log_level)
        keep_memory()
        self._open = ExitStack()
        registry, backbone, found = self._open.enter_context(serving.opened())
        one, other = numerics_fingerprint(found), numerics_fingerprint(expected)
        if one != other:
            differing = [key for key in expected if found.get(key) != expected[key]]
            raise ExactnessError(
                f"A replica is refused: its numerics are {one[:12]}…, those of the first one {other[:12]}…, so its "
                f"answers would be other bytes. They differ in {', '.join(differing)}. Serve on nodes that are alike."
            )
        keys = KeyFile(serving.keys)
        if serving.guarded and not keys.guards:
            raise KeyFileError(
                f"The file of keys {str(serving.keys)!r} is not on this node: it must be on all of them."
            )
        self._made = make_app(
            lambda metrics: Service(backbone, registry, serving.alias, serving.limits, metrics.report),
            keys,
            serving.loopback,
        )

    def __serve_build_asgi_app__(self) -> object:
        return self._made

    def drain(self) -> None:
        """Says from now on that it is not ready, and still answers."""
        self._made.state.draining = True

    def __del__(self) -> None:
        self._open.close()


def serve_replicas(
    serving: Serving, host: str, port: int, replicas: tuple[int, int], drain_s: float, say: Callable[[str], None]
) -> None:
    """Serves on the cluster that this process is connected to, until SIGTERM or SIGINT; SIGHUP restarts the replicas.

    Ray Serve scales where the least and the most `replicas` differ. The head node's proxy answers on the address; on
    0.0.0.0 and :: one does on every node with a replica.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel("WARNING")
    with Registry.open(serving.workplace.registry, create=False) as registry:
        check_shared(registry)
        location = registry.location
    if serve.status().proxies:
        raise AddendaError("Ray Serve runs on this cluster already, with a port of its own. End it, or take another.")
    expected = _numerics_of_a_worker(serving, say)
    with bind(host, port) as listening:
        port = listening.getsockname()[1]
    serve.start(
        proxy_location="EveryNode" if host in EVERYWHERE else "HeadOnly", http_options={"host": host, "port": port}
    )
    try:
        target, what = _target(serving, expected, *replicas), f"Serving {location} on http://{host}:{port}"
        _serve_until_stopped(target, drain_s, say, what)
    finally:
        serve.delete(NAME)
        serve.shutdown()


def _numerics_of_a_worker(serving: Serving, say: Callable[[str], None]) -> dict[str, Any]:
    """Numerics of a worker with a replica's share; it finds too whether registry and backbone can be opened there."""
    import ray

    def find() -> dict[str, Any]:
        with serving.opened() as (_, _, found):
            return found

    finding = ray.remote(num_cpus=serving.cpus, num_gpus=serving.gpus, max_calls=1)(find).remote()
    if not ray.wait([finding], timeout=PATIENCE_S)[0]:
        say(f"Waiting for a node with {serving.cpus} CPUs and {serving.gpus:g} GPUs to spare.")
    found: dict[str, Any] = fetched(finding)
    return found


def _serve_until_stopped(target: Any, drain_s: float, say: Callable[[str], None], what: str) -> None:
    """Deploys the application, again on SIGHUP, and says how it goes, until it is told to stop and has drained."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    def deploy() -> None:
        serve.run_many([serve.RunTarget(target, NAME)], wait_for_applications_running=False)

    signals: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: signals.put(received))
    deploy()
    told: tuple[int, str] = (0, "")
    while True:
        running, why, failed = _state()
        if failed and not running:
            raise AddendaError(f"No replica can serve. {why}")
        if why not in ("", told[1]):
            say(why)
        if running != told[0]:
            say(f"{what} with {running} replica{'s' * (running != 1)}")
        told = running, why
        try:
            received = signals.get(timeout=1)
        except Empty:
            continue
        if received != signal.SIGHUP:
            break
        say("Restarting the replicas, one after another")
        deploy()
    say(f"Stopping: not ready any more, answering for {drain_s:g} s")
    if running:
        with suppress(TimeoutError, RayServeException):
            serve.get_app_handle(NAME).broadcast("drain").results(timeout_s=5, return_exceptions=True)
        with suppress(Empty):
            signals.get(timeout=drain_s)


def _target(serving: Serving, expected: Mapping[str, Any], least: int, most: int) -> Any:
    """The application as Ray Serve takes it."""
    from ray import serve

    scale: dict[str, Any] = {"num_replicas": least}
    if least != most:
        passes = 2 * expected["micro_batch"]  # the one that runs and the one that fills up meanwhile
        bounds = {"min_replicas": least, "max_replicas": most}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": passes, "upscale_delay_s": UPSCALE_S}}
    deployment: Any = serve.deployment(
        name=Replica.__name__,
        ray_actor_options={"num_cpus": serving.cpus, "num_gpus": serving.gpus},
        max_ongoing_requests=CONNECTIONS,
        max_queued_requests=CONNECTIONS,
        backpressure_config={"retry_after_s": 1},
        graceful_shutdown_timeout_s=STOP_S,
        health_check_period_s=HEALTH_S,
        request_router_config={"request_router_class": ROUTER},
        **scale,
    )
    return deployment(serve.ingress()(Replica)).bind(serving, expected)


def _state() -> tuple[int, str, bool]:
    """How many replicas serve, what Ray Serve says of them, and whether it has given up."""
    from ray import serve

    application = serve.status().applications[NAME]
    found = application.deployments.get(Replica.__name__)
    if found is None:
        return 0, "", False
    lines = [line.strip() for line in found.message.splitlines() if line.strip()]
    why = lines[-1].partition("Error: ")[2] or lines[-1] if lines else ""
    states: dict[Any, int] = found.replica_states  # whose keys are texts too
    return states.get("RUNNING", 0), why, application.status == "DEPLOY_FAILED"
