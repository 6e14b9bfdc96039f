"""Whether a task can be learned from labelled images, or scored on them, and which of them are there twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from addenda.exceptions import DataError
from addenda.learner.data.labelled import UNREADABLE, LabelledImages, class_name
from addenda.registry.bounds import check_labels


def repeats(train: LabelledImages, test: LabelledImages | None) -> dict[str, int]:
    """Counts hashed images that are byte for byte the same and should not be.

    Returns:
        `classes`: images to learn from that are there with other labels too; `test`: images to score on that are
        among those to learn from.
    """
    assert train.digests is not None
    answers: dict[str, set[str]] = {}
    for digest, target in zip(train.digests, train.targets.tolist(), strict=True):
        if digest != UNREADABLE:
            answers.setdefault(digest, set()).add(train.answer(target))
    return {
        "classes": sum(len(answers.get(digest, ())) > 1 for digest in train.digests),
        "test": 0 if test is None else sum(test.digest(index) in answers for index in range(len(test))),
    }


def check_learnable(images: LabelledImages) -> None:
    """Raises DataError where there are too few classes or images to learn and validate from."""
    check_labels(images.labels)
    repeated = sorted({label for label in images.labels if images.labels.count(label) > 1})
    if repeated:
        raise DataError(f"{images.where} has several classes named {repeated[0]!r}; each needs a name of its own.")
    short = [(label, count) for label, count in zip(images.labels, images.counts, strict=True) if count < 2]
    if short:
        label, count = short[0]
        more = f", and {len(short) - 1} more classes like it" if len(short) > 1 else ""
        raise DataError(
            f"Class {label!r} in {images.where} has {count} image{'' if count == 1 else 's'}{more}: each class needs "
            "two at least, one to learn from and one to validate on."
        )
    common = [images.labels[label] for label in images.objective.too_common(images.counts, len(images))]
    if common:
        more = f", and so are {len(common) - 1} more labels" if len(common) > 1 else ""
        raise DataError(
            f"Label {common[0]!r} in {images.where} is on every image, or on all but one{more}: two at least must be "
            "without it, one to learn from and one to validate on."
        )


def check_same_labels(labels: Sequence[str], images: LabelledImages, objective: str) -> LabelledImages:
    """Returns the images with targets in the order of a task's labels.

    Args:
        labels: the task's.
        images: to learn from or to score. They may lack labels: no image has those.
        objective: the task's.

    Raises:
        DataError: the classes or the objective are not the same.
    """
    if images.objective.name != objective:
        raise DataError(f"{images.where} is {images.objective.name}; the task is {objective}.")
    wanted = [class_name(label) for label in labels]
    missing, extra = sorted(set(wanted) - set(images.labels)), sorted(set(images.labels) - set(wanted))
    if extra:
        parts = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"it has {', '.join(map(repr, extra))} besides"] if extra else []
        raise DataError(f"{images.where} does not have the task's classes: {' and '.join(parts)}.")
    order = torch.tensor([wanted.index(label) for label in images.labels], dtype=torch.long, device="cpu")
    targets = images.objective.reordered(images.targets, order, len(labels))
    return replace(images, labels=tuple(labels), targets=targets)
