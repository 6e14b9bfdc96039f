"""Connection to a Ray cluster, and the registry and backbone that each worker opens."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from addenda.backbones import FrozenBackbone
from addenda.combined import recorded_backbone
from addenda.exceptions import AddendaError, RegistryError
from addenda.registry import Registry

LOCAL = "local"
"""Address that starts a cluster on this machine alone; it ends with the process."""
NAMESPACE = "addenda"
TIMEOUT_S = 5
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""If this variable is 0, Ray uses 127.0.0.1 as given on every system; otherwise it replaces it by a public address."""


@dataclass(frozen=True)
class Workplace:
    """What every worker opens for itself: locations only, because open handles cannot be sent to it."""

    registry: str = field(repr=False)  # its location: a URL may hold a password
    backbone: str | None = None  # name or fingerprint of a backbone in the registry; None: the only one there
    weights: str | None = None  # a file at the same path on every node; None: as recorded in the registry
    device: str = "auto"

    @contextmanager
    def opened(self) -> Iterator[tuple[Registry, FrozenBackbone]]:
        """Opens the registry and loads the backbone."""
        with Registry.open(self.registry, create=False) as registry:
            yield registry, recorded_backbone(registry, self.weights, self.device, self.backbone)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects to a cluster: `local` starts one on this machine, `auto` uses the one running here; or HOST:PORT."""
    if address.startswith("ray://"):
        raise AddendaError(
            f"{address!r} is a Ray Client address, which is not supported; use 'auto' on a cluster node."
        )
    if address == LOCAL:
        os.environ[LOOPBACK_ONLY] = "0"
    try:
        import ray
    except ImportError as error:
        raise AddendaError(f"Ray is not installed; run: pip install 'addenda[ray]' ({error}).") from error
    options: dict[str, Any] = {}
    if address == LOCAL:
        options = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        _check_reachable(address)
    with redirect_stdout(sys.stderr):  # Ray prints about lost workers until it ends; standard output is the command's
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, **options)
        try:
            yield
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises AddendaError if nothing listens at the address; Ray itself would retry for minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        host_port = canonicalize_bootstrap_address(address)
        if host_port is None:
            raise ConnectionError("no cluster runs on this machine")
        host, _, port = host_port.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise AddendaError(
            f"No Ray cluster is reachable at {address!r}: {error}. Start one (`ray start --head`), or pass --ray local."
        ) from error


def check_shared(registry: Registry) -> None:
    """Raises RegistryError if the registry is a file and the cluster has several machines."""
    import ray

    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) > 1 and not registry.location.startswith("postgresql"):
        raise RegistryError(
            f"The registry {registry.location!r} is a file, which the {len(hosts)} machines of this cluster do not "
            "share. Use PostgreSQL: `addenda db backup FILE`, then `addenda db restore FILE --registry URL`."
        )


def worker_capacity(what: str, cpus: int, gpus: float) -> int:
    """How many workers the nodes can hold at once, given the CPUs and (possibly fractional) GPUs of each.

    Raises AddendaError if there is room for none, which would wait forever; the message calls a worker `what`.
    """
    import ray

    nodes, capacity = [node["Resources"] for node in ray.nodes() if node["Alive"]], 0
    for node in nodes:
        fits = node.get("CPU", 0) / cpus
        capacity += int(min(fits, node.get("GPU", 0) / gpus + 1e-6) if gpus else fits)
    if not capacity:
        resources = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
        raise AddendaError(
            f"A {what} needs {cpus} CPUs and {gpus:g} GPUs of one node; the nodes have {resources}. Lower --cpus or "
            "--gpus."
        )
    return capacity


def fetch(reference: Any) -> Any:
    """Returns the result of a Ray task; re-raises an AddendaError as itself, without Ray's wrapper."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AddendaError):
            raise error.cause from None
        raise
