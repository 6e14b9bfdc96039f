"""How logits become probabilities, and whether both are numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.registry.store.objectives import OBJECTIVES


def probabilities(logits: Float[Tensor, "*B C"], objective: str, temperature: float = 1.0) -> Float[Tensor, "*B C"]:
    """Turns logits into probabilities, for every part of the package.

    Args:
        logits: as a task gives them.
        objective: one of OBJECTIVES.
        temperature: what logits are divided by first; above 1 it makes a task less sure of itself.

    Returns:
        Of an exclusive objective's logits a softmax, which sums to 1; of another's a sigmoid of each.
    """
    scaled = logits / temperature
    if OBJECTIVES[objective].exclusive:
        return scaled.softmax(-1)
    # torch's sigmoid has other bits at a tensor's end than elsewhere: they would depend on an image's place in a batch.
    return torch.stack([scaled, torch.zeros_like(scaled)], -1).softmax(-1)[..., 0].contiguous()


def is_finite(logits: Float[Tensor, "*B C"], objective: str, temperature: float) -> bool:
    """Whether logits are numbers, and the probabilities that they stand for too."""
    return bool(logits.isfinite().all() and probabilities(logits, objective, temperature).isfinite().all())
