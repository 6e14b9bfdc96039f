"""Avalanche's plugins: which may look on while `MaskedMemory` learns, and which would change how a strategy trains."""

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
"""Hooks of Avalanche's own training loop, which is not run here."""

BASES = tuple(vars(strategy_plugin).values())
"""What plugins are made from."""


def check_plugin(plugin: Any) -> None:
    """Raises DataError for a plugin that would change how a strategy trains, or waits for what never comes."""
    if isinstance(plugin, EvaluationPlugin | Clock):
        return
    kind, named = type(plugin), type(plugin).__name__
    if any(one.__module__.startswith("avalanche.training.plugins.") and one not in BASES for one in kind.mro()):
        raise DataError(
            f"{named} changes how a strategy trains, and MaskedMemory trains in one way of its own: earlier tasks "
            "cannot be forgotten. Leave it out."
        )
    for hook in LOOP:
        if getattr(kind, hook, None) is not getattr(SupervisedPlugin, hook):
            raise DataError(
                f"{named} waits for `{hook}`, which never comes: MaskedMemory's learner has no epochs, iterations or "
                "backward passes of Avalanche's. Leave it out."
            )
