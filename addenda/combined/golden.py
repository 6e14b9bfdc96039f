"""Golden probes: a task's logits on fixed images, made at registration and recomputed by `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from addenda.backbones import FrozenBackbone
from addenda.combined.model import CombinedModel
from addenda.combined.numerics import numerics, numerics_fingerprint, tensor_digest
from addenda.combined.probe_inputs import NUM_PROBES, probe_images
from addenda.registry import Golden, Task, is_finite

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
"""What max |difference| / max |logit| may be under another numerics fingerprint (docs/exactness.md)."""


@dataclass(frozen=True)
class Verdict:
    """What became of one task's golden probe."""

    task: str  # its reference
    ok: bool  # digests equal under the same numerics fingerprint, or within tolerance under another
    compared: str  # what was recomputed
    numerics_fingerprint: str  # under which it was recomputed
    recorded_under: str  # the numerics fingerprint under which the golden probe was made
    same_numerics: bool  # whether these two are equal
    identical: bool  # whether the logits are equal, byte for byte
    max_difference: float | None  # largest |difference| of a logit; None where the probe cannot be compared
    detail: str  # one line for a person


def golden(backbone: FrozenBackbone, task: Task) -> Golden:
    """Computes a task's golden probe, alone with what it extends.

    Raises:
        BackboneError: the task was learned on another backbone.
        ExactnessError: this machine's arithmetic does not keep the promise.
        IntegrityError: the backbone's weights in memory have changed since they were loaded.
    """
    backbone.check_unchanged()
    described = numerics(backbone)
    logits = CombinedModel(backbone, [task])(probe_images(backbone))[task.name].cpu()
    return Golden(
        numerics=described,
        numerics_fingerprint=numerics_fingerprint(described),
        logits=logits,
        digest=tensor_digest(logits),
    )


def verify(backbone: FrozenBackbone, recorded: Sequence[tuple[Task, Sequence[Golden]]]) -> list[Verdict]:
    """Recomputes golden probes, of all tasks in one pass, as they are served, and compares.

    Args:
        backbone: the backbone as it is now.
        recorded: tasks as they are stored now, each with its golden probes, newest first. The one made under the
            present numerics fingerprint is compared, or else the newest; a task without one fails.

    Raises:
        BackboneError: a task was learned on another backbone.
        ExactnessError: this machine's arithmetic does not keep the promise.
        IntegrityError: the backbone's weights in memory have changed since they were loaded.
    """
    backbone.check_unchanged()
    # By reference: versions of one name are verified side by side.
    named = [(replace(task, name=task.ref, version=None), probes) for task, probes in recorded]
    return verdicts(CombinedModel(backbone, [task for task, _ in named]), named)


def verdicts(model: CombinedModel, recorded: Sequence[tuple[Task, Sequence[Golden]]]) -> list[Verdict]:
    """As `verify`, on a model as it is and some of its tasks; whether the weights have changed is not looked at."""
    now = numerics_fingerprint(numerics(model.backbone))
    answers = model(probe_images(model.backbone), [task.name for task, _ in recorded])
    found = []
    for task, probes in recorded:
        # Sorting is stable: the one of the present numerics first, then the newest.
        probe = next(iter(sorted(probes, key=lambda probe: probe.numerics_fingerprint != now)), None)
        found.append(_verdict(task, probe, answers[task.name].cpu(), now, model.backbone))
    return found


def _verdict(task: Task, probe: Golden | None, logits: Tensor, now: str, backbone: FrozenBackbone) -> Verdict:
    same, identical = False, False
    difference: float | None = None
    bound = 0.0
    if probe is not None and probe.logits.shape == logits.shape and tensor_digest(probe.logits) == probe.digest:
        same, identical = now == probe.numerics_fingerprint, tensor_digest(logits) == probe.digest
        difference = (logits - probe.logits).abs().max().item()
        bound = TOLERANCE[backbone.precision_name] * probe.logits.abs().max().item()
    finite = is_finite(logits, task.objective, task.temperature)
    if not finite:
        detail = "gives logits or probabilities that are NaN or infinite"
    elif probe is None:
        detail = "no golden probe is recorded"
    elif difference is None:
        detail = "its golden probe does not fit it, or has been changed"
    elif identical:
        detail = "identical, byte for byte" + ("" if same else ", under another numerics fingerprint")
    elif same:
        detail = f"DIFFERS under the same numerics fingerprint, by up to {difference:.3g}"
    else:
        detail = f"new epoch (numerics {now[:12]}…): differs by up to {difference:.3g}, allowed {bound:.3g}"
    return Verdict(
        task=task.ref,
        ok=finite and difference is not None and (identical or (not same and difference <= bound)),
        compared=f"{NUM_PROBES} probe images x {len(task.labels)} logits",
        numerics_fingerprint=now,
        recorded_under="" if probe is None else probe.numerics_fingerprint,
        same_numerics=same,
        identical=identical,
        max_difference=difference,
        detail=detail,
    )
