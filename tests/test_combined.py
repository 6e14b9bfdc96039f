"""The combined pass: equal to the paper's dense mask as a function, and bit by bit independent of its company."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue, read_image
from addenda.combined import (
    CombinedModel,
    golden,
    layout,
    numerics,
    numerics_fingerprint,
    tensor_digest,
    verify,
)
from addenda.combined.layout import TILE, Layout
from addenda.exceptions import AddendaError, BackboneError, DataError, RegistryError, UnknownTaskError
from addenda.registry import Golden, Task
from tests.conftest import random_task, tiny_vit
from tests.dense_mask import DenseMask

# The package offers a function of the same name, which hides the module.
NUMERICS = importlib.import_module("addenda.combined.numerics")

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "layer-scale": {"init_values": 0.3},
    "qk-norm": {"qk_norm": True, "scale_attn_norm": True},
    "clip": {"pre_norm": True, "qkv_bias": False},
    "deit3": {"no_embed_class": True, "init_values": 0.3},
    "dinov2": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.3},
    "no-position": {"pos_embed": "none"},
    "average": {"global_pool": "avg"},
    "average-after-norm": {"global_pool": "avg", "fc_norm": False, "reg_tokens": 2},
}


def lively_vit(variant: str = "plain") -> torch.nn.Module:
    """A tiny ViT in which attention chooses and every parameter matters: fresh ones are nearly uniform."""
    model = tiny_vit(1, **VARIANTS[variant])
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=random))
    return model


@cache
def backbone(variant: str = "plain", precision: torch.dtype = torch.float32) -> FrozenBackbone:
    return FrozenBackbone(lively_vit(variant), variant, "hub", precision=precision)


@cache
def wide_backbone(precision: torch.dtype) -> FrozenBackbone:
    """192 dimensions in 3 heads, as ViT-Ti has them."""
    return FrozenBackbone(tiny_vit(3, embed_dim=192, depth=2), "wide", "hub", precision=precision)


@cache
def reference(variant: str) -> DenseMask:
    return DenseMask(lively_vit(variant))


def images(count: int = 9, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def head_only(task: Task) -> Task:
    return dataclasses.replace(task, class_token=None, memory=None, pooled_weight=None)


@cache
def family(on: FrozenBackbone) -> dict[str, Task]:
    """Ten tasks of six size classes: alone, without memory, one label, head only, a chain and a diamond."""

    def task(name: str, memory: int, parents: Sequence[str] = (), **options: object) -> None:
        kin = tuple(known[parent] for parent in parents)
        known[name] = random_task(on, name, memory, parents=kin, seed=len(known), **options)

    known: dict[str, Task] = {}
    task("five", 5)
    task("none", 0)
    task("nine", 9, pooled=False)
    task("one-label", 5, classes=1)
    task("many-labels", 7, classes=12, pooled=False)
    task("child", 2, ["five"])
    task("sees-two", 3, ["none", "nine"])
    task("diamond", 1, ["child", "sees-two", "five"])
    task("bare-child", 0, ["none"], pooled=False)
    known["head-only"] = head_only(random_task(on, "head-only", seed=99))
    return known


def bits(logits: Tensor) -> list[bytes]:
    """The bytes of each image's logits: -0.0 is not 0.0 here."""
    return [row.numpy().tobytes() for row in logits]


def alone(on: FrozenBackbone, task: Task, pictures: Tensor) -> list[bytes]:
    """A task with nobody beside it, one image at a time."""
    model = CombinedModel(on, [task])
    return [bits(model(picture.unsqueeze(0))[task.name])[0] for picture in pictures]


@cache
def known_bits(on: FrozenBackbone) -> dict[str, list[bytes]]:
    return {name: alone(on, task, images()) for name, task in family(on).items()}


def assert_company_moves_no_bit(on: FrozenBackbone, task: Task, company: Sequence[Task]) -> None:
    """What every exactness test here says; the sabotage tests see it fail."""
    pictures = images(3)
    expected = alone(on, task, pictures)
    assert bits(CombinedModel(on, [task, *company])(pictures)[task.name]) == expected
    assert bits(CombinedModel(on, [*company, task])(pictures)[task.name]) == expected


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the paper's dense mask, as functions -----------------------------------------------------------------------------


@dataclasses.dataclass
class Node:
    """A task of a random graph; parents by number. Drawn as plain values, made into tensors in the test."""

    memory: int
    classes: int
    pooled: bool
    head_only: bool
    parents: list[int]
    seed: int


@st.composite
def task_graphs(draw: st.DrawFn) -> list[Node]:
    """1 to 8 tasks, each of which extends any of the earlier ones; some have no token, only a head."""
    nodes: list[Node] = []
    for _ in range(draw(st.integers(1, 8))):
        could_extend = [number for number, node in enumerate(nodes) if not node.head_only]
        parents = draw(st.lists(st.sampled_from(could_extend), unique=True)) if could_extend else []
        nodes.append(
            Node(
                memory=draw(st.integers(0, 9)),
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
        task = random_task(on, name, node.memory, node.classes, kin, node.seed, node.pooled)
        tasks.append(head_only(task) if node.head_only else task)
    return tasks


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=8)
@given(nodes=task_graphs(), count=st.integers(1, 5), data=st.data())
def test_the_combined_pass_is_the_dense_mask(variant: str, nodes: list[Node], count: int, data: st.DataObject) -> None:
    on = backbone(variant, torch.float64)
    tasks, pictures = made(on, nodes), images(count)
    numbers = st.integers(0, len(tasks) - 1)
    asked = [tasks[number] for number in data.draw(st.lists(numbers, min_size=1, unique=True), label="asked")]
    expected = reference(variant)(pictures, asked)
    found = CombinedModel(on, tasks)(pictures, [task.name for task in asked])
    assert list(found) == [task.name for task in asked]
    for name, logits in found.items():
        assert logits.dtype == torch.float64
        assert (logits - expected[name]).abs().max() <= 1e-10


def test_the_dense_mask_leaves_the_frozen_tokens_as_timm_has_them() -> None:
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


def test_what_a_task_extends_changes_its_logits() -> None:
    on = backbone("plain", torch.float64)
    parent = random_task(on, "parent", seed=1)
    child = random_task(on, "child", seed=2)
    extended = dataclasses.replace(child, parents=(parent,))
    pictures = images(2)
    apart, together = (CombinedModel(on, [task])(pictures)["child"] for task in (child, extended))
    assert (apart - together).abs().max() > 1e-2


# --- bits -------------------------------------------------------------------------------------------------------------

PRECISIONS = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@PRECISIONS
@pytest.mark.parametrize("variant", ["plain", "dinov2", "average", "clip"])
@settings(deadline=None, max_examples=7)
@given(data=st.data())
def test_a_task_keeps_its_bits_in_any_company_order_subset_and_batch(
    variant: str, precision: torch.dtype, data: st.DataObject
) -> None:
    on = backbone(variant, precision)
    names = st.sampled_from(list(family(on)))
    members = data.draw(st.lists(names, min_size=1, unique=True), label="members, in order")
    asked = data.draw(st.none() | st.lists(st.sampled_from(members), min_size=1, unique=True), label="asked")
    picks = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=9), label="images, in order")
    found = CombinedModel(on, [family(on)[name] for name in members])(images()[picks], asked)
    assert list(found) == (members if asked is None else asked)
    for name, logits in found.items():
        assert logits.dtype == torch.float32
        assert bits(logits) == [known_bits(on)[name][pick] for pick in picks]


@PRECISIONS
def test_a_task_keeps_its_bits_when_wider_tasks_join(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    narrow = random_task(on, "narrow", memory=1)
    wide = [random_task(on, f"wide-{memory}", memory, seed=memory) for memory in (7, 9, 17, 40)]
    deep = random_task(on, "deep", memory=9, parents=tuple(wide), seed=50)
    assert len({layout.size_class(task) for task in (narrow, *wide, deep)}) > 4
    assert_company_moves_no_bit(on, narrow, [*wide, deep])
    assert_company_moves_no_bit(on, deep, [*wide, narrow])


@PRECISIONS
def test_a_task_keeps_its_bits_among_more_tasks_than_a_tile_holds(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    tasks = [random_task(on, f"task-{i}", memory=5, classes=1 + i % 4, seed=i) for i in range(19)]
    assert len(tasks) > 2 * TILE
    pictures = images(2)
    together = CombinedModel(on, tasks)(pictures)
    reverse = CombinedModel(on, tasks[::-1])(pictures)
    for task in tasks:
        assert bits(together[task.name]) == bits(reverse[task.name]) == alone(on, task, pictures)


@PRECISIONS
def test_a_chain_longer_than_a_tile_keeps_its_bits(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    chain: list[Task] = []
    for i in range(TILE + 3):
        chain.append(random_task(on, f"link-{i}", memory=2, parents=tuple(chain[-1:]), seed=i))
    pictures = images(2)
    for order in (chain, chain[::-1]):
        together = CombinedModel(on, order)(pictures)
        assert all(bits(together[link.name]) == alone(on, link, pictures) for link in chain)


def test_a_task_keeps_its_bits_on_two_threads() -> None:
    on = backbone("dinov2")
    with threads(2):
        assert_company_moves_no_bit(on, family(on)["sees-two"], list(family(on).values())[:6])


@PRECISIONS
def test_tasks_keep_their_bits_with_the_heads_of_a_real_backbone(precision: torch.dtype) -> None:
    """With 64 dimensions a head some products of two or three columns give other bits in other rows."""
    on = wide_backbone(precision)
    pictures = images(4)
    tasks = [random_task(on, f"memory-{m}", memory=m, classes=m + 1, seed=m, pooled=m % 2 == 0) for m in range(11)]
    tasks.append(random_task(on, "child", memory=1, classes=3, parents=(tasks[1],), seed=20))
    together = CombinedModel(on, tasks)(pictures)
    turned = CombinedModel(on, tasks[::-1])(pictures.roll(1, 0))
    for task in tasks:
        expected = alone(on, task, pictures)
        assert bits(together[task.name]) == expected, task.name
        assert bits(turned[task.name].roll(-1, 0)) == expected, task.name


def test_a_head_gives_an_image_the_same_bits_at_every_place_in_the_batch() -> None:
    on = backbone()
    picture = images(1)
    for classes in (*range(1, 18), 100):
        task = random_task(on, "task", memory=1, classes=classes, seed=classes)
        model = CombinedModel(on, [task, head_only(dataclasses.replace(task, name="head"))])
        places = []
        for place in range(model.micro_batch):
            batch = images(model.micro_batch, seed=8)
            batch[place] = picture
            places.append([bits(logits)[place] for logits in model(batch).values()])
        assert places == [places[0]] * model.micro_batch, f"{classes} classes"


def test_a_broken_image_harms_no_other_in_its_batch() -> None:
    on = backbone()
    model = CombinedModel(on, list(family(on).values()))
    broken = images()
    broken[1], broken[6] = float("nan"), float("inf")
    for name, logits in model(broken).items():
        for place in (0, 2, 3, 4, 5, 7, 8):
            assert bits(logits)[place] == known_bits(on)[name][place]


def test_one_content_under_two_names_gives_the_same_bits() -> None:
    on = backbone()
    task = family(on)["child"]
    twin = dataclasses.replace(task, name="twin")
    found = CombinedModel(on, [task, *family(on).values(), twin])(images(2))
    assert bits(found["twin"]) == bits(found["child"])


@PRECISIONS
def test_the_backbones_own_logits_are_stock_timms(precision: torch.dtype) -> None:
    for variant in ("plain", "dinov2", "average"):
        on = backbone(variant, precision)
        model = CombinedModel(on, [family(on)["child"]])
        stock = lively_vit(variant).to(precision)
        for count in (1, model.micro_batch, 9):
            model(images(count))
            padded = F.pad(images(count), (0, 0, 0, 0, 0, 0, 0, -count % model.micro_batch)).to(precision)
            with torch.no_grad():
                expected = torch.cat([stock(part) for part in padded.split(model.micro_batch)])[:count]
            assert torch.equal(model.backbone_logits(images(count)), expected)


@PRECISIONS
def test_what_learning_observes_does_not_depend_on_company(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    task = family(on)["sees-two"]
    company = list(family(on).values())
    seen: list[list[bytes]] = []
    for model in (CombinedModel(on, [task]), CombinedModel(on, company)):
        layers: list[bytes] = []

        def note(layer: int, frozen: KeyValue, tokens: KeyValue, layers: list[bytes] = layers) -> None:
            layers.extend(part.float().numpy().tobytes() for part in (*frozen, *tokens))

        layers.append(model.observe(images(3), [task, *task.closure], note).float().numpy().tobytes())
        seen.append(layers)
    assert len(seen[0]) == 4 * on.depth + 1
    assert seen[0] == seen[1]


# --- which tasks run, and what they read ------------------------------------------------------------------------------


def test_ancestors_are_computed_but_not_answered() -> None:
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


def test_a_pooled_head_adds_the_regression_on_the_pooled_feature() -> None:
    on = backbone("average", torch.float64)
    both = family(on)["five"]
    regression = dataclasses.replace(
        head_only(both), name="regression", head_weight=both.pooled_weight, head_bias=torch.zeros(3)
    )
    token = dataclasses.replace(both, name="token", pooled_weight=None)
    found = CombinedModel(on, [both, regression, token])(images(3))
    assert (found["five"] - found["regression"] - found["token"]).abs().max() <= 1e-10


def test_a_model_without_tasks_or_images_answers_with_nothing() -> None:
    on = backbone()
    assert CombinedModel(on, [])(images(2)) == {}
    model = CombinedModel(on, list(family(on).values()))
    assert model(images(2), []) == {}
    assert {name: tuple(logits.shape) for name, logits in model(images(9)[:0]).items()} == {
        name: (0, len(task.labels)) for name, task in family(on).items()
    }


def test_a_name_asked_for_twice_is_answered_once() -> None:
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
    """It has nothing to show."""
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


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (1, 1, 32, 32), (3, 32, 32), (1, 3, 64, 64)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = CombinedModel(backbone(), [family(backbone())["five"]])
    for answer in (model, model.backbone_logits):
        with pytest.raises(BackboneError, match=r"Images must have the shape \[B, 3, 32, 32\].*; got \["):
            answer(torch.zeros(shape))


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


def test_predict_gives_the_top_of_the_tasks_asked_for(paths: list[Path]) -> None:
    model = CombinedModel(backbone(), list(family(backbone()).values()))
    everything = model.predict(paths, top=100)
    answers = model.predict([str(path) for path in paths], top=2, tasks=["many-labels", "one-label"])
    assert list(answers) == ["many-labels", "one-label"]
    assert answers["many-labels"] == [pairs[:2] for pairs in everything["many-labels"]]
    assert answers["one-label"] == [[("class 0", 1.0)]] * 6
    assert model.predict([], tasks=["five"]) == {"five": []}


def test_predict_names_the_file_that_is_no_image(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    model = CombinedModel(backbone(), [family(backbone())["five"]])
    with pytest.raises(DataError, match=r"text\.png' cannot be read"):
        model.predict([text])
    with pytest.raises(DataError, match=r"absent\.png' does not exist"):
        model.predict([tmp_path / "absent.png"])


# --- golden probes and numerics ---------------------------------------------------------------------------------------


@PRECISIONS
def test_a_task_verifies_alone_and_among_all_others(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    everyone = CombinedModel(on, list(family(on).values()))
    for name, task in family(on).items():
        recorded = golden(on, task)
        assert recorded.digest == tensor_digest(recorded.logits)
        assert recorded.numerics_fingerprint == numerics_fingerprint(recorded.numerics)
        for model in (None, everyone):
            verdict = verify(on, task, recorded, model)
            assert (verdict.task, verdict.ok, verdict.same_numerics, verdict.identical) == (name, True, True, True)
            assert verdict.max_difference == 0
            assert verdict.detail == "identical, byte for byte"


@pytest.mark.parametrize("field", ["class_token", "memory", "head_weight", "head_bias", "pooled_weight", "parents"])
def test_a_changed_tensor_fails_under_the_same_numerics(field: str) -> None:
    on = backbone()
    task = family(on)["child"]
    if field == "parents":
        (parent,) = task.parents
        changed = dataclasses.replace(task, parents=(dataclasses.replace(parent, memory=parent.memory + 1e-3),))
    else:
        changed = dataclasses.replace(task, **{field: getattr(task, field) + 1e-3})
    verdict = verify(on, changed, golden(on, task))
    assert verdict.same_numerics
    assert not verdict.ok
    assert not verdict.identical
    assert verdict.max_difference > 0
    assert verdict.detail.startswith("DIFFERS under the same numerics fingerprint, by up to ")


def of_another_machine(recorded: Golden, shift: float = 0.0) -> Golden:
    """A golden probe as another machine would have recorded it; `shift` is relative to the largest logit."""
    described = {**recorded.numerics, "device": "another CPU", "probe": "0" * 64}
    logits = recorded.logits.clone()
    logits[0, 0] += shift * logits.abs().max()
    return Golden(described, numerics_fingerprint(described), logits, tensor_digest(logits))


@pytest.mark.parametrize(
    ("precision", "within", "beyond"),
    [(torch.float32, 5e-5, 3e-4), (torch.bfloat16, 2e-2, 1.5e-1)],
    ids=["float32", "bfloat16"],
)
def test_another_numerics_fingerprint_is_a_new_epoch_within_the_tolerance(
    precision: torch.dtype, within: float, beyond: float
) -> None:
    on = backbone("plain", precision)
    task = family(on)["five"]
    for shift in (within, -within, beyond, -beyond):
        verdict = verify(on, task, of_another_machine(golden(on, task), shift))
        assert verdict.ok is (abs(shift) == within)
        assert not verdict.same_numerics
        assert not verdict.identical
        assert verdict.detail.startswith("new epoch (numerics ")


def test_identical_logits_under_another_fingerprint_are_said_to_be_so() -> None:
    on = backbone()
    task = family(on)["five"]
    verdict = verify(on, task, of_another_machine(golden(on, task)))
    assert (verdict.ok, verdict.same_numerics, verdict.identical) == (True, False, True)
    assert verdict.detail == "identical, byte for byte, under another numerics fingerprint"


def test_a_golden_probe_of_another_backbones_task_is_refused() -> None:
    with pytest.raises(BackboneError, match="was learned on the backbone"):
        golden(backbone(), family(backbone("clip"))["five"])


def test_the_numerics_fingerprint_changes_with_threads_tile_micro_batch_and_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on = backbone()
    found = {"as it is": numerics_fingerprint(numerics(on))}
    assert numerics_fingerprint(numerics(on)) == found["as it is"]
    with threads(torch.get_num_threads() + 1):
        found["threads"] = numerics_fingerprint(numerics(on))
    with monkeypatch.context() as patch:
        patch.setattr(NUMERICS, "TILE", 2 * TILE)
        found["tile"] = numerics_fingerprint(numerics(on))
    with monkeypatch.context() as patch:
        patch.setattr(NUMERICS, "micro_batch", lambda device: 8)
        found["micro-batch"] = numerics_fingerprint(numerics(on))
    found["precision"] = numerics_fingerprint(numerics(backbone("plain", torch.bfloat16)))
    found["backbone"] = numerics_fingerprint(numerics(backbone("clip")))
    assert len(set(found.values())) == len(found), found


# --- sabotage: these tests would notice -------------------------------------------------------------------------------


def sabotage(monkeypatch: pytest.MonkeyPatch, harm: Callable[[Layout], None]) -> None:
    """Every layout made from here on is harmed."""
    build = Layout.__init__

    def harmed(self: Layout, on: FrozenBackbone, tasks: Sequence[Task], memory: MemoryCache) -> None:
        build(self, on, tasks, memory)
        harm(self)

    monkeypatch.setattr(Layout, "__init__", harmed)


def first_slot_sees_the_next_token(made: Layout) -> None:
    made.tiles[0].visible[0, 0] = 1


def first_slot_sees_the_next_memory(made: Layout) -> None:
    for layer in made.tiles[0].memory:
        layer.keys[0, :, -1], layer.values[0, :, -1] = layer.keys[1, :, 0], layer.values[1, :, 0]


def filling_counts(made: Layout) -> None:
    for tile in made.tiles:
        tile.bias.zero_()


def own_token_is_hidden(made: Layout) -> None:
    for tile in made.tiles:
        tile.bias[:, 0] = float("-inf")


@pytest.mark.parametrize("harm", [first_slot_sees_the_next_token, first_slot_sees_the_next_memory])
def test_a_leak_between_tasks_would_move_bits(harm: Callable[[Layout], None], monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    task, company = random_task(on, "task", memory=4), [random_task(on, "other", memory=4, seed=1)]
    assert_company_moves_no_bit(on, task, company)
    sabotage(monkeypatch, harm)
    with pytest.raises(AssertionError):
        assert_company_moves_no_bit(on, task, company)


@pytest.mark.parametrize("harm", [first_slot_sees_the_next_token, filling_counts, own_token_is_hidden])
def test_a_wrong_mask_would_differ_from_the_dense_one(
    harm: Callable[[Layout], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filling key that counts moves no bits in company, since it is the task's own: only this test sees it."""
    on = backbone("plain", torch.float64)
    task, other = random_task(on, "task", memory=5), random_task(on, "other", memory=5, seed=1)
    expected = reference("plain")(images(2), [task])["task"]
    assert (CombinedModel(on, [task, other])(images(2))["task"] - expected).abs().max() <= 1e-10
    sabotage(monkeypatch, harm)
    assert (CombinedModel(on, [task, other])(images(2))["task"] - expected).abs().max() > 1e-3


def test_memory_shared_by_two_tasks_would_move_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    task, other = random_task(on, "task", memory=5), random_task(on, "other", memory=5, seed=1)
    honest = MemoryCache.__call__
    monkeypatch.setattr(MemoryCache, "__call__", lambda self, asked: honest(self, last.setdefault("task", asked)))
    last: dict[str, Task] = {}
    expected = alone(on, task, images(2))
    last.clear()
    assert bits(CombinedModel(on, [other, task])(images(2))["task"]) != expected
