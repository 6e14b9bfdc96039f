"""Stratified division of groups of images, which gives every part its share of every class's images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack

MAX_NODES = 100
"""Limit of the search in `_completed`, which 5,000 images with 2,000 rare labels do not reach; one of time would not be
reproducible."""
Counts = NDArray[np.int64]
"""[G, K]: the images of each group with each of K properties: a class, or the presence or the absence of a label."""
Mask = NDArray[np.bool_]


def held_out_groups(counts: Counts, sizes: Counts, fraction: float, seed: int, num_labels: int) -> Mask:
    """Chooses the groups of the validation split, with `fraction` of the images of each property.

    Training keeps at least one group with each property. Validation gets at least one with each property of two or more
    groups, unless training needs all of them for other properties; then it lacks as few as possible of the first
    `num_labels` properties, and after that of the others.

    scikit-learn's StratifiedGroupKFold knows only fractions 1 / k and one class per image, and GroupShuffleSplit does
    not stratify; neither gives every class a validation image.
    """
    total = counts.sum(0)
    least = np.where(counts > 0, counts, total).min(0)
    wanted = np.minimum(np.maximum(fraction * total, least), total - least)
    num_images = int(sizes.sum())
    room = np.array([(1 - fraction) * num_images, fraction * num_images])
    part = divided(counts, sizes, np.stack([total - wanted, wanted]), room, seed)
    return _completed(part == 1, counts > 0, sizes, num_labels)


def divided(
    counts: Counts, sizes: Counts, wanted: NDArray[np.float64], room: NDArray[np.float64], seed: int
) -> NDArray[np.int64]:
    """Divides groups among parts, the largest first; returns the part of each group.

    A group goes where it lowers the sum of squared differences between the images with each property that a part has
    and those that it should have, as shares of all images with this property, most. In a tie it goes where most room is
    left, and groups of one size are in random order.

    Args:
        counts: the images of each of G groups with each of K properties.
        sizes: the number of images in each group.
        wanted: the images with each property that each of P parts should have, [P, K].
        room: the images that each part should have, [P].
        seed: seed of the order.
    """
    needed, room, part = wanted.copy(), room.copy(), np.zeros(len(counts), dtype=np.int64)
    weight = 1 / np.maximum(counts.sum(0), 1) ** 2
    order = np.random.default_rng(seed).permutation(len(counts))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        # (n - c)^2 is n^2 - 2 n c + c^2, where c^2 is the same for all parts. Not `@`, whose bits depend on the CPU.
        gain = (needed * (counts[group] * weight)).sum(1)
        part[group] = chosen = np.lexsort((room, gain))[-1]
        needed[chosen] -= counts[group]
        room[chosen] -= sizes[group]
    return part


def _completed(held_out: Mask, has: Mask, sizes: Counts, num_labels: int) -> Mask:
    """Moves as few images as possible to give both sides what `held_out_groups` promises, by integer programming."""
    several = has.sum(0) > 1
    pinned = has[:, ~several].any(1)
    held_out = np.where(pinned, False, held_out)
    free = np.zeros_like(pinned)
    while True:  # until each property has fixed groups on both sides, or no other groups than free and pinned ones
        unsafe = several & ~(has[held_out & ~free].any(0) & has[~held_out & ~free].any(0))
        before, free = free, np.where(pinned, False, has[:, unsafe].any(1))
        if (free == before).all():
            break
    if not free.any():
        return held_out
    # Variables: whether each free group is held out, and whether validation lacks each unsafe property.
    members, nothing = csr_array(has[free][:, unsafe].T.astype(float)), csr_array((unsafe.sum(), unsafe.sum()))
    in_training = has[pinned][:, unsafe].any(0)
    most = np.where(in_training, np.inf, has[:, unsafe].sum(0) - 1)
    constraints = [
        LinearConstraint(hstack([members, nothing]), ub=most),
        LinearConstraint(hstack([members, eye_array(len(most))]), lb=1),
    ]
    moved = np.where(held_out, -sizes, sizes)[free] / (sizes.sum() + 1)
    lacking = np.where(np.flatnonzero(unsafe) < num_labels, len(most) + 1, 1)
    solved = milp(
        np.concatenate([moved, lacking]), integrality=1, bounds=Bounds(0, 1), constraints=constraints,
        options={"node_limit": MAX_NODES},
    )  # fmt: skip
    held_out[free] = solved.x[: len(moved)] > 0.5
    return held_out
