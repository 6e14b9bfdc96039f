"""What the benchmark asks of every method: learn an experience, then score images, told of their task or not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from avalanche.training.plugins import EvaluationPlugin
from jaxtyping import Float
from torch import Tensor

from addenda.benchmarks.continual.stream import Experience

NEVER = -1e4
"""Score of a class that is not offered; Avalanche's own padding of 0 would win over an all-negative head."""


class Scores(NamedTuple):
    """A method's scores of all C classes of the stream on N images; the highest is its answer.

    Attributes:
        told: where the task is known: NEVER for the classes of other tasks.
        untold: where it is not: NEVER only for classes that were never met.
    """

    told: Float[Tensor, "N C"]
    untold: Float[Tensor, "N C"]


@dataclass(frozen=True)
class Price:
    """What a method costs after a whole stream.

    Attributes:
        stored_bytes: what it keeps for one task, in the mean, beside one backbone: weights, statistics, images.
        relative_inference: arithmetic of one image's answer, over one pass of the backbone.
    """

    stored_bytes: float
    relative_inference: float


def quiet_evaluator() -> EvaluationPlugin:
    """An Avalanche evaluator that measures and says nothing: the benchmark measures for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No loggers specified")
        return EvaluationPlugin()


class Method(Protocol):
    """A way to learn a stream. One is made for each seed: `make(stream, backbone, settings, seed)`."""

    def learn(self, number: int) -> None:
        """Learns experience `number`; all before it were learned, in order."""

    def scores(self, experience: Experience) -> Scores:
        """Scores the test images of an experience, whether it was learned yet or not."""

    def price(self) -> Price:
        """What it costs, now."""
