"""Serving on Ray Serve: replicas of the application, each following the registry independently."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from addenda.backbones import FrozenBackbone
from addenda.combined import numerics, numerics_fingerprint
from addenda.distributed.cluster import Workplace, check_shared, fetch
from addenda.exceptions import AddendaError, ExactnessError, KeyFileError
from addenda.registry import Registry
from addenda.serving.keys import KeyFile
from addenda.serving.model_thread import ModelThread
from addenda.serving.server import CONNECTIONS, bind, keep_memory, log_as_json, make_app
from addenda.serving.service import Limits, Service

NAME = "addenda"
ROUTER = "ray.serve.experimental.round_robin_router:RoundRobinRouter"
"""Round robin; the default router fills the replicas on the proxy's own node first."""
EVERYWHERE = ("0.0.0.0", "::")
STOP_S = 30
"""Seconds that requests in progress may still take when a replica stops."""
HEALTH_S = 2
"""Seconds between health checks of a replica."""
UPSCALE_S = 10
"""Seconds of load before replicas are added."""
PATIENCE_S = 20
"""Seconds of waiting for a node before a message says so."""


@dataclass(frozen=True)
class Serving:
    """The settings of every replica; picklable, so without open handles."""

    workplace: Workplace
    keys: Path  # at the same path on every node
    require_keys: bool  # whether the key file exists, so that a node without it refuses to start a replica
    loopback: bool  # whether the proxy listens on loopback only
    alias: str | None
    limits: Limits
    cpus: int  # of each replica, and its threads
    gpus: float  # of each replica; below 1 several share a GPU
    log_level: str

    @contextmanager
    def opened(self) -> Iterator[tuple[Registry, FrozenBackbone, ModelThread, dict[str, Any]]]:
        """Opens the registry, the backbone and the thread of the model, and describes its numerics."""
        model_thread = ModelThread.of_process(self.cpus)
        with self.workplace.opened() as (registry, backbone):
            yield registry, backbone, model_thread, model_thread.run(numerics, backbone).result()


class Replica:
    """One replica: an application with its own service, started before its first request."""

    def __init__(self, serving: Serving, expected: Mapping[str, Any]) -> None:
        log_as_json(serving.log_level)
        keep_memory()
        self._open = ExitStack()
        registry, backbone, model_thread, described = self._open.enter_context(serving.opened())
        fingerprint, wanted = numerics_fingerprint(described), numerics_fingerprint(expected)
        if fingerprint != wanted:
            differing = [key for key in expected if described.get(key) != expected[key]]
            raise ExactnessError(
                f"A replica was refused: its numerics fingerprint is {fingerprint[:12]}…, the deployment's is "
                f"{wanted[:12]}…, so its outputs would differ in bits. They differ in {', '.join(differing)}. Serve on "
                "nodes of one kind."
            )
        keys = KeyFile(serving.keys)
        if serving.require_keys and not keys.guards:
            raise KeyFileError(
                f"The key file {str(serving.keys)!r} does not exist on this node; it must be on every node."
            )

        def start() -> Service:
            return Service(backbone, registry, serving.alias, serving.limits, model_thread)

        self._app = make_app(start, keys, serving.loopback)

    def __serve_build_asgi_app__(self) -> object:
        return self._app

    def drain(self) -> None:
        """Reports not ready from now on, and still serves requests."""
        self._app.state.draining = True

    def __del__(self) -> None:
        self._open.close()


def serve_replicas(
    serving: Serving, host: str, port: int, replicas: tuple[int, int], drain_s: float, say: Callable[[str], None]
) -> None:
    """Serves on the cluster that this process is connected to, until SIGTERM or SIGINT; SIGHUP restarts the replicas.

    `replicas` are the minimum and maximum; Ray Serve autoscales if they differ. The head node's proxy listens on the
    address; with 0.0.0.0 or ::, a proxy listens on every node with a replica.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel("WARNING")
    with Registry.open(serving.workplace.registry, create=False) as registry:
        check_shared(registry)
        location = registry.location
    if serve.status().proxies:
        raise AddendaError("Ray Serve is already running on this cluster; shut it down, or use another cluster.")
    expected = _worker_numerics(serving, say)
    with bind(host, port) as listening:
        port = listening.getsockname()[1]
    serve.start(
        proxy_location="EveryNode" if host in EVERYWHERE else "HeadOnly", http_options={"host": host, "port": port}
    )
    try:
        target, status = _target(serving, expected, *replicas), f"Serving {location} on http://{host}:{port}"
        _serve_until_stopped(target, drain_s, say, status)
    finally:
        serve.delete(NAME)
        serve.shutdown()


def _worker_numerics(serving: Serving, say: Callable[[str], None]) -> dict[str, Any]:
    """The numerics of a worker with a replica's resources; fails if it cannot open the registry and the backbone."""
    import ray

    def describe() -> dict[str, Any]:
        with serving.opened() as (*_, described):
            return described

    reference = ray.remote(num_cpus=serving.cpus, num_gpus=serving.gpus, max_calls=1)(describe).remote()
    if not ray.wait([reference], timeout=PATIENCE_S)[0]:
        say(f"Waiting for a node with {serving.cpus} free CPUs and {serving.gpus:g} free GPUs.")
    described: dict[str, Any] = fetch(reference)
    return described


def _serve_until_stopped(target: Any, drain_s: float, say: Callable[[str], None], status: str) -> None:
    """Deploys the application, redeploys it on SIGHUP, and reports its state; drains on SIGTERM or SIGINT."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    def deploy() -> None:
        serve.run_many([serve.RunTarget(target, NAME)], wait_for_applications_running=False)

    signals: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: signals.put(received))
    deploy()
    reported: tuple[int, str] = (0, "")
    while True:
        running, problem, failed = _state()
        if failed and not running:
            raise AddendaError(f"No replica could be started. {problem}")
        if problem not in ("", reported[1]):
            say(problem)
        if running != reported[0]:
            say(f"{status} with {running} replica{'s' * (running != 1)}")
        reported = running, problem
        try:
            received = signals.get(timeout=1)
        except Empty:
            continue
        if received != signal.SIGHUP:
            break
        say("Restarting the replicas, one at a time")
        deploy()
    say(f"Draining for {drain_s:g} s: requests are served while /readyz answers 503")
    if running:
        with suppress(TimeoutError, RayServeException):
            serve.get_app_handle(NAME).broadcast("drain").results(timeout_s=5, return_exceptions=True)
        with suppress(Empty):
            signals.get(timeout=drain_s)


def _target(serving: Serving, expected: Mapping[str, Any], minimum: int, maximum: int) -> Any:
    """The application as Ray Serve deploys it."""
    from ray import serve

    scale: dict[str, Any] = {"num_replicas": minimum}
    if minimum != maximum:
        target_requests = 2 * expected["micro_batch"]  # the batch that runs and the one that fills meanwhile
        scale = {"autoscaling_config": {
            "min_replicas": minimum, "max_replicas": maximum,
            "target_ongoing_requests": target_requests, "upscale_delay_s": UPSCALE_S,
        }}  # fmt: skip
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
    """Number of running replicas, Ray Serve's message about the others, and whether the deployment failed."""
    from ray import serve

    application = serve.status().applications[NAME]
    deployment = application.deployments.get(Replica.__name__)
    if deployment is None:
        return 0, "", False
    lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
    problem = lines[-1].partition("Error: ")[2] or lines[-1] if lines else ""
    states: dict[Any, int] = deployment.replica_states  # its enum keys equal strings
    return states.get("RUNNING", 0), problem, application.status == "DEPLOY_FAILED"
