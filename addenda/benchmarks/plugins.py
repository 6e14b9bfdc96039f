"""Check of Avalanche plugins: `MaskedMemory` accepts observers and refuses plugins that change training."""

from __future__ import annotations

from typing import Any

from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import strategy_plugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.plugins.evaluation import EvaluationPlugin

from addenda.exceptions import DataError

LOOP = tuple(
    f"{when}_{what}"
    for what in ("training_epoch", "training_iteration", "forward", "backward", "update")
    for when in ("before", "after")
)
"""Hooks of Avalanche's training loop, which `MaskedMemory` does not run."""

BASES = tuple(vars(strategy_plugin).values())
"""Base classes of plugins."""


def check_plugin(plugin: Any) -> None:
    """Raises DataError if a plugin would change training or uses a hook that is never called."""
    if isinstance(plugin, EvaluationPlugin | Clock):
        return
    kind, name = type(plugin), type(plugin).__name__
    if any(base.__module__.startswith("avalanche.training.plugins.") and base not in BASES for base in kind.mro()):
        raise DataError(
            f"{name} changes how a strategy trains. MaskedMemory has its own training and does not forget earlier "
            "tasks; remove the plugin."
        )
    for hook in LOOP:
        if getattr(kind, hook, None) is not getattr(SupervisedPlugin, hook):
            raise DataError(
                f"{name} uses the hook `{hook}`, which MaskedMemory never calls because it does not run Avalanche's "
                "training loop; remove the plugin."
            )
