"""Training a new task: data, activation cache, sweep, Learner, many tasks from one file."""

from addenda.learner.augmentation import Augmentation
from addenda.learner.cache import ActivationCache
from addenda.learner.config import LearnConfig, read_mapping
from addenda.learner.context import Epoch
from addenda.learner.data import open_parts
from addenda.learner.learner import Learner
from addenda.learner.many import Outcome, Row, learn_many, read_rows

__all__ = [
    "ActivationCache",
    "Augmentation",
    "Epoch",
    "LearnConfig",
    "Learner",
    "Outcome",
    "Row",
    "learn_many",
    "open_parts",
    "read_mapping",
    "read_rows",
]
