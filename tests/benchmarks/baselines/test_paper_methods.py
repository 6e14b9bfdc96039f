"""The regimes for comparison: which are settings, which are rivals, and how these are trained."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from addenda import FrozenBackbone, LearnConfig
from addenda.benchmarks.baselines import paper_methods
from addenda.benchmarks.baselines.dense_mask import DenseMask
from addenda.benchmarks.baselines.paper_methods import (
    BaselineConfig,
    Rate,
    is_baseline,
    joined_accuracies,
    method_config,
    train_baseline,
)
from addenda.exceptions import BackboneError, TrainingError
from addenda.learner import Augmentation
from addenda.learner.activation_cache import ActivationCache
from addenda.learner.activations import Activations
from addenda.learner.data import LabelledImages, open_images
from tests.support.images import colour_folder
from tests.support.models import backbone, images
from tests.support.tasks import random_task
from tests.support.tiny import tiny_eva

BASELINES = ("full", "lora-4", "unmasked-2", "attentive")
QUICK = BaselineConfig(epochs=2, batch_size=8)


def needs(method: str) -> object:
    marks = [pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")] if "lora" in method else []
    return pytest.param(method, marks=marks)


each_baseline = pytest.mark.parametrize("method", [needs(method) for method in BASELINES])


@pytest.fixture
def train(tmp_path: Path) -> LabelledImages:
    return open_images(colour_folder(tmp_path / "train"))


@pytest.fixture
def test(tmp_path: Path) -> LabelledImages:
    return open_images(colour_folder(tmp_path / "test", per_class=6, seed=1))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("head", {"head_only": True}),
        ("head+class", {"num_memory_tokens": 0}),
        ("memory-10", {"num_memory_tokens": 10}),
        ("adapters-8", {"adapter_rank": 8}),
    ],
)
def test_a_registrable_regime_is_no_more_than_settings(method: str, settings: dict[str, object]) -> None:
    assert method_config(method, LearnConfig(epochs=3)) == LearnConfig(epochs=3, **settings)
    assert not is_baseline(method)


def test_what_a_user_gets_takes_the_seed_alone_of_what_is_compared() -> None:
    compared = LearnConfig(epochs=3, seed=2, refit=False)
    assert method_config("default", compared) == LearnConfig(seed=2)
    assert method_config("layer-probe", compared) == LearnConfig(seed=2, head_only=True)
    assert method_config("default+adapters", compared) == LearnConfig(seed=2, adapter_rank="auto")


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("full", "it changes the backbone's own weights"),
        ("lora-8", "its updates change what the backbone's own tokens become"),
        ("unmasked-5", "without the mask the frozen tokens see the task's"),
        ("attentive", "a task has no such head"),
    ],
)
def test_a_rival_cannot_be_registered_and_the_error_says_why(method: str, why: str) -> None:
    assert is_baseline(method)
    with pytest.raises(TrainingError) as raised:
        method_config(method, LearnConfig())
    message = f"Regime {method!r} cannot be registered: {why}, so tasks learned before would not keep their bits."
    assert str(raised.value).startswith(message)
    assert (
        "Registrable: head, head+class, memory-M, adapters-R, linear-probe, layer-probe, default, default+adapters."
        in str(raised.value)
    )


@pytest.mark.parametrize("method", ["memory", "memory-0", "lora-x", "prompt-5", "head-2", ""])
def test_an_unknown_regime_is_refused_with_the_known_ones(method: str) -> None:
    with pytest.raises(TrainingError, match=r"is not known. Known: head, head\+class, memory-M, adapters-R, .*full"):
        is_baseline(method)


def test_what_is_no_rival_is_not_trained_as_one(tiny: FrozenBackbone, train: LabelledImages) -> None:
    with pytest.raises(TrainingError, match="'memory-5' is no rival: `Learner` learns it"):
        train_baseline("memory-5", tiny, train)


@each_baseline
def test_a_rival_learns_and_leaves_the_backbone_as_it_was(
    method: str, tiny: FrozenBackbone, train: LabelledImages, test: LabelledImages
) -> None:
    epochs = 8 if method == "attentive" else 2  # the others start as the regression
    baseline = train_baseline(method, tiny, train, test, replace(QUICK, epochs=epochs))
    assert 1 <= baseline.epoch <= epochs
    assert baseline.rate in paper_methods.RATES[method.partition("-")[0]]
    assert baseline.num_images == epochs * 19  # epochs, four fifths of the images
    assert baseline.right is not None
    assert baseline.last_right is not None
    assert baseline.right.shape == baseline.last_right.shape == (len(test),)
    assert baseline.right.float().mean() > 0.8
    tiny.check_unchanged()


@pytest.mark.parametrize(
    "method", [needs(method) for method in BASELINES if method != "attentive"]
)  # whose head is new
def test_a_rival_starts_as_the_regression_of_the_same_split(
    method: str, tiny: FrozenBackbone, train: LabelledImages
) -> None:
    activations = Activations(tiny, train, Augmentation(), ActivationCache())
    rows, validation = train.objective.split(train.targets, 3, 0.2, 0)
    strength = train.objective.choose_strength(activations.pooled, train.targets, 0)
    fitted = train.objective.fit_linear_probe(activations.pooled[rows], train.targets[rows], strength)
    logits = F.linear(activations.pooled[validation], fitted.weight, fitted.bias)
    expected = F.cross_entropy(logits, train.targets[validation]).item()
    still = BaselineConfig(epochs=1, rates=(Rate("adamw", 1e-9),))
    loss = train_baseline(method, tiny, train, config=still).validation_loss
    near = 0.01 if "unmasked" in method else 1e-5  # a token that sees memory is near the class token, not equal to it
    assert loss == pytest.approx(expected, abs=near)


@each_baseline
def test_a_rival_is_the_same_for_the_same_seed_whatever_was_drawn_before(
    method: str, tiny: FrozenBackbone, train: LabelledImages
) -> None:
    def learned(draws: int, **options: object) -> dict[str, torch.Tensor]:
        torch.rand(draws)
        config = BaselineConfig(epochs=1, batch_size=8, rates=(Rate("adamw", 1e-3),), **options)
        return train_baseline(method, tiny, train, config=config).tensors

    once, again, other = learned(1), learned(2), learned(3, seed=1)
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in once.items())


def test_validation_chooses_and_the_test_images_do_not(
    tiny: FrozenBackbone, train: LabelledImages, test: LabelledImages
) -> None:
    config = BaselineConfig(epochs=2, rates=(Rate("adamw", 1e-3), Rate("adamw", 1e-9), Rate("adamw", 30.0)))
    alone = {
        rate: train_baseline("unmasked-2", tiny, train, test, BaselineConfig(epochs=2, rates=(rate,)))
        for rate in config.rates
    }
    best = min(alone.values(), key=lambda baseline: (-baseline.validation_accuracy, baseline.validation_loss))
    swept = train_baseline("unmasked-2", tiny, train, test, config)
    assert (swept.rate, swept.epoch) == (best.rate, best.epoch)
    assert swept.validation_loss == best.validation_loss
    assert torch.equal(swept.right, best.right)  # scored with its tensors, not those of the last one trained
    blind = train_baseline("unmasked-2", tiny, train, config=config)
    assert blind.right is None
    assert all(torch.equal(tensor, blind.tensors[name]) for name, tensor in swept.tensors.items())


def test_a_rival_that_diverges_everywhere_says_so(tiny: FrozenBackbone, train: LabelledImages) -> None:
    config = BaselineConfig(epochs=1, batch_size=4, rates=(Rate("adamw", 1e30),))
    with pytest.raises(TrainingError, match=r"'full' diverged with each of adamw 1e\+30"):
        train_baseline("full", tiny, train, config=config)


def test_a_rival_learns_from_the_very_views_that_a_task_does(tiny: FrozenBackbone, train: LabelledImages) -> None:
    how = Augmentation(views=2)
    activations = Activations(tiny, train, how, ActivationCache())
    views = paper_methods._read_views(train, tiny, how)
    assert views.shape == (3, 24, 3, 32, 32)
    for view in range(3):
        for row in (0, 13):
            ((_, seen),) = activations._views(train.item(row), [view * 24 + row])
            assert torch.equal(views[view, row], seen)
    config = BaselineConfig(epochs=1, rates=(Rate("adamw", 1e-3),))
    varied = train_baseline(
        "unmasked-2", tiny, train, config=BaselineConfig(epochs=1, rates=(Rate("adamw", 1e-3),), augmentation=how)
    )
    plain = train_baseline("unmasked-2", tiny, train, config=config)
    assert not torch.equal(varied.tensors["memory.0"], plain.tensors["memory.0"])
    with pytest.raises(TrainingError, match="fresh ones are not for them"):
        train_baseline("full", tiny, train, config=BaselineConfig(augmentation=Augmentation(fresh=True)))


def test_bfloat16_is_used_where_it_is_asked_for(tiny: FrozenBackbone, train: LabelledImages) -> None:
    losses = {
        autocast: train_baseline(
            "full", tiny, train, config=BaselineConfig(epochs=1, autocast=autocast)
        ).validation_loss
        for autocast in (True, False)
    }
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.1)


def test_a_joined_rival_alone_is_itself_and_in_company_is_moved() -> None:
    on, pictures = backbone(), images(48)
    tasks = {name: random_task(on, name, seed=seed) for seed, name in enumerate(("one", "other"))}
    baselines, tests = {}, {}
    for name, task in tasks.items():
        alone = DenseMask(on, [task], masked=False)
        baselines[name] = {key: parameter.detach() for key, parameter in alone.named_parameters()}
        answers = alone(pictures)[name].argmax(1)
        tests[name] = LabelledImages(name, task.labels, answers, torch.utils.data.TensorDataset(pictures, answers))
        assert joined_accuracies(on, {name: baselines[name]}, {name: tests[name]}) == {name: 1.0}
    joined = joined_accuracies(on, baselines, tests)
    assert min(joined.values()) < 1


@pytest.mark.slow
def test_without_peft_lora_says_what_to_install() -> None:
    code = """
import sys; sys.modules["peft"] = None
import torch
from addenda.benchmarks.baselines.paper_methods import _low_rank
_low_rank(torch.nn.Linear(2, 2), 8)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Regime 'lora-8' needs PEFT" in found.stderr
    assert "pip install 'addenda[bench]'" in found.stderr


def test_lora_on_another_family_than_it_was_written_for_is_refused(train: LabelledImages) -> None:
    on = FrozenBackbone(tiny_eva("dinov3"), "dinov3", "hub")
    with pytest.raises(
        BackboneError, match="The regime 'lora-4' is for timm's VisionTransformer; backbone 'dinov3' is timm's Eva"
    ):
        train_baseline("lora-4", on, train, config=QUICK)
    assert train_baseline("full", on, train, config=QUICK).num_images > 0
