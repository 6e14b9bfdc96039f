"""Training: every candidate of a sweep has the bits that it has when trained alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from addenda import FrozenBackbone, LearnConfig
from addenda.learner import ActivationCache, Augmentation, trainer
from addenda.learner.activations import Activations
from addenda.learner.candidates import HEAD, Candidate
from addenda.learner.context import Epoch, RunContext
from addenda.learner.data import open_images
from addenda.learner.objectives import LinearProbe, objective_of
from addenda.learner.trainer import Trainer
from tests.learner.test_learner import noise

SWEEP = LearnConfig(optimizer="sgd",
    epochs=3, batch_size=16, learning_rate=(0.03, 0.3), num_memory_tokens=(0, 5), weight_decay=(0.0, 0.1),
    adapter_rank=(0, 3), adapter_learning_rate=0.1, seed=(0, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def learned(tiny: FrozenBackbone) -> tuple[Activations, LinearProbe]:
    images, targets = noise(40)
    data = open_images(torch.utils.data.TensorDataset(images, targets))
    activations = Activations(tiny, data, Augmentation(), ActivationCache())
    return activations, objective_of(targets).fit_linear_probe(activations.pooled, targets, 0.1)


def run(learned: tuple[Activations, LinearProbe], config: LearnConfig) -> tuple[list[Candidate], list[Epoch], Trainer]:
    activations, linear_probe = learned
    trainer = Trainer(activations, [], config)
    train, validation = torch.arange(30), torch.arange(30, 40)
    return *trainer.run(linear_probe, config.candidates, train, validation, config.epochs, "sweep"), trainer


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_candidate_of_a_sweep_is_bitwise_identical_to_training_it_alone(
    learned: tuple[Activations, LinearProbe], optimizer: str
) -> None:
    together, history, _ = run(learned, LearnConfig.parse(SWEEP.to_json() | {"optimizer": optimizer}))
    assert len(together) == 32
    for i, candidate in list(enumerate(together))[::3]:
        values = {name: [value] for name, value in candidate.settings._asdict().items() if name != "seed"}
        alone, alone_history, _ = run(
            learned,
            LearnConfig.parse(
                SWEEP.to_json() | values | {"optimizer": optimizer, "seed": [0, candidate.settings.seed]}
            ),
        )
        (only,) = [c for c in alone if c.settings.seed == candidate.settings.seed][-1:]
        assert only.best.loss == candidate.best.loss
        assert all(torch.equal(candidate.best.tensors[n], only.best.tensors[n]) for n in candidate.best.tensors)
        index = alone.index(only)
        assert [e.train_loss[i] for e in history] == [e.train_loss[index] for e in alone_history]


class NothingWaits(TorchDispatchMode):
    """Stands in for a GPU: fails on operations that wait for the device, except in torch's optimizers.

    Their step counters stay on the CPU on every device.
    """

    WAITING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        self.num_operations += 1
        if function._schema.name.removeprefix("aten::") in self.WAITING:
            files = [frame.filename for frame in inspect.stack()]
            assert any("torch/optim/" in file for file in files), f"{function} waits for the device in {files[:9]}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_step_waits_for_no_result_of_the_device(
    learned: tuple[Activations, LinearProbe], optimizer: str
) -> None:
    activations, linear_probe = learned
    config = LearnConfig(optimizer=optimizer, epochs=1, batch_size=10, num_memory_tokens=3, adapter_rank=2)
    config = LearnConfig.parse(config.to_json() | {"learning_rate": [0.01, 0.1]})
    guard, reported = NothingWaits(), list[int]()

    def report(what: str, done: int, total: int) -> None:
        reported.append(done)
        if done == 1:  # in the first step it is tested whether candidates may share a forward pass
            guard.__enter__()
        elif done == total:
            guard.__exit__(None, None, None)

    trainer = Trainer(activations, [], config, RunContext(report=report))
    trainer.run(linear_probe, config.candidates, torch.arange(30), torch.arange(30, 40), 1, "sweep")
    assert reported == [1, 2, 3]
    assert guard.num_operations > 200
    with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
        torch.ones(1).item()


@pytest.mark.slow
def test_candidates_share_a_forward_pass_if_it_preserves_the_bits(learned: tuple[Activations, LinearProbe]) -> None:
    *_, trainer = run(learned, SWEEP)
    assert any(trainer._together.values())


@pytest.mark.slow
def test_candidates_train_one_by_one_if_a_shared_forward_pass_changes_bits(
    learned: tuple[Activations, LinearProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, *_ = run(learned, SWEEP)
    original = Trainer._logits

    def depends_on_the_group(self: Trainer, group: list[dict[str, torch.Tensor]], batch: object) -> torch.Tensor:
        return original(self, group, batch) + 1e-3 * (len(group) > 1)

    monkeypatch.setattr(Trainer, "_logits", depends_on_the_group)
    candidates, _, trainer = run(learned, SWEEP)
    assert trainer._together
    assert not any(trainer._together.values())
    for reference, candidate in zip(expected, candidates, strict=True):
        tensors = candidate.best.tensors
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in reference.best.tensors.items())


def test_a_candidate_that_diverges_is_dropped_and_the_others_continue(learned: tuple[Activations, LinearProbe]) -> None:
    config = LearnConfig(epochs=3, batch_size=16, learning_rate=(0.03, 1e30), optimizer="adamw", clip_norm=1e30)
    (good, bad), history, _ = run(learned, config)
    assert (good.stopped, bad.stopped) == (None, "diverged")
    assert all(map(torch.isfinite(torch.tensor(history[-1].train_loss)).__getitem__, [0]))
    assert len(history) == 3


@pytest.mark.slow
def test_there_is_no_early_stopping_with_few_validation_images(learned: tuple[Activations, LinearProbe]) -> None:
    config = LearnConfig(optimizer="sgd", epochs=30, batch_size=16, learning_rate=(0.01, 3.0), patience=2)
    candidates, history, _ = run(learned, config)
    assert [candidate.best.epoch for candidate in candidates] == [30, 30]
    assert [candidate.best.loss for candidate in candidates] == list(history[-1].validation_loss)
    losses = [epoch.validation_loss[1] for epoch in history]
    assert losses != sorted(losses, reverse=True)  # patience would have stopped it


def test_early_stopping_ends_a_candidate_after_patience_epochs(
    learned: tuple[Activations, LinearProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "ENOUGH_TO_CHOOSE_AN_EPOCH", 10)
    config = LearnConfig(optimizer="sgd", epochs=30, batch_size=16, learning_rate=(0.01, 3.0), patience=2)
    candidates, history, _ = run(learned, config)
    stopped = [c for c in candidates if c.stopped == "no better"]
    assert stopped
    for candidate in stopped:
        index = candidates.index(candidate)
        losses = [e.validation_loss[index] for e in history if e.validation_loss[index] == e.validation_loss[index]]
        assert len(losses) == candidate.best.epoch + 2
        assert min(losses) == losses[candidate.best.epoch - 1] == candidate.best.loss


@pytest.mark.parametrize("hopeless", [True, False])
@pytest.mark.parametrize(("epochs", "trial"), [(5, 5), (8, 5), (18, 6)])
def test_a_sweep_is_given_up_after_a_third_of_its_epochs_if_no_candidate_can_pay(
    learned: tuple[Activations, LinearProbe], hopeless: bool, epochs: int, trial: int
) -> None:
    activations, linear_probe = learned
    config = LearnConfig(epochs=epochs, batch_size=16, learning_rate=(0.001, 1e30), clip_norm=1e30)
    asked = list[list[int]]()

    def answer(candidates: Sequence[Candidate]) -> bool:
        asked.append([candidate.best.epoch for candidate in candidates])
        return hopeless

    train, validation = torch.arange(30), torch.arange(30, 40)
    (good, bad), history = Trainer(activations, [], config).run(
        linear_probe, config.candidates, train, validation, epochs, "sweep", answer
    )
    assert asked == ([[trial]] if trial < epochs else [])  # the candidate that diverged is not asked about
    ended = hopeless and trial < epochs
    assert (good.stopped, bad.stopped) == ("hopeless" if ended else None, "diverged")
    assert len(history) == (trial if ended else epochs)


@pytest.mark.parametrize("calibrate", [True, False])
def test_candidates_are_compared_after_temperature_scaling(tiny: FrozenBackbone, calibrate: bool) -> None:
    images, targets = noise(40)
    shuffled = targets[
        torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ]  # so that not every prediction is correct
    data = open_images(torch.utils.data.TensorDataset(images, shuffled))
    activations = Activations(tiny, data, Augmentation(), ActivationCache())
    learned = activations, objective_of(shuffled).fit_linear_probe(activations.pooled, shuffled, 0.1)
    config = LearnConfig(epochs=2, batch_size=16, learning_rate=0.003, calibrate=calibrate)
    (candidate,), _, trainer = run(learned, config)
    rows, tensors = torch.arange(30, 40), candidate.best.tensors
    targets = activations.targets[rows]
    losses = trainer.losses(trainer.logits(tensors, rows), targets)
    assert losses.mean().item() == pytest.approx(candidate.best.loss, rel=1e-5)
    # The same predictions with more confidence.
    scaled_logits = trainer.logits(tensors | {name: 1.5 * tensors[name] for name in HEAD}, rows)
    scaled = trainer.losses(scaled_logits, targets)
    assert torch.allclose(losses, scaled, rtol=5e-3) == calibrate
