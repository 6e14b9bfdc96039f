"""Baselines by name, with their labels and notes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from addenda.benchmarks.baselines.finetuning import FineTuning, Joint
from addenda.benchmarks.baselines.frozen_features import (
    AdaptedRanPAC,
    FeCAM,
    GaussianReplay,
    NearestMean,
    RanPAC,
    StreamingDiscriminant,
)
from addenda.benchmarks.baselines.method import Method
from addenda.benchmarks.baselines.per_task import LinearProbePerTask, TrainedPerTask
from addenda.exceptions import TrainingError


class BaselineInfo(NamedTuple):
    """A baseline's class, which takes its name as the first argument, its label, and a note for below the tables."""

    make: type[Method]
    label: str
    note: str = ""


_PER_TASK = (
    "no task-incremental forgetting, at the cost shown; class-incremental predictions are those of the most confident "
    "task"
)


def _lora(rank: int) -> BaselineInfo:
    return BaselineInfo(TrainedPerTask, "a LoRA per task", f"rank {rank}, with PEFT; {_PER_TASK}")


BASELINES: Mapping[str, BaselineInfo] = MappingProxyType({
    "naive": BaselineInfo(FineTuning, "fine-tuning", "sequential, with nothing against forgetting"),
    "joint": BaselineInfo(
        Joint, "joint fine-tuning", "upper bound: trained on all experiences at once, so only the last row exists"
    ),
    "ewc": BaselineInfo(FineTuning, "EWC", "online, without decay"),
    "lwf": BaselineInfo(FineTuning, "LwF"),
    "replay": BaselineInfo(FineTuning, "experience replay"),
    "slda": BaselineInfo(StreamingDiscriminant, "streaming LDA", "on frozen features"),
    "nearest-mean": BaselineInfo(
        NearestMean, "nearest class mean", "of frozen features, by cosine similarity (SimpleCIL)"
    ),
    "ranpac": BaselineInfo(
        RanPAC, "RanPAC", "ridge regression on random projections of frozen features, without first-session adaptation"
    ),
    "ranpac-adapted": BaselineInfo(
        AdaptedRanPAC, "RanPAC, adapted", "with a LoRA of rank 8 as first-session adaptation of the backbone"
    ),
    "fecam": BaselineInfo(FeCAM, "FeCAM", "Mahalanobis distance with a covariance per class, on frozen features"),
    "gaussian-replay": BaselineInfo(
        GaussianReplay, "Gaussian replay", "a head trained on features drawn from a Gaussian per class (as in SLCA)"
    ),
    "linear-probe": BaselineInfo(
        LinearProbePerTask, "linear probes", f"one logistic regression on frozen features per task; {_PER_TASK}"
    ),
    "lora-8": _lora(8),
    "full": BaselineInfo(TrainedPerTask, "a model per task", f"full fine-tuning; {_PER_TASK}"),
})  # fmt: skip
"""All baselines; `baseline` also knows LoRA of other ranks."""


def baseline(name: str) -> BaselineInfo:
    """Look up a baseline of BASELINES, or `"lora-R"` with any rank R."""
    if name in BASELINES:
        return BASELINES[name]
    kind, _, rank = name.partition("-")
    if kind == "lora" and rank.isdecimal() and int(rank):
        return _lora(int(rank))
    raise TrainingError(f"Unknown baseline {name!r}. Known: {', '.join(BASELINES)}, and lora-R with any other rank R.")
