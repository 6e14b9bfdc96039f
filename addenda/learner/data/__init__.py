"""Labelled images from anywhere: folders, listings, torch and Hugging Face datasets, opened and read one way."""

from addenda.learner.data.labelled import LabelledImages
from addenda.learner.data.openers import (
    Data,
    check_learnable,
    check_same_labels,
    has_test_part,
    open_images,
    open_parts,
)

__all__ = [
    "Data",
    "LabelledImages",
    "check_learnable",
    "check_same_labels",
    "has_test_part",
    "open_images",
    "open_parts",
]
