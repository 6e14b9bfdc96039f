"""The baselines by name: how each is made, and what it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.continual.finetuning import FineTuning, Joint
from addenda.benchmarks.continual.frozen_features import NearestMean, RanPAC, StreamingDiscriminant
from addenda.benchmarks.continual.method import Method
from addenda.benchmarks.continual.per_task import LinearProbe, RivalPerTask
from addenda.benchmarks.continual.settings import BaselineSettings
from addenda.benchmarks.continual.stream import Stream
from addenda.exceptions import TrainingError

Maker = Callable[[Stream, FrozenBackbone, BaselineSettings, int], Method]

BASELINES: Mapping[str, Maker] = MappingProxyType({
    "naive": partial(FineTuning, "naive"),
    "joint": Joint,
    "ewc": partial(FineTuning, "ewc"),
    "lwf": partial(FineTuning, "lwf"),
    "replay": partial(FineTuning, "replay"),
    "slda": StreamingDiscriminant,
    "nearest-mean": NearestMean,
    "ranpac": RanPAC,
    "linear-probe": LinearProbe,
    "lora-8": partial(RivalPerTask, "lora-8"),
    "full": partial(RivalPerTask, "full"),
})  # fmt: skip
"""How each is made; `baseline` knows LoRA of every rank."""

_PER_TASK = "forgets nothing either when the task is told: see its price; untold, the most confident task answers"
_DESCRIBED = {
    "naive": ("fine-tuning", "in sequence, nothing held back"),
    "joint": ("joint fine-tuning", "an upper bound: on all experiences at once, so there is a last row only"),
    "ewc": ("EWC", "online, without decay"),
    "lwf": ("LwF", ""),
    "replay": ("experience replay", ""),
    "slda": ("streaming LDA", "on the frozen feature"),
    "nearest-mean": ("nearest class mean", "of the frozen feature, by cosine (SimpleCIL)"),
    "ranpac": ("RanPAC", "ridge regression on random features of the frozen one, no first-session adaptation"),
    "linear-probe": ("linear probes", f"one logistic regression on the frozen feature for each task; {_PER_TASK}"),
    "full": ("a model per task", f"fully fine-tuned; {_PER_TASK}"),
}


def baseline(name: str) -> Maker:
    """How a baseline is made.

    Args:
        name: one of BASELINES, or `"lora-R"` with any rank.

    Raises:
        TrainingError: there is none of that name.
    """
    if name in BASELINES:
        return BASELINES[name]
    if _rank(name):
        return partial(RivalPerTask, name)
    raise TrainingError(
        f"Baseline {name!r} is not known. Known: {', '.join(BASELINES)}, or lora-R with another rank R."
    )


def describe(name: str) -> tuple[str, str]:
    """What a baseline is called, and what must be known of it.

    Raises:
        TrainingError: there is none of that name.
    """
    baseline(name)
    return _DESCRIBED.get(name) or ("a LoRA per task", f"of rank {_rank(name)}, by PEFT; {_PER_TASK}")


def _rank(name: str) -> int:
    """R of `"lora-R"`, 0 of every other name."""
    kind, _, size = name.partition("-")
    return int(size) if kind == "lora" and size.isdecimal() else 0
