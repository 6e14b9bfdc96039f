"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.places import ROOT

# Before Ray is imported; otherwise it replaces 127.0.0.1 by a public address.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
NODE = {"num_cpus": 2, "node_ip_address": "127.0.0.1", "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, str]]:
    """A cluster of two nodes with two CPUs each, and its address; drivers connect to the head, which is the first."""
    utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the workers import the code under test
        patch.setenv("RAY_DISABLE_MEMORY_MONITOR", "1")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = utils.Cluster()
        try:
            for _ in range(2):
                made.add_node(**NODE)
            yield made, made.address
        finally:
            made.shutdown()
