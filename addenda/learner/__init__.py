"""Training a new task: data, activation cache, sweep, Learner."""

from addenda.learner.config import LearnConfig
from addenda.learner.learner import Learner
from addenda.learner.training import Epoch

__all__ = ["Epoch", "LearnConfig", "Learner"]
