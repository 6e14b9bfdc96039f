"""Benchmarks, the demo, and the Avalanche strategy and metric."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from addenda.benchmarks.exactness import LogitBits
    from addenda.benchmarks.strategy import MaskedMemory

# A dependency of Avalanche warns at import about methods that are not used here.
warnings.filterwarnings("ignore", "no QP solver found")

__all__ = ["LogitBits", "MaskedMemory"]

_HOME = {"LogitBits": "addenda.benchmarks.exactness", "MaskedMemory": "addenda.benchmarks.strategy"}


def __getattr__(name: str) -> Any:
    """Imports Avalanche, which takes seconds, only when a name that needs it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'addenda.benchmarks' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}. Install Avalanche with: pip install 'addenda[bench]'") from error
