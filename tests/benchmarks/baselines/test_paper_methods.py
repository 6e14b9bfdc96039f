"""Methods of `bench paper`: which are settings of the learner, which are baselines, and how these are trained."""

from __future__ import annotations

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
from addenda.benchmarks.baselines.finetuning import Classifier
from addenda.benchmarks.baselines.paper_methods import (
    BaselineConfig,
    Rate,
    _low_rank,
    baseline_logits,
    best_baseline,
    is_baseline,
    joined_accuracies,
    method_config,
    train_baselines,
)
from addenda.exceptions import AddendaError, BackboneError, TrainingError
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
def test_a_registrable_method_is_only_settings(method: str, settings: dict[str, object]) -> None:
    assert method_config(method, LearnConfig(epochs=3)) == LearnConfig(epochs=3, **settings)
    assert not is_baseline(method)


def test_methods_as_shipped_take_only_the_seed() -> None:
    config = LearnConfig(epochs=3, seed=2, refit=False)
    assert method_config("default", config) == LearnConfig(seed=2)
    assert method_config("layer-probe", config) == LearnConfig(seed=2, head_only=True)
    assert method_config("default+adapters", config) == LearnConfig(seed=2, adapter_rank="auto")


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("full", "it changes the backbone's own weights"),
        ("lora-8", "its updates change the backbone's own tokens"),
        ("unmasked-5", "without the mask, the frozen tokens attend to the task's"),
        ("attentive", "tasks have no attentive head"),
    ],
)
def test_a_baseline_cannot_be_registered_and_the_error_says_why(method: str, reason: str) -> None:
    assert is_baseline(method)
    with pytest.raises(TrainingError) as raised:
        method_config(method, LearnConfig())
    message = f"Method {method!r} cannot be registered: {reason}, so the logits of earlier tasks would change."
    assert str(raised.value).startswith(message)
    assert (
        "Registrable: head, head+class, memory-M, adapters-R, linear-probe, layer-probe, default, default+adapters."
        in str(raised.value)
    )


@pytest.mark.parametrize("method", ["memory", "memory-0", "lora-x", "prompt-5", "head-2", ""])
def test_an_unknown_method_is_refused_with_the_known_ones(method: str) -> None:
    with pytest.raises(TrainingError, match=r"Unknown method .*Known: head, head\+class, memory-M, adapters-R, .*full"):
        is_baseline(method)


def test_a_registrable_method_is_not_trained_as_a_baseline(tiny: FrozenBackbone, train: LabelledImages) -> None:
    with pytest.raises(TrainingError, match="'memory-5' is not a baseline; `Learner` learns it"):
        best_baseline(train_baselines("memory-5", tiny, train))


@each_baseline
def test_a_baseline_learns_and_leaves_the_backbone_unchanged(
    method: str, tiny: FrozenBackbone, train: LabelledImages, test: LabelledImages
) -> None:
    epochs = 8 if method == "attentive" else 2  # the others start from the linear probe
    baseline = best_baseline(train_baselines(method, tiny, train, test, replace(QUICK, epochs=epochs)))
    assert 1 <= baseline.epoch <= epochs
    assert baseline.rate in paper_methods.RATES[method.partition("-")[0]]
    assert baseline.num_images == epochs * 19  # four fifths of the images per epoch
    assert baseline.right is not None
    assert baseline.last_right is not None
    assert baseline.right.shape == baseline.last_right.shape == (len(test),)
    assert baseline.right.float().mean() > 0.8
    tiny.check_unchanged()


@pytest.mark.parametrize(
    "method", [needs(method) for method in BASELINES if method != "attentive"]
)  # the attentive head is new
def test_a_baseline_starts_as_the_linear_probe_of_the_same_split(
    method: str, tiny: FrozenBackbone, train: LabelledImages
) -> None:
    activations = Activations(tiny, train, Augmentation(), ActivationCache())
    rows, validation = train.objective.split(train.targets, 3, 0.2, 0)
    strength = train.objective.choose_strength(activations.pooled, train.targets, 0)
    linear_probe = train.objective.fit_linear_probe(activations.pooled[rows], train.targets[rows], strength)
    logits = F.linear(activations.pooled[validation], linear_probe.weight, linear_probe.bias)
    expected = F.cross_entropy(logits, train.targets[validation]).item()
    tiny_rate = BaselineConfig(epochs=1, rates=(Rate("adamw", 1e-9),))
    loss = best_baseline(train_baselines(method, tiny, train, config=tiny_rate)).validation_loss
    tolerance = 0.01 if "unmasked" in method else 1e-5  # a token that attends to memory differs from the class token
    assert loss == pytest.approx(expected, abs=tolerance)


@each_baseline
def test_a_seed_determines_a_baseline_whatever_was_drawn_before(
    method: str, tiny: FrozenBackbone, train: LabelledImages
) -> None:
    def learned(draws: int, **options: object) -> dict[str, torch.Tensor]:
        torch.rand(draws)
        config = BaselineConfig(epochs=1, batch_size=8, rates=(Rate("adamw", 1e-3),), **options)
        return best_baseline(train_baselines(method, tiny, train, config=config)).tensors

    first, again, other = learned(1), learned(2), learned(3, seed=1)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_validation_selects_the_rate_and_test_images_do_not(
    tiny: FrozenBackbone, train: LabelledImages, test: LabelledImages
) -> None:
    config = BaselineConfig(epochs=2, rates=(Rate("adamw", 1e-3), Rate("adamw", 1e-9), Rate("adamw", 30.0)))
    alone = {
        rate: best_baseline(train_baselines("unmasked-2", tiny, train, test, BaselineConfig(epochs=2, rates=(rate,))))
        for rate in config.rates
    }
    best = min(alone.values(), key=lambda baseline: (-baseline.validation_accuracy, baseline.validation_loss))
    swept = best_baseline(train_baselines("unmasked-2", tiny, train, test, config))
    assert (swept.rate, swept.epoch) == (best.rate, best.epoch)
    assert swept.validation_loss == best.validation_loss
    assert torch.equal(swept.right, best.right)  # scored with its own tensors, not with the last trained
    without_test = best_baseline(train_baselines("unmasked-2", tiny, train, config=config))
    assert without_test.right is None
    assert all(torch.equal(tensor, without_test.tensors[name]) for name, tensor in swept.tensors.items())


def test_divergence_with_every_rate_is_an_error(tiny: FrozenBackbone, train: LabelledImages) -> None:
    config = BaselineConfig(epochs=1, batch_size=4, rates=(Rate("adamw", 1e30),))
    with pytest.raises(TrainingError, match=r"'full' diverged with each of adamw 1e\+30"):
        best_baseline(train_baselines("full", tiny, train, config=config))


def test_a_baseline_learns_from_the_same_views_as_a_task(tiny: FrozenBackbone, train: LabelledImages) -> None:
    augmentation = Augmentation(views=2)
    activations = Activations(tiny, train, augmentation, ActivationCache())
    views = paper_methods._read_views(train, tiny, augmentation)
    assert views.shape == (3, 24, 3, 32, 32)
    for view in range(3):
        for row in (0, 13):
            ((_, expected),) = activations._frozen._views(train.item(row), [view * 24 + row])
            assert torch.equal(views[view, row], expected)
    config = BaselineConfig(epochs=1, rates=(Rate("adamw", 1e-3),))
    augmented = best_baseline(
        train_baselines("unmasked-2", tiny, train, config=replace(config, augmentation=augmentation))
    )
    plain = best_baseline(train_baselines("unmasked-2", tiny, train, config=config))
    assert not torch.equal(augmented.tensors["memory.0"], plain.tensors["memory.0"])
    with pytest.raises(TrainingError, match="do not support `fresh` augmentation"):
        best_baseline(
            train_baselines("full", tiny, train, config=BaselineConfig(augmentation=Augmentation(fresh=True)))
        )


def test_bfloat16_autocast_changes_the_loss_a_little(tiny: FrozenBackbone, train: LabelledImages) -> None:
    losses = {
        autocast: best_baseline(
            train_baselines("full", tiny, train, config=BaselineConfig(epochs=1, autocast=autocast))
        ).validation_loss
        for autocast in (True, False)
    }
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.1)


def test_joining_unmasked_baselines_changes_their_predictions() -> None:
    tiny, pixels = backbone(), images(48)
    tasks = {name: random_task(tiny, name, seed=seed) for seed, name in enumerate(("first", "second"))}
    baselines, tests = {}, {}
    for name, task in tasks.items():
        alone = DenseMask(tiny, [task], masked=False)
        baselines[name] = {key: parameter.detach() for key, parameter in alone.named_parameters()}
        predicted = alone(pixels)[name].argmax(1)
        tests[name] = LabelledImages(name, task.labels, predicted, torch.utils.data.TensorDataset(pixels, predicted))
        assert joined_accuracies(tiny, {name: baselines[name]}, {name: tests[name]}) == {name: 1.0}
    joined = joined_accuracies(tiny, baselines, tests)
    assert min(joined.values()) < 1


def test_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AddendaError, match=r"Method 'lora-8' requires PEFT.*pip install 'addenda\[bench\]'"):
        _low_rank(torch.nn.Linear(2, 2), 8)


def test_lora_on_another_backbone_family_is_refused(train: LabelledImages) -> None:
    dinov3 = FrozenBackbone(tiny_eva("dinov3"), "dinov3", "hub")
    with pytest.raises(
        BackboneError, match="The method 'lora-4' requires timm's VisionTransformer; backbone 'dinov3' is timm's Eva"
    ):
        best_baseline(train_baselines("lora-4", dinov3, train, config=QUICK))
    assert best_baseline(train_baselines("full", dinov3, train, config=QUICK)).num_images > 0


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_models_whose_head_has_another_name_are_fine_tuned(kind: str, train: LabelledImages) -> None:
    on = backbone(kind)
    trained = best_baseline(train_baselines("full", on, train, config=QUICK))
    assert baseline_logits(on, trained, train.read_all(on)[:2]).shape == (2, 3)
    assert Classifier(on, 3, autocast=False)(images(2)).shape == (2, 3)
