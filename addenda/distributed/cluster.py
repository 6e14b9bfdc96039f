"""The way to a Ray cluster, and what each of its workers opens for itself."""

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
"""The address that starts a cluster of this machine alone, which ends with the process."""
NAMESPACE = "addenda"
TIMEOUT_S = 5
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""With 0 in this variable Ray takes 127.0.0.1 as it is on every system; else it takes a public address for it."""


@dataclass(frozen=True)
class Workplace:
    """What every worker opens for itself; nothing that is open travels."""

    registry: str = field(repr=False)  # its location: a URL may hold a password
    backbone: str | None = None  # fingerprint of one that the registry has recorded; None means its only one
    weights: str | None = None  # a file, at the same path on every node; None takes what the registry recorded
    device: str = "auto"

    @contextmanager
    def opened(self) -> Iterator[tuple[Registry, FrozenBackbone]]:
        """The registry and the backbone."""
        with Registry.open(self.registry, create=False) as registry:
            yield registry, recorded_backbone(registry, self.weights, self.device, self.backbone)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a cluster: `local` starts one here alone, `auto` is one that runs here; or HOST:PORT."""
    if address.startswith("ray://"):
        raise AddendaError(f"{address!r} is Ray's client, which cannot do all of this: run on a node, with 'auto'.")
    if address == LOCAL:
        os.environ[LOOPBACK_ONLY] = "0"
    try:
        import ray
    except ImportError as error:
        raise AddendaError(f"Ray is needed: pip install 'addenda[ray]' ({error}).") from error
    started: dict[str, Any] = {}
    if address == LOCAL:
        started = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        _check_answers(address)
    with redirect_stdout(sys.stderr):  # where Ray tells of lost workers, to its end: standard output is the command's
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, **started)
        try:
            yield
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises AddendaError where nothing listens at an address: Ray itself would try for minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address(address)
        if found is None:
            raise ConnectionError("none runs on this machine")
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise AddendaError(f"No Ray cluster answers at {address!r}: {error}.") from error


def check_shared(registry: Registry) -> None:
    """Raises a RegistryError where a registry in a file cannot be seen by all nodes of the cluster."""
    import ray

    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) > 1 and not registry.location.startswith("postgresql"):
        raise RegistryError(
            f"The registry {registry.location!r} is a file, which the {len(hosts)} machines of this cluster do not "
            "share: use PostgreSQL (addenda db restore copies it there)."
        )


def room(cpus: int, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs, or a part of one, the nodes have room for together."""
    import ray

    found = 0
    for held in (node["Resources"] for node in ray.nodes() if node["Alive"]):
        fits = held.get("CPU", 0) / cpus
        found += int(min(fits, held.get("GPU", 0) / gpus + 1e-6) if gpus else fits)
    return found


def fetched(answer: Any) -> Any:
    """What a Ray task gives; an error of ours that it met is raised as it was there, not wrapped in Ray's."""
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AddendaError):
            raise error.cause from None
        raise
