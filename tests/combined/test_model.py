"""The combined forward pass: equality with the paper's dense mask; which tasks run; errors; prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.layers import GatedMlp

from addenda.backbones import FrozenBackbone, read_image
from addenda.combined import CombinedModel, predictions
from addenda.exceptions import AddendaError, BackboneError, DataError, RegistryError, UnknownTaskError
from addenda.registry import LowRank, Task
from tests.support.dense_mask import DenseMask
from tests.support.models import VARIANTS, backbone, family, head_only, images, lively_vit, quick_first
from tests.support.tasks import random_task
from tests.support.tiny import tiny_vit


@cache
def reference(variant: str) -> DenseMask:
    return DenseMask(lively_vit(variant))


# --- the paper's dense mask, as functions -----------------------------------------------------------------------------


@dataclasses.dataclass
class Node:
    """A task of a random graph, as plain values; `parents` are indices."""

    memory: int
    rank: int
    classes: int
    pooled: bool
    head_only: bool
    parents: list[int]
    seed: int


@st.composite
def task_graphs(draw: st.DrawFn) -> list[Node]:
    """1 to 8 tasks; each may extend any earlier ones, and some are head-only."""
    nodes: list[Node] = []
    for _ in range(draw(st.integers(1, 8))):
        could_extend = [number for number, node in enumerate(nodes) if not node.head_only]
        parents = draw(st.lists(st.sampled_from(could_extend), unique=True)) if could_extend else []
        nodes.append(
            Node(
                memory=draw(st.integers(0, 9)),
                rank=draw(st.sampled_from([0, 0, 0, 3, 4])),
                classes=draw(st.integers(1, 12)),
                pooled=draw(st.booleans()),
                head_only=not parents and draw(st.integers(0, 5)) == 5,
                parents=parents,
                seed=draw(st.integers(0, 2**16)),
            )
        )
    return nodes


def made(on: FrozenBackbone, nodes: Sequence[Node]) -> list[Task]:
    tasks: list[Task] = []
    for node in nodes:
        kin = tuple(tasks[number] for number in node.parents)
        name = f"task-{len(tasks)}"
        task = random_task(on, name, node.memory, node.classes, kin, node.seed, node.pooled, node.rank)
        tasks.append(head_only(task) if node.head_only else task)
    return tasks


@quick_first(VARIANTS)
@settings(deadline=None, max_examples=3)
@given(nodes=task_graphs(), count=st.integers(1, 5), data=st.data())
def test_the_combined_model_equals_the_dense_mask(
    variant: str, nodes: list[Node], count: int, data: st.DataObject
) -> None:
    on = backbone(variant, torch.float64)
    tasks, pictures = made(on, nodes), images(count)
    numbers = st.integers(0, len(tasks) - 1)
    requested = [tasks[number] for number in data.draw(st.lists(numbers, min_size=1, unique=True), label="requested")]
    expected = reference(variant)(pictures, requested)
    outputs = CombinedModel(on, tasks)(pictures, [task.name for task in requested])
    assert list(outputs) == [task.name for task in requested]
    for name, logits in outputs.items():
        assert logits.dtype == torch.float64
        assert (logits - expected[name]).abs().max() <= 1e-10


def test_the_dense_mask_does_not_change_the_frozen_tokens() -> None:
    for variant in VARIANTS:
        stock, dense = lively_vit(variant).double(), reference(variant)
        task = head_only(random_task(backbone(variant, torch.float64), "head"))
        with torch.no_grad():
            pooled = stock.forward_head(stock.forward_features(images(2).double()), pre_logits=True)
        expected = pooled @ task.head_weight.double().T + task.head_bias.double()
        assert (dense(images(2), [task])["head"] - expected).abs().max() <= 1e-10


def test_the_dense_mask_is_the_papers_table_1() -> None:
    on = backbone("plain", torch.float64)
    first = random_task(on, "first", memory=2)
    apart, extends = (random_task(on, "second", memory=1, parents=parents) for parents in ((), (first,)))
    frozen = 3  # rows and columns: three frozen tokens, C_1, two of M_1, C_2, M_2
    for second, sees_first in ((apart, 0), (extends, 1)):
        mask = reference("plain").mask(frozen, [first, second]).int().tolist()
        assert mask[:frozen] == [[1, 1, 1, 0, 0, 0, 0, 0]] * frozen
        assert mask[3] == [1, 1, 1, 1, 1, 1, 0, 0]
        assert mask[6] == [1, 1, 1, *[sees_first] * 3, 1, 1]


def test_extending_a_task_changes_logits() -> None:
    on = backbone("plain", torch.float64)
    parent = random_task(on, "parent", seed=1)
    child = random_task(on, "child", seed=2)
    extended = dataclasses.replace(child, parents=(parent,))
    pictures = images(2)
    apart, together = (CombinedModel(on, [task])(pictures)["child"] for task in (child, extended))
    assert (apart - together).abs().max() > 1e-2


def test_adapters_change_a_tasks_logits_and_those_of_tasks_that_extend_it() -> None:
    on = backbone("plain", torch.float64)
    adapted = random_task(on, "parent", rank=4)
    results = []
    for parent in (adapted, dataclasses.replace(adapted, adapters=None)):
        child = random_task(on, "child", seed=1, parents=(parent,))
        results.append(CombinedModel(on, [parent, child])(images(2)))
    for name in ("parent", "child"):
        assert (results[0][name] - results[1][name]).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0, 8, 0), (8, 0, 8), (8, 4, 0)])
def test_a_task_sees_parents_of_any_rank(ranks: tuple[int, ...]) -> None:
    """The last two links and the first two tasks have equally many keys: only ranks distinguish their size classes."""
    on = backbone("plain", torch.float64)
    chain = [random_task(on, "kin", memory=5), random_task(on, "more-kin", memory=0, seed=1)]
    for i, rank in enumerate(ranks):
        chain.append(random_task(on, f"link-{i}", memory=0, parents=tuple(chain), seed=2 + i, rank=rank))
    expected = reference("plain")(images(2), chain)
    for order in (chain, chain[::-1]):
        for name, logits in CombinedModel(on, order)(images(2)).items():
            assert (logits - expected[name]).abs().max() <= 1e-10, name


# --- which tasks run --------------------------------------------------------------------------------------------------


def test_ancestors_are_computed_but_not_returned() -> None:
    on = backbone()
    task = family(on)["diamond"]
    model = CombinedModel(on, [task])
    assert len(task.closure) == 5
    assert list(model(images(2))) == ["diamond"]
    with pytest.raises(UnknownTaskError, match="Task 'five' is not in this model"):
        model(images(2), ["five"])


def test_a_head_only_task_reads_the_backbones_pooled_feature() -> None:
    for variant in VARIANTS:
        on, stock = backbone(variant, torch.float64), lively_vit(variant).double()
        task = head_only(random_task(on, "head-only"))
        with torch.no_grad():
            pooled = stock.forward_head(stock.forward_features(images(4).double()), pre_logits=True)
        expected = F.linear(pooled, task.head_weight.double(), task.head_bias.double())
        assert (CombinedModel(on, [task])(images(4))["head-only"] - expected).abs().max() <= 1e-10


def test_a_pooled_head_adds_a_linear_layer_on_the_pooled_feature() -> None:
    on = backbone("average", torch.float64)
    both = family(on)["five"]
    linear = dataclasses.replace(
        head_only(both), name="linear", head_weight=both.pooled_weight, head_bias=torch.zeros(3)
    )
    token = dataclasses.replace(both, name="token", pooled_weight=None)
    logits = CombinedModel(on, [both, linear, token])(images(3))
    assert (logits["five"] - logits["linear"] - logits["token"]).abs().max() <= 1e-10


def test_a_model_without_tasks_or_images_returns_empty_results() -> None:
    on = backbone()
    assert CombinedModel(on, [])(images(2)) == {}
    for exact in (True, False):
        model = CombinedModel(on, list(family(on).values()), exact=exact)
        assert model(images(2), []) == {}
        assert {name: tuple(logits.shape) for name, logits in model(images(9)[:0]).items()} == {
            name: (0, len(task.labels)) for name, task in family(on).items()
        }


def test_a_name_requested_twice_is_returned_once() -> None:
    model = CombinedModel(backbone(), list(family(backbone()).values()))
    assert list(model(images(1), ["nine", "five", "nine"])) == ["nine", "five"]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_task_of_another_backbone_is_refused() -> None:
    task = random_task(backbone("registers"), "stranger")
    with pytest.raises(
        BackboneError, match=r"Task 'stranger' was learned on the backbone with fingerprint [0-9a-f]{12}…"
    ):
        CombinedModel(backbone(), [task])


def test_a_parent_of_another_backbone_is_refused() -> None:
    stranger = random_task(backbone("registers"), "stranger")
    child = random_task(backbone(), "child", parents=(stranger,))
    with pytest.raises(BackboneError, match="'stranger' was learned on the backbone"):
        CombinedModel(backbone(), [child])


def test_a_parent_without_a_token_is_refused() -> None:
    child = random_task(backbone(), "child", parents=(family(backbone())["head-only"],))
    with pytest.raises(AddendaError, match="head-only"):
        CombinedModel(backbone(), [child])(images(1))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    model = CombinedModel(backbone(), [family(backbone())["five"], family(backbone())["nine"]])
    with pytest.raises(UnknownTaskError, match=r"Task 'birds' is not in this model\. Known: 'five', 'nine'\."):
        model(images(1), ["five", "birds"])
    with pytest.raises(UnknownTaskError, match=r"Known: none\."):
        CombinedModel(backbone(), [])(images(1), ["birds"])


def test_two_different_tasks_of_one_name_are_refused() -> None:
    first, second = (random_task(backbone(), "twice", seed=seed) for seed in (0, 1))
    with pytest.raises(RegistryError, match="Two different tasks are named 'twice'"):
        CombinedModel(backbone(), [first, second])
    assert list(CombinedModel(backbone(), [first, first]).tasks) == ["twice"]


@pytest.mark.parametrize("what", ["layers", "inputs", "outputs", "sites"])
def test_adapters_of_another_size_are_refused(what: str) -> None:
    task = random_task(backbone(), "adapted", rank=4)
    (down, up), others = task.adapters["fc1"], dict(task.adapters)
    del others["fc1"]
    changed = {
        "layers": {**others, "fc1": LowRank(down[1:], up[1:])},
        "inputs": {**others, "fc1": LowRank(down[:, :, 1:], up)},
        "outputs": {**others, "fc1": LowRank(down, up[:, 1:])},
        "sites": others,
    }[what]
    with pytest.raises(
        RegistryError,
        match=r"'adapted' does not fit .*'plain': its adapters \(layers, inputs, outputs\) are .*\(3, 48, 192\)",
    ):
        CombinedModel(backbone(), [dataclasses.replace(task, adapters=changed)])


def test_adapters_on_blocks_that_cannot_carry_them_are_refused() -> None:
    on = FrozenBackbone(tiny_vit(mlp_layer=GatedMlp), "gated", "hub")
    plain = random_task(on, "task")
    adapted = dataclasses.replace(plain, adapters=random_task(backbone(), "other", rank=4).adapters)
    message = "Task 'task' has adapters, which backbone 'gated' cannot carry: its MLPs are GatedMlp, not timm's Mlp"
    for tasks in ([adapted], [random_task(on, "child", parents=(adapted,))]):
        with pytest.raises(BackboneError, match=message):
            CombinedModel(on, tasks, exact=False)
    assert list(CombinedModel(on, [plain], exact=False)(images(1))) == ["task"]


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (1, 1, 32, 32), (3, 32, 32), (1, 3, 64, 64)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = CombinedModel(backbone(), [family(backbone())["five"]])
    for method in (model, model.backbone_logits):
        with pytest.raises(BackboneError, match=r"Images must have the shape \[B, 3, 32, 32\].*; got \["):
            method(torch.zeros(shape))


def test_images_that_are_not_normalised_are_refused() -> None:
    model = CombinedModel(backbone(), [family(backbone())["five"]])
    with pytest.raises(BackboneError, match=r"floating point and normalised; got torch\.uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Six image files, more than a micro-batch, of different sizes."""
    random = np.random.default_rng(0)
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for i, file in enumerate(files):
        Image.fromarray(random.integers(0, 256, (30 + 4 * i, 50, 3), dtype=np.uint8)).save(file)
    return files


def test_predict_gives_labels_and_probabilities_best_first(paths: list[Path]) -> None:
    on = backbone()
    model = CombinedModel(on, list(family(on).values()))
    answers = model.predict(paths, top=100)
    logits = model(torch.stack([on.transform(read_image(path)) for path in paths]))
    assert list(answers) == list(family(on))
    for name, task in family(on).items():
        assert len(answers[name]) == len(paths)
        for pairs, row in zip(answers[name], logits[name], strict=True):
            expected = dict(zip(task.labels, row.softmax(-1).tolist(), strict=True))
            assert dict(pairs) == expected
            assert [value for _, value in pairs] == sorted(expected.values(), reverse=True)
            assert sum(expected.values()) == pytest.approx(1, abs=1e-6)


def test_predict_gives_the_top_labels_of_the_requested_tasks(paths: list[Path]) -> None:
    model = CombinedModel(backbone(), list(family(backbone()).values()))
    everything = model.predict(paths, top=100)
    answers = model.predict([str(path) for path in paths], top=2, tasks=["many-labels", "one-label"])
    assert list(answers) == ["many-labels", "one-label"]
    assert answers["many-labels"] == [pairs[:2] for pairs in everything["many-labels"]]
    assert answers["one-label"] == [[("class 0", 1.0)]] * 6
    assert model.predict([], tasks=["five"]) == {"five": []}
    with pytest.raises(DataError, match="by the paths of their files, not as Image"):
        model.predict([Image.new("RGB", (8, 8))])  # type: ignore[list-item]


def test_a_multi_label_task_gives_every_likely_label_best_first(paths: list[Path]) -> None:
    single = random_task(backbone(), "tags", classes=9)
    task = dataclasses.replace(single, objective="multi-label")
    model = CombinedModel(backbone(), [task])
    logits = model(torch.stack([backbone().transform(read_image(path)) for path in paths]))["tags"]
    answers = model.predict(paths)["tags"]
    for pairs, row in zip(answers, logits, strict=True):
        likely = {label: p for label, p in zip(task.labels, row.sigmoid().tolist(), strict=True) if p >= 0.5}
        assert dict(pairs) == likely
        assert [p for _, p in pairs] == sorted(likely.values(), reverse=True)
    assert max(map(len, answers)) > 3
    assert model.predict(paths, top=2)["tags"] == [pairs[:2] for pairs in answers]


def test_a_multi_label_task_may_give_no_label_and_gives_one_of_exactly_a_half() -> None:
    task = dataclasses.replace(family(backbone())["five"], objective="multi-label")
    logits = torch.tensor([[-1.0, -2.0, -0.1], [-1.0, 0.0, -0.1]])
    assert predictions(task, logits) == [[], [("class 1", 0.5)]]


def test_a_temperature_changes_probabilities_and_never_logits(paths: list[Path]) -> None:
    task = family(backbone())["five"]
    warm = dataclasses.replace(task, temperature=4.0)
    images = torch.stack([backbone().transform(read_image(path)) for path in paths])
    logits = CombinedModel(backbone(), [task])(images)["five"]
    model = CombinedModel(backbone(), [warm])
    assert torch.equal(model(images)["five"], logits)
    for pairs, row in zip(model.predict(paths)["five"], (logits / 4).softmax(-1), strict=True):
        assert dict(pairs) == dict(zip(task.labels, row.tolist(), strict=True))


def test_predict_names_the_file_that_is_not_an_image(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    model = CombinedModel(backbone(), [family(backbone())["five"]])
    with pytest.raises(DataError, match=r"text\.png' cannot be read"):
        model.predict([text])
    with pytest.raises(DataError, match=r"absent\.png' does not exist"):
        model.predict([tmp_path / "absent.png"])
