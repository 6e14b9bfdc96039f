"""Training a new task: data, activation cache, sweep, Learner."""

from addenda.learner.augmentation import Augmentation
from addenda.learner.cache import ActivationCache
from addenda.learner.config import LearnConfig
from addenda.learner.learner import Learner
from addenda.learner.training import Epoch

__all__ = ["ActivationCache", "Augmentation", "Epoch", "LearnConfig", "Learner"]
