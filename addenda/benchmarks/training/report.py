"""What `addenda bench training` has measured, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from addenda.terminal import size


def title(details: Mapping[str, Any]) -> str:
    """What was measured on what."""
    numerics = details["numerics"]
    return (
        f"{details['backbone']}, {details['train_images']} images, {numerics['device']}, "
        f"{numerics['threads']} threads, {numerics['precision']}"
    )


def summary(details: Mapping[str, Any]) -> str:
    """Below the table: seconds, accuracies and bytes in sentences."""
    accuracy, memory = details["accuracy"], details["peak_bytes"]
    num, few, kept = details["epochs"], details["dense_epochs"], size(details["cache_bytes"])
    beside = "side by side" if details["side_by_side"] else "one by one, since their bits differ side by side"
    return (
        f"An epoch of one candidate takes {details['epoch_s']:.2f} s, of eight {details['sweep_epoch_s']:.2f} s "
        f"({beside}); stock timm passes the images in {details['pass_s']:.1f} s. Cached, filling takes "
        f"{details['fill_s']:.1f} s and {num} epochs {details['train_s']:.1f} s; the dense mask takes "
        f"{details['dense_epoch_s']:.1f} s an epoch, {num} of them extrapolated from steps. On "
        f"{details['test_images']} held-out images, epochs: {few}: cached {100 * accuracy['cached']:.1f} %, dense "
        f"{100 * accuracy['dense']:.1f} % (at the start {100 * accuracy['start']:.1f} %; cached after {num} epochs "
        f"{100 * accuracy['learned']:.1f} %). Live tensors at most: one candidate {size(memory['one'])}, eight "
        f"{size(memory['eight'])}, full fine-tuning {size(memory['full'])}; the cache is {kept}."
    )
