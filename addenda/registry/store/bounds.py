"""What a task may be at most, so that nobody's bundle makes every answer slow, large, or no number at all."""

from __future__ import annotations

from addenda.exceptions import RegistryError
from addenda.registry.store.names import check_labels
from addenda.registry.store.task import Task

MEMORY_TOKENS, RANK, ANCESTORS = 1024, 256, 256
"""Of one task; and how many others it may see: the arithmetic of an answer grows with each."""
TEMPERATURES = (1e-6, 1e6)


def check_bounds(task: Task) -> None:
    """Raises RegistryError where a task is more than one may be; tasks from before stay as they are."""
    check_labels(task.labels)
    found = {
        "memory tokens in a layer": (task.num_memory_tokens, MEMORY_TOKENS),
        "as the rank of its adapters": (task.adapter_rank, RANK),
        "tasks that it sees": (len(task.closure), ANCESTORS),
    }
    for what, (count, most) in found.items():
        if count > most:
            raise RegistryError(f"Task {task.ref!r} has {count:,} {what}; {most:,} is the most.")
    least, most_temperature = TEMPERATURES
    if not least <= task.temperature <= most_temperature:
        raise RegistryError(
            f"Task {task.ref!r} has the temperature {task.temperature:g}; it may be from {least:g} to "
            f"{most_temperature:g}."
        )
