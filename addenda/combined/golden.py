"""Golden probes: a task's logits on fixed images, recorded at registration and recomputed by `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from addenda.backbones import FrozenBackbone, uncompiled
from addenda.combined.model import CombinedModel
from addenda.combined.numerics import numerics, numerics_fingerprint, tensor_digest
from addenda.combined.probe_inputs import NUM_PROBES, probe_images
from addenda.registry import Golden, Task, is_finite

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
"""Largest allowed max |difference| / max |logit| under another numerics fingerprint (docs/exactness.md)."""


@dataclass(frozen=True)
class Verdict:
    """Result of verifying one task's golden probe."""

    task: str  # its reference
    ok: bool  # identical, or within tolerance under another numerics fingerprint
    compared: str  # how many logits were recomputed
    numerics_fingerprint: str  # of the recomputation
    recorded_under: str  # numerics fingerprint of the recorded golden probe
    same_numerics: bool  # whether these two are equal
    identical: bool  # whether the logits are byte-identical
    max_difference: float | None  # largest |difference| of a logit; None if the probe cannot be compared
    detail: str  # one-line explanation


@uncompiled
def golden(backbone: FrozenBackbone, task: Task) -> Golden:
    """Computes a task's golden probe, with only the tasks that it extends.

    Raises:
        BackboneError: the task was learned on another backbone.
        ExactnessError: the self-test failed on this machine.
        IntegrityError: the backbone's weights in memory have changed since they were loaded.
    """
    backbone.check_unchanged()
    return goldens(backbone, [task])[0]


@uncompiled
def goldens(backbone: FrozenBackbone, tasks: Sequence[Task]) -> list[Golden]:
    """Like `golden`, for many tasks in one forward pass, without hashing the backbone's weights."""
    described, outputs = numerics(backbone), CombinedModel(backbone, tasks)(probe_images(backbone))
    logits = [outputs[task.name].cpu() for task in tasks]
    return [Golden(described, numerics_fingerprint(described), values, tensor_digest(values)) for values in logits]


@uncompiled
def verify(backbone: FrozenBackbone, recorded: Sequence[tuple[Task, Sequence[Golden]]]) -> list[Verdict]:
    """Recomputes the golden probes of all tasks in one combined forward pass and compares them.

    Args:
        backbone: the backbone.
        recorded: stored tasks, each with its golden probes, newest first. A task is compared with its probe of the
            current numerics fingerprint, or else with its newest probe; a task without a probe fails.

    Raises:
        BackboneError: a task was learned on another backbone.
        ExactnessError: the self-test failed on this machine.
        IntegrityError: the backbone's weights in memory have changed since they were loaded.
    """
    backbone.check_unchanged()
    # Renamed to their references, so that several versions of one name can be verified together.
    named = [(replace(task, name=task.ref, version=None), probes) for task, probes in recorded]
    return verdicts(CombinedModel(backbone, [task for task, _ in named]), named)


@uncompiled
def verdicts(model: CombinedModel, recorded: Sequence[tuple[Task, Sequence[Golden]]]) -> list[Verdict]:
    """Like `verify`, for an existing model and some of its tasks, without hashing the backbone's weights."""
    now = numerics_fingerprint(numerics(model.backbone))
    images, names = probe_images(model.backbone), [task.name for task, _ in recorded]
    logits = model(images, names)
    results = []
    for task, probes in recorded:
        # The sort is stable: the probe of the current numerics first, then the newest.
        probe = next(iter(sorted(probes, key=lambda probe: probe.numerics_fingerprint != now)), None)
        results.append(_verdict(task, probe, logits[task.name].cpu(), now, model.backbone))
    return results


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
        detail = "logits or probabilities are NaN or infinite"
    elif probe is None:
        detail = "no golden probe is recorded"
    elif difference is None:
        detail = "the golden probe has another shape or does not match its digest"
    elif identical:
        detail = "identical, byte for byte" + ("" if same else ", under another numerics fingerprint")
    elif same:
        detail = f"DIFFERS under the same numerics fingerprint, by up to {difference:.3g}"
    else:
        detail = f"numerics change (now {now[:12]}…): differs by up to {difference:.3g}, allowed {bound:.3g}"
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
