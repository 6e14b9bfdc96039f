"""Training of the same task from the activation cache and through the dense mask, and peak memory of both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.dense_mask import DENSE_NAMES, DenseMask
from addenda.learner import LearnConfig
from addenda.learner.activations import Activations
from addenda.learner.candidates import HEAD_WEIGHTS, Candidate, as_fields, first_tensors
from addenda.learner.data import LabelledImages
from addenda.learner.objectives import LinearProbe
from addenda.learner.trainer import Trainer
from addenda.registry import Task


@dataclass(frozen=True)
class Setting:
    """Shared state of all measurements; all training starts from the linear probe."""

    backbone: FrozenBackbone
    images: LabelledImages
    activations: Activations
    linear_probe: LinearProbe
    config: LearnConfig

    def train(self, trainer: Trainer, config: LearnConfig, epochs: int, count: int | None = None) -> list[Candidate]:
        """Trains the config's candidates for `epochs` of its schedule, on all images or the first `count`."""
        rows = torch.arange(count or len(self.activations), dtype=torch.int64, device="cpu")
        no_rows = torch.empty(0, dtype=torch.long, device="cpu")
        return trainer.run(self.linear_probe, config.candidates, rows, no_rows, epochs, "refit")[0]

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """The preprocessed images of these rows."""
        return torch.stack([self.images.read(row, self.backbone) for row in rows])


class DenseTraining:
    """Training through the dense mask with the same initialization, image order, loss, optimizer and schedule."""

    def __init__(self, setting: Setting) -> None:
        backbone, config = setting.backbone, setting.config
        (settings,) = config.candidates
        first = first_tensors(backbone, setting.linear_probe, settings, config.memory_std)
        self._setting = setting
        self._order = Trainer(setting.activations, [], config)._order
        self._penalty = 1 / (setting.linear_probe.strength * len(setting.activations))  # as in the Trainer
        num_steps = -(-len(setting.activations) // config.batch_size) * config.epochs
        self._candidate = Candidate(settings, first, config, num_steps, backbone.device)
        self._model = DenseMask(backbone, [as_task(setting, "dense", first)])
        dense_parameters = dict(self._model.named_parameters())
        parameters = {name: dense_parameters[dense_name] for name, dense_name in DENSE_NAMES.items()}
        self._parameters = [parameters[name] for name in self._candidate.tensors]
        self._head = [parameters[name] for name in HEAD_WEIGHTS]
        for parameter, tensor in zip(self._parameters, self._candidate.tensors.values(), strict=True):
            parameter.data = tensor.data  # shared memory, so that the candidate's optimizer updates the model

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The current tensors of the task."""
        return self._candidate.snapshot()

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """The image rows of each step."""
        order, _ = self._order(torch.arange(len(self._setting.activations), dtype=torch.int64, device="cpu"), epoch)
        yield from order.split(self._setting.config.batch_size)

    def step(self, images: Tensor, rows: Tensor) -> None:
        """One optimizer step."""
        activations = self._setting.activations
        targets = activations.targets[rows].to(self._setting.backbone.device)
        loss = activations.objective.loss(self._model(images)["dense"], targets)
        penalty = self._penalty * torch.stack([weight.square().sum() for weight in self._head]).sum()
        self._candidate.step(torch.autograd.grad(loss + penalty, self._parameters))


def as_task(setting: Setting, name: str, tensors: dict[str, Tensor]) -> Task:
    """A task with these tensors."""
    return Task(name, setting.backbone.fingerprint, setting.images.labels, **as_fields(tensors))


def peak_bytes(run: Callable[[], object], existing: Iterable[Tensor], device: torch.device) -> int:
    """Peak memory that `run` allocates in addition to the `existing` tensors.

    On a GPU this is the statistic of torch's allocator. The CPU allocator has none, so the outputs of every operation,
    forward and backward, are counted there from when their storage is first seen until it is freed. Memory that a
    kernel allocates and frees internally, such as a library's packing buffers, is not counted.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    counter = _LiveStorage(existing)
    with counter:
        run()
    return counter.peak


class _LiveStorage(TorchDispatchMode):
    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in existing}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._known:
            self._known.add(address)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._freed, address, size)
        return tensor

    def _freed(self, address: int, size: int) -> None:
        self._known.remove(address)
        self._live -= size
