"""Labelled images from folders, listings, torch Datasets and Hugging Face datasets, behind one interface."""

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
