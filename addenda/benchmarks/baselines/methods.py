"""The baselines by name: the class of each, what it is called, and what must be known of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from addenda.benchmarks.baselines.finetuning import FineTuning, Joint
from addenda.benchmarks.baselines.frozen_features import NearestMean, RanPAC, StreamingDiscriminant
from addenda.benchmarks.baselines.method import Baseline
from addenda.benchmarks.baselines.per_task import LinearProbePerTask, TrainedPerTask
from addenda.exceptions import TrainingError


class Known(NamedTuple):
    """A baseline: its class, made with its name first; its label for people; a note below the tables."""

    make: type[Baseline]
    label: str
    note: str = ""


_PER_TASK = (
    "no forgetting in the task-incremental setting, at the price shown; in the class-incremental setting the most "
    "confident task predicts"
)


def _lora(rank: int) -> Known:
    return Known(TrainedPerTask, "a LoRA per task", f"of rank {rank}, by PEFT; {_PER_TASK}")


BASELINES: Mapping[str, Known] = MappingProxyType({
    "naive": Known(FineTuning, "fine-tuning", "in sequence, nothing held back"),
    "joint": Known(
        Joint, "joint fine-tuning", "an upper bound: on all experiences at once, so there is a last row only"
    ),
    "ewc": Known(FineTuning, "EWC", "online, without decay"),
    "lwf": Known(FineTuning, "LwF"),
    "replay": Known(FineTuning, "experience replay"),
    "slda": Known(StreamingDiscriminant, "streaming LDA", "on the frozen feature"),
    "nearest-mean": Known(NearestMean, "nearest class mean", "of the frozen feature, by cosine (SimpleCIL)"),
    "ranpac": Known(
        RanPAC, "RanPAC", "ridge regression on random features of the frozen one, no first-session adaptation"
    ),
    "linear-probe": Known(
        LinearProbePerTask, "linear probes", f"one logistic regression on the frozen feature for each task; {_PER_TASK}"
    ),
    "lora-8": _lora(8),
    "full": Known(TrainedPerTask, "a model per task", f"fully fine-tuned; {_PER_TASK}"),
})  # fmt: skip
"""All of them; `baseline` knows LoRA of every rank."""


def baseline(name: str) -> Known:
    """A baseline of BASELINES, or `"lora-R"` with any rank."""
    if name in BASELINES:
        return BASELINES[name]
    kind, _, rank = name.partition("-")
    if kind == "lora" and rank.isdecimal() and int(rank):
        return _lora(int(rank))
    raise TrainingError(
        f"Baseline {name!r} is not known. Known: {', '.join(BASELINES)}, or lora-R with another rank R."
    )
