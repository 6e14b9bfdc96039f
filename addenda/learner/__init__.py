"""Training a new task: data, activation cache, sweep, Learner, many tasks from one file."""

from addenda.learner.activation_cache import ActivationCache
from addenda.learner.augmentation import Augmentation
from addenda.learner.context import Epoch
from addenda.learner.data import open_parts
from addenda.learner.learn_config import LearnConfig, merged, read_mapping
from addenda.learner.learner import Learner
from addenda.learner.many import LearnRow, Outcome, learn_many, read_rows

__all__ = [
    "ActivationCache",
    "Augmentation",
    "Epoch",
    "LearnConfig",
    "LearnRow",
    "Learner",
    "Outcome",
    "learn_many",
    "merged",
    "open_parts",
    "read_mapping",
    "read_rows",
]
