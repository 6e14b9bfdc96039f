"""Holding a validation part out, class by class."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int
from sklearn.model_selection import train_test_split
from torch import Tensor

from addenda.learner.data.labelled import Targets


def split(
    targets: Targets, num_classes: int, fraction: float, seed: int
) -> tuple[Int[Tensor, " T"], Int[Tensor, " V"]]:
    """Rows to learn from and rows to validate on: seeded, and each class shared out by the same fraction.

    Of a class on two images or more, one at least is learned from. Multi-label images are shared out label by label,
    the rarest first, each image to the part that still lacks most of that label; not to have a label counts as one too.
    There a label on two images or more asks for one at least to validate on.

    Args:
        targets: of all images.
        num_classes: C.
        fraction: the share to validate on; in a single-label task as many images as classes at least.
        seed: of the draw.

    Source: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-label Data", ECML PKDD 2011, section 3.3,
    for two parts. Theirs does not count what an image is not, and asks for no minimum.
    """
    if targets.ndim == 1:
        return _single_label(targets, num_classes, fraction, seed)
    held_out = _share_out(torch.cat([targets, ~targets], dim=1), fraction, seed)
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def _single_label(
    targets: Int[Tensor, " N"], num_classes: int, fraction: float, seed: int
) -> tuple[Int[Tensor, " T"], Int[Tensor, " V"]]:
    most = len(targets) - num_classes  # scikit-learn asks for an image of each class on both sides
    held_out = min(max(num_classes, round(fraction * len(targets))), most)
    train, validation = train_test_split(
        range(len(targets)), test_size=held_out, stratify=targets.tolist(), random_state=seed
    )
    for label in set(targets.tolist()) - set(targets[train].tolist()):  # a small class may fall to one side
        train.append(next(row for row in validation if targets[row] == label))
        validation.remove(train[-1])
    return torch.tensor(train, dtype=torch.int64, device="cpu"), torch.tensor(
        validation, dtype=torch.int64, device="cpu"
    )


def _share_out(sides: Bool[Tensor, "N K"], fraction: float, seed: int) -> Bool[Tensor, " N"]:
    """Which images are held out. Each is on one side or more; each side is shared out by the fraction."""
    has = sides.numpy()
    counts = has.sum(0)
    wanted = np.minimum(np.maximum(fraction * counts, 1), np.maximum(counts - 1, 0))
    lacks = np.stack([counts - wanted, wanted])  # [2, K]: to learn from, to validate on
    room = np.array([(1 - fraction) * len(has), fraction * len(has)])
    part = np.full(len(has), -1)
    order = np.random.default_rng(seed).permutation(len(has))
    while (part < 0).any():
        left = has[part < 0].sum(0)
        side = int(np.where(left > 0, left, len(has) + 1).argmin())
        for row in order[(part[order] < 0) & has[order, side]]:
            part[row] = max((0, 1), key=lambda p: (lacks[p, side], room[p]))
            lacks[part[row]] -= has[row]
            room[part[row]] -= 1
    for lost in np.flatnonzero((counts > 1) & ~has[part == 0].any(0)):  # its images were all held out by rarer sides
        part[np.flatnonzero(has[:, lost])[0]] = 0
    return torch.from_numpy(part == 1)
