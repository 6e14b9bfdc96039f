"""Candidates of a sweep: a task's tensors in training, from their initial values to their best epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from addenda.backbones import FrozenBackbone
from addenda.learner.learn_config import LearnConfig, Settings
from addenda.learner.objectives import LinearProbe
from addenda.registry import ADAPTED, LowRank

Tensors = dict[str, Tensor]
"""A task's tensors, by their names in the artifact."""

TOKEN = ("class_token", "memory")
HEAD_WEIGHTS = ("head_weight", "pooled_weight")
HEAD = (*HEAD_WEIGHTS, "head_bias")


def adapter_name(site: str, part: str) -> str:
    """Returns the name of an adapter tensor."""
    return f"adapters.{site}.{part}"


def first_tensors(
    backbone: FrozenBackbone, linear_probe: LinearProbe, settings: Settings, memory_std: float
) -> Tensors:
    """Returns the initial tensors: the backbone's class token, memory from N(0, memory_std), adapters that add zero.

    The head reads the token's feature and the backbone's pooled feature. Its two weights start as half the linear
    probe's each: the two features start out alike, and an equal split has the smallest L2 penalty.
    """
    random = torch.Generator().manual_seed(settings.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")

    depth, rank = backbone.depth, settings.adapter_rank
    adapters: Tensors = {}
    for site, (fan_in, fan_out) in backbone.adapter_shapes().items() if rank else ():
        adapters[adapter_name(site, "down")] = normal(depth, rank, fan_in) * fan_in**-0.5
        adapters[adapter_name(site, "up")] = torch.zeros(depth, fan_out, rank, dtype=torch.float32, device="cpu")
    return {
        "class_token": backbone.class_token.float().cpu().clone(),
        "memory": normal(depth, settings.num_memory_tokens, backbone.embed_dim) * memory_std,
        "head_weight": linear_probe.weight / 2,
        "pooled_weight": linear_probe.weight / 2,
        "head_bias": linear_probe.bias.clone(),
        **adapters,
    }


def as_fields(tensors: Tensors) -> dict[str, Any]:
    """Converts a task's tensors to fields of `Task`."""
    fields: dict[str, Any] = {name: t for name, t in tensors.items() if not name.startswith("adapters.")}
    if len(fields) < len(tensors):
        fields["adapters"] = {
            site: LowRank(*(tensors[adapter_name(site, part)] for part in LowRank._fields)) for site in ADAPTED
        }
    return fields


def schedule(step: int, warmup_steps: int, steps: int) -> float:
    """Returns the learning rate factor of a step, counted from 0: linear warm-up, then cosine decay to zero."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class Best:
    """The epoch with the lowest validation loss so far; without early stopping, the latest epoch."""

    epoch: int = 0  # from 1; 0 before the first
    loss: float = math.inf
    tensors: Tensors = field(default_factory=dict)


class Candidate:
    """One candidate in training: its tensors, its optimiser, the schedule over `steps` steps, and its best epoch."""

    def __init__(
        self, settings: Settings, tensors: Tensors, config: LearnConfig, steps: int, device: torch.device
    ) -> None:
        self.settings = settings
        self.tensors = {name: Parameter(tensor.detach().clone().to(device)) for name, tensor in tensors.items()}
        self.best = Best()
        self.stopped: str | None = None  # why training ended: "diverged", "no better" (early stopping) or "hopeless"
        self._clip_norm = config.clip_norm
        decay = settings.weight_decay
        head, token = [self.tensors[name] for name in HEAD], [self.tensors[name] for name in TOKEN]
        groups = [
            {"params": token, "lr": settings.learning_rate, "weight_decay": decay},
            {"params": head, "lr": config.head_learning_rate, "weight_decay": 0.0},  # the loss has its L2 penalty
        ]
        if adapters := [tensor for name, tensor in self.tensors.items() if name not in HEAD + TOKEN]:
            groups.append({"params": adapters, "lr": settings.adapter_learning_rate, "weight_decay": decay})
        if config.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=config.momentum)
        else:
            self.optimizer = torch.optim.AdamW(groups)
        self._peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._steps, self._total_steps, self._warmup_steps = 0, steps, config.warmup_steps

    @property
    def shape(self) -> tuple[torch.Size, ...]:
        """Shapes of all tensors; candidates with the same shapes can share a forward pass."""
        return tuple(tensor.shape for tensor in self.tensors.values())

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Clips the gradients to the maximum norm and takes an optimiser step."""
        for tensor, gradient in zip(self.tensors.values(), gradients, strict=True):
            tensor.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.tensors.values(), self._clip_norm)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * schedule(self._steps, self._warmup_steps, self._total_steps)
        self.optimizer.step()
        self._steps += 1

    def end_epoch(self, epoch: int, train_loss: float, loss: float | None, patience: int | None) -> None:
        """Early stopping: keeps the best tensors, stops after `patience` epochs without improvement or on divergence.

        If `patience` or the validation loss is None, the latest tensors are kept: too few validation images choose an
        epoch by chance.
        """
        if not math.isfinite(train_loss) or (loss is not None and not math.isfinite(loss)):
            self.stopped = "diverged"
        elif loss is None or patience is None or loss < self.best.loss:
            self.best = Best(epoch, self.best.loss if loss is None else loss, self.snapshot())
        elif epoch - self.best.epoch >= patience:
            self.stopped = "no better"

    def snapshot(self) -> Tensors:
        """Copies the tensors to the CPU."""
        return {name: tensor.detach().clone().cpu() for name, tensor in self.tensors.items()}

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns what `restore` needs to resume training: tensors, and JSON values."""
        tensors = {f"tensors.{name}": tensor for name, tensor in self.snapshot().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.tensors.items()}
        for index, buffers in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value.detach().cpu().clone() for name, value in buffers.items()}
        values = {"steps": self._steps, "stopped": self.stopped, "best": [self.best.epoch, self.best.loss]}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        best: Tensors = {}
        optimizer = self.optimizer.state_dict()
        for key, value in tensors.items():
            kind, name = key.split(".", 1)
            if kind == "tensors":
                self.tensors[name].data.copy_(value)
            elif kind == "best":
                best[name] = value
            else:
                index, name = name.split(".")
                optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        (epoch, loss), self._steps, self.stopped = values["best"], values["steps"], values["stopped"]
        self.best = Best(epoch, loss, best)
