"""The baselines of the continual benchmark, on three experiences of coloured noise."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from addenda import FrozenBackbone
from addenda.benchmarks.baselines.finetuning import Classifier, FineTuning, SchedulePlugin
from addenda.benchmarks.baselines.frozen_features import RIDGES, FeCAM, GaussianReplay, choose_ridge
from addenda.benchmarks.baselines.method import BaselineSettings, Method, Scores
from addenda.benchmarks.baselines.methods import BASELINES, baseline
from addenda.benchmarks.baselines.paper_methods import (
    BaselineConfig,
    Rate,
    baseline_logits,
    best_baseline,
    train_baselines,
)
from addenda.benchmarks.baselines.per_task import train
from addenda.benchmarks.continual.stream import Experience, Stream
from addenda.benchmarks.strategy import NEVER
from addenda.exceptions import TrainingError
from addenda.learner.candidates import schedule
from addenda.learner.data import LabelledImages
from addenda.learner.objectives import accuracy

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche and what it imports warn while they load

COLOURS = ((210, 40, 40), (40, 180, 60), (50, 60, 210), (220, 220, 40), (30, 30, 30), (200, 60, 220))
PAIRS = ((0, 1), (2, 3), (4, 5))
QUICK = BaselineSettings(
    epochs=8, batch_size=8, finetuning_rate=1e-3, full_rates=(3e-3,), lora_rates=(1e-2,),
    warmup_steps=2, views=1, ranpac_width=60, replay_images=12, ewc_lambda=1.0, gaussian_samples=32,
)  # fmt: skip
PER_TASK = ("linear-probe", "lora-8", "full")
ONE_HEAD = tuple(name for name in BASELINES if name not in PER_TASK)


def noise(classes: Sequence[int], per_class: int, seed: int, where: str) -> LabelledImages:
    """PIL images of one noisy colour per class."""
    random = np.random.default_rng(seed)
    targets = [number for number in classes for _ in range(per_class)]
    items = []
    for number in targets:
        pixels = np.array(COLOURS[number]) + random.normal(0, 40, (34, 36, 3))
        items.append((Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), number))
    return LabelledImages(where, tuple("abcdef"), torch.tensor(targets), items)


def stream(groups: Sequence[Sequence[int]] = PAIRS) -> Stream:
    experiences = [
        Experience(f"e{i}", noise(classes, 8, i, f"train {i}"), noise(classes, 5, 50 + i, f"test {i}"))
        for i, classes in enumerate(groups)
    ]
    return Stream("noise", tuple("abcdef"), tuple(experiences))


STREAM = stream()
STREAMS = {"pairs": STREAM, "two": stream(PAIRS[:2]), "domains": stream([(0, 2, 4), (0, 2, 4)])}


def make(name: str, backbone: FrozenBackbone, stream: Stream = STREAM, seed: int = 0, **settings: object) -> Method:
    return baseline(name).make(name, stream, backbone, replace(QUICK, **settings), seed)


@cache
def learned(
    name: str, backbone: FrozenBackbone, stream: str = "pairs", count: int | None = None, **options: object
) -> Method:
    method = make(name, backbone, STREAMS[stream], **options)
    for number in range(len(STREAMS[stream].experiences) if count is None else count):
        method.learn(number)
    return method


def accuracy_on(experience: Experience, scores: torch.Tensor) -> float:
    return accuracy(scores, experience.test.targets)


def columns(scores: torch.Tensor) -> set[int]:
    """Classes that can be predicted; they must be the same for all images."""
    possible = scores > NEVER
    assert (possible == possible[0]).all()
    return set(possible[0].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("name", BASELINES)
def test_every_method_learns_task_incrementally_and_never_predicts_unseen_classes(
    name: str, tiny: FrozenBackbone
) -> None:
    method = make(name, tiny)
    assert columns(method.scores(STREAM.experiences[0]).class_incremental) == set()
    before = tiny.backbone_logits(torch.ones(1, 3, 32, 32))
    for number, experience in enumerate(STREAM.experiences):
        method.learn(number)
        scores = method.scores(experience)
        if name == "joint" and number < 2:
            assert columns(scores.class_incremental) == columns(scores.task_incremental) == set()
            continue
        assert columns(scores.task_incremental) == set(experience.classes)
        assert columns(scores.class_incremental) == set(range(2 * number + 2))
        assert accuracy_on(experience, scores.task_incremental) >= 0.8
        if number < 2:
            assert columns(method.scores(STREAM.experiences[2]).task_incremental) == set()
    assert torch.equal(tiny.backbone_logits(torch.ones(1, 3, 32, 32)), before)
    tiny.check_unchanged()


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_seed_gives_the_same_scores(name: str, tiny: FrozenBackbone) -> None:
    def class_incremental(method: Method) -> torch.Tensor:
        return torch.cat([method.scores(experience).class_incremental for experience in STREAMS["two"].experiences])

    first = class_incremental(learned(name, tiny, "two", epochs=1))
    torch.rand(5)  # the global generator's state does not matter
    assert torch.equal(first, class_incremental(learned.__wrapped__(name, tiny, "two", epochs=1)))
    if name not in ("nearest-mean", "fecam", *PER_TASK):
        assert not torch.equal(first, class_incremental(learned(name, tiny, "two", epochs=1, seed=4)))


@pytest.mark.slow
def test_naive_fine_tuning_forgets_and_replay_ewc_and_lwf_change_it(tiny: FrozenBackbone) -> None:
    first = STREAM.experiences[0]
    assert accuracy_on(first, learned("naive", tiny, count=1).scores(first).class_incremental) >= 0.9
    naive = learned("naive", tiny).scores(first).class_incremental
    assert accuracy_on(first, naive) <= 0.2
    replay = learned("replay", tiny).scores(first).class_incremental
    assert accuracy_on(first, replay) >= 0.8
    for name in ("ewc", "lwf"):
        assert not torch.equal(learned(name, tiny).scores(first).class_incremental, naive)


@pytest.mark.parametrize("name", PER_TASK)
def test_task_incremental_scores_of_per_task_methods_never_change(name: str, tiny: FrozenBackbone) -> None:
    first = STREAM.experiences[0]
    alone = learned(name, tiny, "two", count=1, epochs=1).scores(first)
    among = learned.__wrapped__(name, tiny, "two", epochs=1).scores(first)  # computed for the first time here
    assert alone.task_incremental.numpy().tobytes() == among.task_incremental.numpy().tobytes()
    assert torch.equal(among.class_incremental[:, :2], among.task_incremental[:, :2])
    assert (among.class_incremental[:, 2:4] > NEVER).all()


@pytest.mark.parametrize("name", BASELINES)
def test_classes_may_be_shared_by_all_experiences(name: str, tiny: FrozenBackbone) -> None:
    domains = STREAMS["domains"]
    assert domains.experiences[0].classes == domains.experiences[1].classes
    method = learned(name, tiny, "domains")
    scores = [method.scores(experience) for experience in domains.experiences]
    task_incremental, class_incremental = zip(*scores, strict=True)
    assert columns(torch.cat(class_incremental)) == columns(torch.cat(task_incremental)) == {0, 2, 4}
    accuracies = [accuracy_on(*pair) for pair in zip(domains.experiences, task_incremental, strict=True)]
    assert min(accuracies) >= 0.8
    if name in ONE_HEAD:
        assert all(torch.equal(*pair) for pair in zip(task_incremental, class_incremental, strict=True))
    else:
        assert all((pair[1] >= pair[0]).all() for pair in zip(task_incremental, class_incremental, strict=True))
        assert any((pair[1] > pair[0]).any() for pair in zip(task_incremental, class_incremental, strict=True))


def test_prices_count_the_stored_bytes(tiny: FrozenBackbone) -> None:
    classes, width = 6, tiny.embed_dim
    pixels = 3 * 32 * 32
    weights = 4 * sum(p.numel() for p in Classifier(tiny, classes, False).parameters())
    stored_bytes = {
        "naive": weights / 2,
        "joint": (weights + 32 * pixels) / 2,
        "ewc": 2 * weights / 2,
        "lwf": weights / 2,
        "replay": (weights + 12 * pixels) / 2,
        "nearest-mean": 4 * classes * width / 2,
        "slda": 4 * (classes * width + classes + width**2) / 2,
        "ranpac": (4 * width * 60 + 8 * (60 * 60 + 2 * 60 * classes)) / 2,
        "fecam": 4 * 4 * (width + width**2) / 2,
        "gaussian-replay": 4 * 4 * (width + width**2) / 2,
        "linear-probe": 4 * 2 * (width + 1),
    }
    for name, expected in stored_bytes.items():
        price = learned(name, tiny, "two", epochs=1).price()
        assert price.stored_bytes == pytest.approx(expected), name
        # A pooled feature needs less than the whole last block; RanPAC adds a projection.
        expected_inference = {"naive": 1, "joint": 1, "ewc": 1, "lwf": 1, "replay": 1}.get(name, 0.805)
        if name == "ranpac":
            assert 0.806 < price.relative_inference < 0.9
        else:
            assert price.relative_inference == pytest.approx(expected_inference, abs=1e-3), name
    full, lora = (learned(name, tiny, "two", epochs=1).price() for name in ("full", "lora-8"))
    assert full.relative_inference == lora.relative_inference == 2
    assert full.stored_bytes == weights - 4 * (classes - 2) * (width + 1)
    assert 4 * 8 * 3 * 2 * width < lora.stored_bytes < full.stored_bytes


@pytest.mark.parametrize("method", ["full", "lora-4", "attentive"])
def test_logits_of_a_trained_baseline_reproduce_its_test_score(method: str, tiny: FrozenBackbone) -> None:
    experience = stream([(0, 1, 2, 3, 4, 5)]).experiences[0]
    train, test = experience.relabelled(experience.train), experience.relabelled(experience.test)
    baseline = best_baseline(
        train_baselines(method, tiny, train, test, BaselineConfig(epochs=2, batch_size=8, rates=(Rate("adamw", 3e-3),)))
    )
    logits = baseline_logits(tiny, baseline, test.read_all(tiny))
    assert torch.equal(logits.argmax(1) == test.targets, baseline.right)
    assert not baseline.right.all() or torch.unique(logits, dim=0).shape[0] == len(test)
    assert method != "attentive" or baseline.tensors["batch_norm.running_mean"].any()


@pytest.mark.parametrize("name", ["naive", "lwf", "replay", "joint"])
def test_each_experience_has_a_full_schedule(name: str, tiny: FrozenBackbone) -> None:
    method = learned(name, tiny, "two", epochs=1)
    assert isinstance(method, FineTuning)
    plugin = next(plugin for plugin in method._strategy.plugins if isinstance(plugin, SchedulePlugin))
    steps = 4 if name == "joint" else 2  # 16 images per experience, batches of 8
    assert plugin._step == steps
    last = QUICK.finetuning_rate * schedule(steps - 1, QUICK.warmup_steps, steps)
    assert method._strategy.optimizer.param_groups[0]["lr"] == pytest.approx(last)


def test_avalanches_deprecation_warnings_are_hidden(tiny: FrozenBackbone) -> None:
    with warnings.catch_warnings(record=True) as caught:
        learned.__wrapped__("replay", tiny, "two", count=1, epochs=1)
    assert caught == []


def test_augmentation_changes_fine_tuning(tiny: FrozenBackbone) -> None:
    plain, augmented = (
        learned("naive", tiny, "two", count=1, epochs=1, augment=augment).scores(STREAM.experiences[0]).task_incremental
        for augment in (False, True)
    )
    assert not torch.equal(plain, augmented)


def test_lwf_distils_every_class_seen_before(tiny: FrozenBackbone) -> None:
    method = learned("lwf", tiny, epochs=1)
    assert isinstance(method, FineTuning)
    plugin = next(plugin for plugin in method._strategy.plugins if hasattr(plugin, "lwf"))
    assert plugin.lwf.prev_classes_by_task[0] == {0, 1, 2, 3, 4, 5}


def test_the_dual_solution_selects_the_same_ridge_as_the_primal() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 15, generator=random).relu().double()
    one_hot = F.one_hot(torch.arange(40) % 3, 3).double()
    for noise in (0.0, 1.0, 30.0):
        noisy = hidden + noise * torch.randn(hidden.shape, generator=random).double()
        errors = []
        for ridge in RIDGES:  # as in the authors' code
            weight = torch.linalg.solve(noisy[:32].T @ noisy[:32] + ridge * torch.eye(15), noisy[:32].T @ one_hot[:32])
            errors.append((noisy[32:] @ weight - one_hot[32:]).square().mean().item())
        assert choose_ridge(noisy, one_hot) == RIDGES[int(np.argmin(errors))]


def test_ranpac_is_a_ridge_regression_on_all_images_so_far(tiny: FrozenBackbone) -> None:
    from addenda.benchmarks.baselines.frozen_features import RanPAC

    method = learned("ranpac", tiny)
    assert isinstance(method, RanPAC)
    features = torch.cat([method.pooled(experience.train) for experience in STREAM.experiences])
    targets = torch.cat([experience.train.targets for experience in STREAM.experiences])
    hidden = (features @ method._projection).relu().double()
    assert torch.allclose(method._gram, hidden.T @ hidden)
    assert torch.allclose(method._sums, hidden.T @ F.one_hot(targets, 6).double())


def test_class_gaussians_are_the_mean_and_covariance_of_all_images_of_a_class(tiny: FrozenBackbone) -> None:
    method = learned("gaussian-replay", tiny, "domains")
    assert isinstance(method, GaussianReplay)
    experiences = STREAMS["domains"].experiences
    features = torch.cat([method.pooled(experience.train) for experience in experiences]).double().numpy()
    targets = torch.cat([experience.train.targets for experience in experiences]).numpy()
    gaussians = method._gaussians()
    assert list(gaussians) == [0, 2, 4]
    for number, (mean, covariance) in gaussians.items():
        rows = features[targets == number]
        assert len(rows) == 16
        np.testing.assert_allclose(mean, rows.mean(0), atol=1e-9)
        np.testing.assert_allclose(covariance, np.cov(rows.T), atol=1e-9)


def test_fecam_is_the_distance_to_each_class_under_its_shrunk_and_normalised_covariance(tiny: FrozenBackbone) -> None:
    method = learned("fecam", tiny, "domains")
    assert isinstance(method, FeCAM)
    experiences = STREAMS["domains"].experiences
    rows = [F.normalize(method.pooled(experience.train), dim=1).double().numpy() for experience in experiences]
    features, targets = np.concatenate(rows), torch.cat([e.train.targets for e in experiences]).numpy()
    images = F.normalize(method.pooled(experiences[0].test), dim=1).double().numpy()
    scores, identity = method._logits(experiences[0].test), np.eye(tiny.embed_dim)
    for number in (0, 2, 4):
        mean, covariance = features[targets == number].mean(0), np.cov(features[targets == number].T)
        for _ in range(2):
            diagonal = np.diag(covariance).mean()
            covariance = covariance + 2.3 * diagonal * identity
        deviations = np.sqrt(np.diag(covariance))
        differences = images - mean / np.linalg.norm(mean)
        solved = np.linalg.solve(covariance / np.outer(deviations, deviations), differences.T).T
        np.testing.assert_allclose(scores[:, number], -(solved * differences).sum(1), rtol=2e-3)


def test_first_session_adaptation_merges_the_first_experiences_lora(tiny: FrozenBackbone) -> None:
    method = learned("ranpac-adapted", tiny, "two", epochs=1)
    experience = STREAM.experiences[0]
    images, test = experience.relabelled(experience.train), experience.relabelled(experience.test)
    lora = train("lora-8", tiny, images, method.settings, method.settings.lora_rates, seed=0)
    pixels = test.read_all(tiny)
    expected = baseline_logits(tiny, lora, pixels)
    assert torch.allclose(method.backbone.backbone_logits(pixels), expected, atol=1e-5)
    assert not torch.allclose(method.pooled(experience.test), learned("ranpac", tiny, "two").pooled(experience.test))
    weights = sum(parameter.nbytes for parameter in method.backbone.weights.parameters())
    ranpac = learned("ranpac", tiny, "two", epochs=1).price()
    assert method.price().stored_bytes == pytest.approx(ranpac.stored_bytes + weights / 2)
    assert method.price().relative_inference == ranpac.relative_inference


def test_unknown_and_invalid_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rat"):
        BaselineSettings(learning_rat=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="epochs"):
        BaselineSettings(epochs=0)


def test_every_baseline_has_its_own_label() -> None:
    assert len({info.label for info in BASELINES.values()}) == len(BASELINES)
    assert baseline("lora-3").note.startswith("rank 3, with PEFT; no task-incremental forgetting")
    for unknown in ("lora-0", "lora", "der"):
        with pytest.raises(TrainingError, match=rf"Unknown baseline '{unknown}'. Known: naive, joint"):
            baseline(unknown)


def test_autocast_changes_the_forward_pass_but_not_the_precision_of_the_logits(tiny: FrozenBackbone) -> None:
    def scores(name: str, autocast: bool) -> Scores:
        return learned(name, tiny, count=1, epochs=1, autocast=autocast).scores(STREAM.experiences[0])

    for name in ("naive", "full"):
        bfloat16, float32 = scores(name, True), scores(name, False)
        assert bfloat16.task_incremental.dtype == torch.float32
        assert not torch.equal(bfloat16.task_incremental, float32.task_incremental)
