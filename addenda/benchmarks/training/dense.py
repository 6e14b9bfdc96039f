"""The same task trained from the cache and through the dense mask: what both start from, and the second of them."""

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
    """What all measurements share; everything starts from the regression."""

    backbone: FrozenBackbone
    images: LabelledImages
    activations: Activations
    linear_probe: LinearProbe
    config: LearnConfig

    def train(self, trainer: Trainer, config: LearnConfig, epochs: int, count: int | None = None) -> list[Candidate]:
        """Trains the candidates of a config for some epochs of its schedule, on all images or the first few."""
        rows = torch.arange(count or len(self.activations), dtype=torch.int64, device="cpu")
        nothing = torch.empty(0, dtype=torch.long, device="cpu")
        return trainer.run(self.linear_probe, config.candidates, rows, nothing, epochs, "refit")[0]

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Some of the images as the backbone takes them."""
        return torch.stack([self.images.read(row, self.backbone) for row in rows])


class DenseTraining:
    """The same task trained through the dense mask: same start, order of images, loss, optimiser and schedule."""

    def __init__(self, setting: Setting) -> None:
        backbone, config = setting.backbone, setting.config
        (settings,) = config.candidates
        first = first_tensors(backbone, setting.linear_probe, settings, config.memory_std)
        self._setting = setting
        self._order = Trainer(setting.activations, [], config)._order
        self._penalty = 1 / (setting.linear_probe.strength * len(setting.activations))  # as the Trainer weighs it
        num_steps = -(-len(setting.activations) // config.batch_size) * config.epochs
        self._candidate = Candidate(settings, first, config, num_steps, backbone.device)
        self._model = DenseMask(backbone, [as_task(setting, "dense", first)])
        learned = dict(self._model.named_parameters())
        held = {name: learned[own] for name, own in DENSE_NAMES.items()}
        self._parameters = [held[name] for name in self._candidate.tensors]
        self._head = [held[name] for name in HEAD_WEIGHTS]
        for parameter, tensor in zip(self._parameters, self._candidate.tensors.values(), strict=True):
            parameter.data = tensor.data  # the candidate's optimiser moves both

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The task's tensors as they are now."""
        return self._candidate.snapshot()

    def batches(self, epoch: int) -> Iterator[Tensor]:
        """Rows of the images of each step."""
        order, _ = self._order(torch.arange(len(self._setting.activations), dtype=torch.int64, device="cpu"), epoch)
        yield from order.split(self._setting.config.batch_size)

    def step(self, images: Tensor, rows: Tensor) -> None:
        """One optimiser step on some images."""
        activations = self._setting.activations
        targets = activations.targets[rows].to(self._setting.backbone.device)
        mean = activations.objective.loss(self._model(images)["dense"], targets)
        penalty = self._penalty * torch.stack([weight.square().sum() for weight in self._head]).sum()
        self._candidate.step(torch.autograd.grad(mean + penalty, self._parameters))


def as_task(setting: Setting, name: str, tensors: dict[str, Tensor]) -> Task:
    """Some tensors as a task."""
    return Task(name, setting.backbone.fingerprint, setting.images.labels, **as_fields(tensors))


def peak_bytes(run: Callable[[], object], there: Iterable[Tensor], device: torch.device) -> int:
    """Peak of what `run` allocates above what is there already.

    On a GPU it is what torch's allocator says. A processor's has no such counter, so every operation's outputs are
    counted there, forward and backward, from when their storage is first seen until it is freed, but for those of
    `there`. What a kernel allocates and frees within itself, such as a library's packing buffers, is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    counter = _LiveStorage(there)
    with counter:
        run()
    return counter.peak


class _LiveStorage(TorchDispatchMode):
    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self._known:
            self._known.add(place)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, place, size)
        return tensor

    def _forget(self, place: int, size: int) -> None:
        self._known.remove(place)
        self._live -= size
