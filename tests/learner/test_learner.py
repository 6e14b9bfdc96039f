"""Learning: what is chosen and stored, and that a run is reproducible."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry
from addenda.combined import Router, verify
from addenda.exceptions import BackboneError, NameTakenError, RegistryError, TrainingError
from addenda.learner import Epoch, learning_run, probes
from addenda.learner import trainer as trainer_module
from addenda.learner.activation_cache import ActivationCache
from addenda.learner.activations import Activations
from addenda.learner.augmentation import DEFAULT_VIEWS, Augmentation
from addenda.learner.candidates import first_tensors
from addenda.learner.data import Data, open_images
from addenda.learner.objectives import objective_of
from addenda.learner.token_stream import stream_features
from addenda.learner.trainer import Trainer, parent_memory
from tests.support.images import colour_folder
from tests.support.processes import FORKS, exit_code
from tests.support.tasks import random_task
from tests.support.tiny import tiny_eva, tiny_vit

QUICK = LearnConfig(
    optimizer="sgd", epochs=2, learning_rate=(0.1, 0.3), batch_size=8, augmentation=Augmentation(views=0),
    fall_back=False,
)  # fmt: skip
"""Keeps the token although the images are few and easy."""


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    colour_folder(tmp_path / "colours" / "train")
    colour_folder(tmp_path / "colours" / "test", per_class=4, seed=1)
    return tmp_path / "colours"


@pytest.fixture
def learner(tiny: FrozenBackbone, registry: Registry) -> Learner:
    return Learner(tiny, registry)


def test_a_learned_task_is_registered_with_its_scores_beside_the_probes(learner: Learner, colours: Path) -> None:
    task = learner.learn("colours", colours, config=QUICK)
    assert (task.ref, task.labels) == ("colours:1", ("blue", "green", "red"))
    assert task.memory is not None
    assert task.memory.shape == (3, 5, 48)
    for split, count in (("validation", 5), ("test", 12)):
        for scores in (task.metrics[split], task.metrics["linear_probe"][split], task.metrics["layer_probe"][split]):
            assert scores["num_images"] == count
            assert sum(map(sum, scores["confusion"])) == count
            assert set(scores["per_class"]) == {"blue", "green", "red"}
            assert 0 <= scores["accuracy"] <= 1
            assert 0 <= scores["calibration_error"] <= 1
    assert [row["learning_rate"] for row in task.metrics["candidates"]] == [0.1, 0.3]
    assert task.config["seed"] == 0
    assert learner.registry.record("colours").data["counts"] == [8, 8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov3", "eva02"])
def test_a_task_is_learned_on_an_eva_and_stays_as_it_is_when_another_joins(
    kind: str, registry: Registry, colours: Path
) -> None:
    eva = FrozenBackbone(tiny_eva(kind), kind, "hub")
    learner = Learner(eva, registry)
    task = learner.learn("colours", colours, config=replace(QUICK, fall_back=False))
    assert task.metrics["test"]["accuracy"] > 0.8
    assert task.memory is not None
    assert registry.record("colours").backbone == eva.fingerprint
    images = open_images(colours / "test")
    pixels = torch.stack([images.read(i, eva) for i in range(len(images))])
    alone = CombinedModel(eva, [task])(pixels)["colours"]
    learner.learn("more", colours, config=replace(QUICK, extends=("colours",), seed=1))
    together = CombinedModel(eva, registry.load(eva))(pixels)
    assert together.exact
    assert together["colours"].numpy().tobytes() == alone.numpy().tobytes()
    assert all(
        verdict.ok for verdict in verify(eva, [(task, registry.goldens(task.ref)) for task in registry.load(eva)])
    )
    router = Router({name: registry.statistics(f"{name}:1") for name in ("colours", "more")})
    features = CombinedModel(eva, [])(pixels, features=True).features
    assert len(router.choose(features)) == len(pixels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov3", "eva02", "eva02-small"])
def test_adapters_are_learned_on_plain_and_gated_mlps(kind: str, registry: Registry, colours: Path) -> None:
    learner = Learner(FrozenBackbone(tiny_eva(kind), kind, "hub"), registry)
    learner.learn("colours", colours, config=replace(QUICK, adapter_rank=4, fall_back=False))
    task = registry.get("colours")
    assert task.adapter_rank == 4
    assert task.adapters is not None
    assert all(update.up.abs().max() > 0 for update in task.adapters.values()), "every layer's update was trained"


def test_the_longest_name_leaves_room_for_the_probes(learner: Learner, colours: Path) -> None:
    name = "n" * 63
    metrics = learner.learn(name, colours, config=QUICK).metrics
    assert metrics["linear_probe"]["test"]["num_images"] == metrics["layer_probe"]["test"]["num_images"] == 12


@pytest.mark.parametrize("name", ["linear_probe", "layer_probe"])
def test_a_task_may_be_called_as_a_probe_is(learner: Learner, colours: Path, name: str) -> None:
    assert learner.learn(name, colours, config=QUICK).metrics[name]["test"]["num_images"] == 12


def test_the_test_score_is_the_combined_models(learner: Learner, tiny: FrozenBackbone, colours: Path) -> None:
    task = learner.learn("colours", colours, config=QUICK)
    images = open_images(colours / "test")
    pixels = torch.stack([images.read(i, tiny) for i in range(len(images))])
    logits = CombinedModel(tiny, [task])(pixels)["colours"]
    assert task.metrics["test"]["accuracy"] == (logits.argmax(1) == images.targets).float().mean().item()


class CountingDataset:
    """A dataset that counts how often each image is read."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.images, self.targets, self.reads = images, targets.tolist(), [0] * len(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads[index] += 1
        return self.images[index], self.targets[index]


def noise(count: int = 24, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    images = torch.randn(count, 3, 32, 32, generator=random)
    images[:, 0] += targets[:, None, None] - 1.0
    return images, targets


def activations_of(backbone: FrozenBackbone, data: Data, **options: object) -> Activations:
    arguments = {"augmentation": Augmentation(), "cache": ActivationCache(), **options}
    return Activations(backbone, open_images(data), **arguments)


def test_the_test_split_is_evaluated_once_and_does_not_influence_training(tiny: FrozenBackbone, tmp_path: Path) -> None:
    digests = set()
    for case in ("with", "without"):
        test = CountingDataset(*noise(seed=7))
        with Registry.open(tmp_path / f"{case}.db") as registry:
            test_data = test if case == "with" else None
            task = Learner(tiny, registry).learn("noise", CountingDataset(*noise()), test=test_data, config=QUICK)
            assert len(registry.evaluations("noise")) == (1 if case == "with" else 0)
        # Once before training, for the fingerprint and the check that it can be read, and once for its score.
        assert set(test.reads) == ({2} if case == "with" else {0})
        digests.add(task.sha256)
    assert len(digests) == 1


def test_the_same_run_is_not_repeated(learner: Learner, colours: Path) -> None:
    first = learner.learn("colours", colours, config=QUICK)
    generation = learner.registry.generation
    again = Learner(learner.backbone, learner.registry).learn("colours", colours, config=QUICK)
    assert (again.ref, again.sha256) == (first.ref, first.sha256)
    assert learner.registry.generation == generation


@pytest.mark.slow
def test_a_taken_name_is_refused_before_any_work_without_new_version(learner: Learner, colours: Path) -> None:
    learner.learn("colours", colours, config=QUICK)
    other = LearnConfig(epochs=1, seed=1, fall_back=False)
    reports: list[str] = []
    with pytest.raises(NameTakenError, match=r"'colours' is already registered.*--new-version"):
        learner.learn("colours", colours, config=other, report=lambda what, done, total: reports.append(what))
    assert reports == []
    assert learner.learn("colours", colours, config=other, new_version=True).ref == "colours:2"


def test_seed_data_and_numerics_fix_the_artifact(tiny: FrozenBackbone, colours: Path, tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        config = LearnConfig(epochs=2, learning_rate=(0.1, 0.3), seed=seed, fall_back=False)
        with Registry.open(tmp_path / f"{number}.db") as registry:
            learner = Learner(tiny, registry, ActivationCache(tmp_path / f"cache-{number}"))
            digests.append(learner.learn("colours", colours, config=config).sha256)
    assert digests[0] == digests[1] != digests[2]


REPEATED = LearnConfig(optimizer="sgd", epochs=2, learning_rate=(0.1, 0.3))


def learn_and_send(folder: Path, location: Path, cache: Path, sender: Connection) -> None:
    torch.set_num_threads(1)
    with Registry.open(location) as registry:
        learner = Learner(FrozenBackbone(tiny_vit(), "tiny", "hub"), registry, ActivationCache(cache))
        sender.send(learner.learn("colours", folder, config=REPEATED).sha256)


@pytest.mark.slow
@pytest.mark.usefixtures("another_interpreter")
def test_another_process_learns_the_same_artifact(tiny: FrozenBackbone, registry: Registry, tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "data")
    receiver, sender = FORKS.Pipe(duplex=False)
    assert exit_code(learn_and_send, folder, tmp_path / "other.db", tmp_path / "other-cache", sender) == 0
    assert Learner(tiny, registry).learn("colours", folder, config=REPEATED).sha256 == receiver.recv()


def test_training_lowers_the_loss_and_changes_every_tensor(tiny: FrozenBackbone) -> None:
    images, targets = noise(48)
    activations = activations_of(tiny, CountingDataset(images, targets))
    rows = torch.arange(48)
    linear_probe = objective_of(targets).fit_linear_probe(activations.pooled, targets, 0.01)
    config = LearnConfig(optimizer="sgd", epochs=20, learning_rate=0.03, batch_size=16, patience=20)
    trainer = Trainer(activations, [], config)
    (candidate,), history = trainer.run(linear_probe, config.candidates, rows, rows, 20, "sweep")
    start = first_tensors(tiny, linear_probe, candidate.settings, config.memory_std)
    assert history[-1].validation_loss[0] < F.cross_entropy(trainer.logits(start, rows), targets).item()
    for name, before in start.items():
        assert not torch.equal(before, candidate.best.tensors[name])


@pytest.mark.parametrize("layer_head", [True, False])
def test_a_token_that_does_not_pay_is_dropped_without_fall_back_false(
    tiny: FrozenBackbone, registry: Registry, layer_head: bool
) -> None:
    images, targets = noise(48)
    images[:, 0] += 20 * targets[:, None, None]  # easy for the probe; one bad epoch cannot beat it
    learner, data = Learner(tiny, registry), CountingDataset(images, targets)
    config = LearnConfig(optimizer="sgd", epochs=1, learning_rate=(1.0,), refit=False, layer_head=layer_head)
    without = learner.learn("without", data, config=config)
    assert (without.metrics["chosen"], without.metrics["token_weight"]) == (None, 0)
    assert without.class_token is None
    kept = learner.learn("kept", data, config=replace(config, fall_back=False))
    assert (kept.metrics["chosen"]["learning_rate"], kept.metrics["chosen"]["epoch"]) == (1.0, 1)
    assert kept.metrics["token_weight"] == (0.125 if layer_head else 1)
    assert kept.head_weight.any()


@pytest.mark.slow
def test_the_training_stream_is_the_combined_models_stream(tiny: FrozenBackbone) -> None:
    parent = random_task(tiny, "parent", memory=3, seed=1)
    child = random_task(tiny, "child", memory=5, parents=(parent,), seed=2, pooled=False)
    images, targets = noise(6)
    activations = activations_of(tiny, CountingDataset(images, targets), parents=[parent])
    inherited_memory = parent_memory(tiny, [parent])
    assert child.class_token is not None
    assert child.memory is not None
    batch = activations.batch(torch.arange(6))
    features = stream_features(tiny, batch, child.class_token[None], child.memory[None], inherited_memory)
    logits = features[0] @ child.head_weight.T + child.head_bias
    expected = CombinedModel(tiny, [child])(images)["child"]
    assert (logits - expected).abs().max() < 5e-3 * expected.abs().max()  # activations are cached in half precision
    alone = stream_features(tiny, batch, child.class_token[None], child.memory[None], [])
    assert (alone[0] - features[0]).abs().max() > 0.02


@pytest.mark.slow
def test_an_extension_names_what_it_extends_and_stays_exact(learner: Learner, colours: Path) -> None:
    parent = learner.learn("parent", colours, config=QUICK)
    config = LearnConfig(
        optimizer="sgd", epochs=1, learning_rate=(0.1,), extends=("parent",), num_memory_tokens=0, fall_back=False
    )
    child = learner.learn("child", colours, config=config)
    assert child.extends == ("parent:1",)
    images = noise(5)[0]
    alone = CombinedModel(learner.backbone, [parent])(images)["parent"]
    assert torch.equal(
        alone, CombinedModel(learner.backbone, learner.registry.load(learner.backbone))(images)["parent"]
    )


def test_a_token_of_weight_one_leaves_nothing_of_the_layer_probe(
    learner: Learner, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "MAX_RANK", 2)  # so that the layer weight of three classes is in two factors
    monkeypatch.setattr(learning_run, "best_weight", lambda *_: 1.0)
    monkeypatch.setattr(probes.LayerFeatures, "choose_recipe", lambda *_: probes.ProbeRecipe(0, (1.0, 1.0), 0.5))
    probe = learner.learn("probe", colours, config=replace(QUICK, head_only=True, fall_back=True))
    assert probe.layer_down is not None
    task = learner.learn("token", colours, config=QUICK)
    assert task.metrics["token_weight"] == 1
    assert (task.layer_weight, task.layer_down) == (None, None)


@pytest.mark.slow
def test_a_token_that_extends_named_tasks_is_never_dropped(learner: Learner, colours: Path) -> None:
    images, targets = noise(48)
    images[:, 0] += 20 * targets[:, None, None]  # easy for the probe
    data, config = CountingDataset(images, targets), LearnConfig(optimizer="sgd", epochs=1, learning_rate=(1.0,))
    learner.learn("parent", colours, config=QUICK)
    assert learner.learn("alone", data, config=config).class_token is None
    child = learner.learn("child", data, config=replace(config, extends=("parent",)))
    assert child.extends == ("parent:1",)
    assert child.class_token is not None
    assert child.metrics["token_weight"] > 0


@pytest.mark.slow
def test_two_versions_of_one_name_can_both_be_extended(learner: Learner, colours: Path) -> None:
    for seed in (0, 1):
        config = LearnConfig(optimizer="sgd", epochs=1, learning_rate=(0.1,), seed=seed, fall_back=False)
        learner.learn("parent", colours, config=config, new_version=seed > 0)
    config = LearnConfig(
        optimizer="sgd", epochs=1, learning_rate=(0.1,), extends=("parent:1", "parent:2"), fall_back=False
    )
    assert learner.learn("child", colours, config=config).extends == ("parent:1", "parent:2")
    assert learner.evaluate("child", colours).metrics["num_images"] == 12


def test_a_head_only_task_is_the_better_probe_and_cannot_be_extended(learner: Learner, colours: Path) -> None:
    task = learner.learn("head", colours, config=LearnConfig(head_only=True))
    assert task.class_token is None
    assert task.metrics["test"] == task.metrics["layer_probe"]["test"]
    linear = learner.learn("linear", colours, config=LearnConfig(head_only=True, layer_head=False))
    assert linear.metrics["test"] == linear.metrics["linear_probe"]["test"] == task.metrics["linear_probe"]["test"]
    assert linear.layer_weight is None
    assert "layer_probe" not in linear.metrics
    with pytest.raises(RegistryError, match="'head:1' is head-only"):
        learner.learn("child", colours, config=LearnConfig(extends=("head",)))


@pytest.mark.parametrize(
    "asked", [{"extends": ("any",)}, {"num_memory_tokens": 50}, {"adapter_rank": 8}, {"label_smoothing": 0.1}]
)
def test_settings_of_a_token_are_refused_for_a_head_only_task(
    learner: Learner, colours: Path, asked: dict[str, Any]
) -> None:
    with pytest.raises(TrainingError, match=f"head_only trains no token, so {next(iter(asked))} would have no effect"):
        learner.learn("head", colours, config=LearnConfig(head_only=True, **asked))


@pytest.mark.parametrize("layer_head", [False, True])
def test_balanced_class_weights_apply_to_the_probes(learner: Learner, layer_head: bool) -> None:
    images, targets = noise(64)
    targets[:] = 0
    targets[::8] = 1
    images[:, 0] += 0.5 * targets[:, None, None]
    config = LearnConfig(head_only=True, layer_head=layer_head, augmentation=Augmentation(views=0))
    chances = []
    for class_weights in ("none", "balanced"):
        weighted = replace(config, class_weights=class_weights)
        task = learner.learn(f"weights-{class_weights}", CountingDataset(images, targets), config=weighted)
        logits = CombinedModel(learner.backbone, [task])(images)[task.name]
        chances.append((logits / task.temperature).softmax(1)[:, 1].mean())
    assert chances[1] > chances[0]


def test_a_cache_of_0_writes_nothing(tiny: FrozenBackbone, registry: Registry, colours: Path, tmp_path: Path) -> None:
    learner = Learner(tiny, registry, ActivationCache(tmp_path / "cache", budget_gb=0))
    learner.learn("colours", colours, config=QUICK)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_no_task_of_the_same_images_is_tried_as_a_parent(
    learner: Learner, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []
    monkeypatch.setattr(learning_run, "promising", lambda _, pool, *rest: tried.append([t.ref for t in pool]) or [])
    learner.learn("same", colours, config=QUICK)
    learner.learn("other", colour_folder(tmp_path / "others", seed=9), config=QUICK)
    learner.learn("same", colours, config=replace(QUICK, extends="auto"), new_version=True)
    assert tried == [["other:1"]]


def test_on_epoch_sees_every_epoch_of_sweep_and_refit(learner: Learner, colours: Path) -> None:
    epochs: list[Epoch] = []
    task = learner.learn("colours", colours, config=replace(QUICK, fall_back=False), on_epoch=epochs.append)
    sweep = [e for e in epochs if e.phase == "sweep"]
    assert [e.epoch for e in sweep] == [1, 2]
    assert all(len(e.validation_loss) == len(e.train_loss) == 2 for e in sweep)
    refit = [e for e in epochs if e.phase == "refit"]
    assert len(refit) == task.metrics["chosen"]["epoch"]


@pytest.mark.slow
def test_refit_also_trains_on_the_validation_images(tiny: FrozenBackbone, colours: Path, tmp_path: Path) -> None:
    shas = set()
    for refit in (True, False):
        with Registry.open(tmp_path / f"{refit}.db") as registry:
            config = LearnConfig(optimizer="sgd", epochs=1, learning_rate=(0.1,), refit=refit)
            shas.add(Learner(tiny, registry).learn("colours", colours, config=config).sha256)
    assert len(shas) == 2


def test_an_error_is_raised_if_all_candidates_diverge(learner: Learner, colours: Path) -> None:
    config = LearnConfig(optimizer="sgd", epochs=1, learning_rate=(1e30,), head_learning_rate=1e30, warmup_steps=0)
    with pytest.raises(TrainingError, match="Every candidate's loss became infinite or NaN"):
        learner.learn("colours", colours, config=config)
    assert learner.registry.tasks() == []


def test_candidates_that_stop_or_diverge_are_in_the_record(
    learner: Learner, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "ENOUGH_TO_CHOOSE_AN_EPOCH", 5)
    config = LearnConfig(
        epochs=12, learning_rate=(0.1, 3.0, 1e30), optimizer="adamw", clip_norm=1e30, batch_size=8, patience=1
    )
    metrics = learner.learn("colours", colours, config=config).metrics
    stopped = [row["stopped"] for row in metrics["candidates"]]
    assert stopped[2] == "diverged"
    assert "no better" in stopped
    assert metrics["curves"][-1]["train_loss"][2] is None


@pytest.mark.slow
def test_images_are_augmented_unless_they_are_tensors_or_only_the_linear_probe_is_fitted(
    learner: Learner, colours: Path
) -> None:
    quick = {"epochs": 1, "learning_rate": 0.001}
    views = {}
    for name, data, settings in (
        ("files", colours, quick),
        ("tensors", CountingDataset(*noise()), quick),
        ("head", colours, quick | {"head_only": True}),
        ("linear", colours, quick | {"head_only": True, "layer_head": False}),
        ("asked", colours, quick | {"augmentation": {"views": 1}}),
    ):
        task = learner.learn(name, data, config=LearnConfig.parse(settings))
        views[name] = task.config["augmentation"]["views"]
    assert views == {"files": DEFAULT_VIEWS, "tensors": 0, "head": DEFAULT_VIEWS, "linear": 0, "asked": 1}


def test_every_evaluation_is_recorded_including_the_one_at_learning(learner: Learner, colours: Path) -> None:
    task = learner.learn("colours", colours, config=QUICK)
    record = learner.evaluate("colours", colours)
    assert record.metrics["accuracy"] == task.metrics["test"]["accuracy"]
    first, second = learner.registry.evaluations("colours")
    assert second == record
    assert (first.metrics, first.logits_digest) == (record.metrics, record.logits_digest)
    assert (first.data_fingerprint, first.numerics_fingerprint) == (
        record.data_fingerprint,
        record.numerics_fingerprint,
    )
    assert first.generation == learner.registry.record("colours").generation
    assert learner.evaluate("colours", colours).logits_digest == record.logits_digest


def test_a_task_is_refused_on_another_backbone(learner: Learner, colours: Path) -> None:
    task = learner.learn("colours", colours, config=QUICK)
    other = FrozenBackbone(tiny_vit(seed=1), "other", "hub")
    with pytest.raises(BackboneError, match="'colours:1' was learned on the backbone"):
        CombinedModel(other, [task])


@pytest.mark.slow
def test_an_unreadable_checkpoint_is_warned_of_and_training_starts_over(
    tiny: FrozenBackbone, registry: Registry, colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = Learner(tiny, registry, ActivationCache(tmp_path / "cache"))

    def stop(epoch: Epoch) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.learn("colours", colours, config=QUICK, on_epoch=stop)
    (path,) = learner.cache.folder.glob("runs/*/*/sweep.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert learner.learn("colours", colours, config=QUICK).ref == "colours:1"
    assert "cannot be read" in caplog.text
