"""Golden probes: a task's logits on fixed images, made at registration and recomputed by `verify`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined.model import CombinedModel
from addenda.combined.numerics import (
    NUM_PROBES,
    numerics,
    numerics_fingerprint,
    probe_images,
    tensor_digest,
)
from addenda.exceptions import IntegrityError
from addenda.registry import Golden, Task

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""What max |difference| / max |logit| may be under another numerics fingerprint; the bfloat16 bound is provisional."""


@dataclass(frozen=True)
class Verdict:
    """What became of one task's golden probe.

    Attributes:
        task: its reference.
        ok: digests equal under the same numerics fingerprint, or within tolerance under another.
        same_numerics: whether the fingerprint is the one that the golden probe was made under.
        identical: whether the logits are equal, byte for byte.
        max_difference: largest |difference| of a logit.
        detail: one line for a person.
    """

    task: str
    ok: bool
    same_numerics: bool
    identical: bool
    max_difference: float
    detail: str


def golden(backbone: FrozenBackbone, task: Task) -> Golden:
    """Computes a task's golden probe, alone with what it extends.

    Raises:
        BackboneError: the task was learned on another backbone.
    """
    described = numerics(backbone)
    logits = _probe_logits(backbone, task)
    return Golden(
        numerics=described,
        numerics_fingerprint=numerics_fingerprint(described),
        logits=logits,
        digest=tensor_digest(logits),
    )


def verify(backbone: FrozenBackbone, task: Task, recorded: Golden, model: CombinedModel | None = None) -> Verdict:
    """Recomputes a golden probe and compares.

    Args:
        backbone: the backbone as it is now.
        task: the task as it is stored now.
        recorded: its golden probe from the registry.
        model: the model that serves the task among all others; None computes it alone.

    Raises:
        IntegrityError: the golden probe is not one of this task, or its logits have been changed.
    """
    expected = (NUM_PROBES, len(task.labels))
    if tuple(recorded.logits.shape) != expected or tensor_digest(recorded.logits) != recorded.digest:
        raise IntegrityError(f"Task {task.ref!r}: its golden probe does not fit it, or has been changed.")
    now = numerics_fingerprint(numerics(backbone))
    logits = _probe_logits(backbone, task, model)
    same, identical = now == recorded.numerics_fingerprint, tensor_digest(logits) == recorded.digest
    difference = (logits - recorded.logits).abs().max().item()
    bound = TOLERANCE[str(backbone.precision).removeprefix("torch.")] * recorded.logits.abs().max().item()
    ok = identical or (not same and difference <= bound)
    if identical:
        detail = "identical, byte for byte" + ("" if same else ", under another numerics fingerprint")
    elif same:
        detail = f"DIFFERS under the same numerics fingerprint, by up to {difference:.3g}"
    else:
        detail = f"new epoch (numerics {now[:12]}…): differs by up to {difference:.3g}, allowed {bound:.3g}"
    return Verdict(task.ref, ok, same, identical, difference, detail)


def _probe_logits(backbone: FrozenBackbone, task: Task, model: CombinedModel | None = None) -> Tensor:
    model = model or CombinedModel(backbone, [task])
    return model(probe_images(backbone))[task.name].cpu()
