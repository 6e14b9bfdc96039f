"""What a task may be at most, so that nobody's bundle makes every answer slow, large, or no number at all."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from addenda.exceptions import RegistryError
from addenda.registry.objectives import probabilities
from addenda.registry.task import Task

LABELS, LABEL_CHARACTERS, LABELS_BYTES = 50_000, 1_000, 4_000_000
"""How many, of one, and of all together: they stand in answers."""
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


def check_labels(labels: Sequence[str]) -> None:
    """Raises RegistryError where labels are too long, or hold what no database or file of text can."""
    if len(labels) > LABELS:
        raise RegistryError(f"There are {len(labels):,} labels; {LABELS:,} is the most.")
    for label in labels:
        check_text(label, f"The label {label[:40]!r}")
        if not label:
            raise RegistryError("A label is empty: every class needs a name.")
        if len(label) > LABEL_CHARACTERS:
            raise RegistryError(
                f"The label {label[:40]!r}… has {len(label):,} characters; {LABEL_CHARACTERS:,} is the most."
            )
    if (together := sum(len(label.encode()) for label in labels)) > LABELS_BYTES:
        raise RegistryError(f"{len(labels):,} labels have {together:,} bytes together; {LABELS_BYTES:,} is the most.")


def check_text(text: str, what: str) -> str:
    """Returns a text that every database and file can hold; raises RegistryError for any other.

    Args:
        text: a person's.
        what: what it is, to begin the message.
    """
    if "\0" in text:
        raise RegistryError(f"{what} holds a NUL character, which PostgreSQL cannot keep: leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RegistryError(f"{what} is not UTF-8: {text[:40]!r}.") from error
    return text


def is_finite(logits: Float[Tensor, "*B C"], objective: str, temperature: float) -> bool:
    """Whether logits are numbers, and the probabilities that they stand for too."""
    return bool(logits.isfinite().all() and probabilities(logits, objective, temperature).isfinite().all())
