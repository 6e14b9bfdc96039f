"""Bits: a task's logits are the same bytes alone and in any company, order, subset, batch, place and process."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from addenda.backbones import Adapter, BlockAdapters, FrozenBackbone, FrozenStream, KeyValue, load_backbone
from addenda.backbones.family import Family
from addenda.combined import CombinedModel, TileStore, layout, streams
from addenda.combined.layout import TILE, TILE_SIZES
from addenda.combined.selftest import Shapes
from addenda.exceptions import ExactnessError
from addenda.registry import Task
from tests.conftest import SHARED, random_task
from tests.dense_mask import DenseMask
from tests.models import (
    PRECISIONS,
    alone,
    backbone,
    bits,
    family,
    head_only,
    images,
    lively_vit,
    random_registry,
    threads,
    wide_backbone,
)

# --- any registry, any company ----------------------------------------------------------------------------------------


def vit_tiny(precision: torch.dtype) -> FrozenBackbone:
    weights = SHARED / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    name = str(precision).removeprefix("torch.")
    return load_backbone("vit_tiny_patch16_224", weights, (0.5,) * 3, (0.5,) * 3, precision=name, device="cpu")


def check_a_random_registry(
    on: FrozenBackbone, seed: int, num_tasks: int, num_images: int, num_checked: int, data: st.DataObject
) -> None:
    """Some tasks of a random registry in any order, subset, batch and place, against each alone with one image."""
    size = on.preprocessing["input_size"][1]
    pictures = torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    tasks = random_registry(on, num_tasks, seed)
    everyone = CombinedModel(on, data.draw(st.permutations(tasks), label="order"))
    names = st.sampled_from([task.name for task in tasks])
    checked = data.draw(st.lists(names, min_size=1, max_size=num_checked, unique=True), label="checked")
    more = data.draw(st.lists(names, max_size=10, unique=True), label="asked beside them")
    together, asked = everyone(pictures), everyone(pictures, [*checked, *more])
    assert together.exact
    assert set(asked) == {*checked, *more}
    places = {0, num_images - 1, data.draw(st.integers(0, num_images - 1), label="place")}
    for task in (task for task in tasks if task.name in checked):
        single = CombinedModel(on, [task])
        for place in places:
            (expected,) = bits(single(pictures[place : place + 1])[task.name])
            assert bits(together[task.name])[place] == expected
            assert bits(asked[task.name])[place] == expected


REGISTRY = {"seed": st.integers(0, 2**20), "num_images": st.integers(1, 33), "data": st.data()}


@PRECISIONS
@pytest.mark.parametrize("variant", ["plain", "dinov2", "average", "wide", "dinov3", "eva02"])
@settings(deadline=None, max_examples=2)
@given(num_tasks=st.integers(1, 24), **REGISTRY)
def test_a_task_keeps_its_bits_in_any_registry(
    variant: str, precision: torch.dtype, num_tasks: int, seed: int, num_images: int, data: st.DataObject
) -> None:
    on = wide_backbone(precision) if variant == "wide" else backbone(variant, precision)
    check_a_random_registry(on, seed, num_tasks, num_images, 3, data)


@pytest.mark.slow
@PRECISIONS
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("variant", ["plain", "clip", "wide", "dinov3", "eva02-small"])
@settings(deadline=None, max_examples=6)
@given(num_tasks=st.integers(1, 70), **REGISTRY)
def test_a_task_keeps_its_bits_in_any_large_registry(
    variant: str,
    num_threads: int,
    precision: torch.dtype,
    num_tasks: int,
    seed: int,
    num_images: int,
    data: st.DataObject,
) -> None:
    on = wide_backbone(precision) if variant == "wide" else backbone(variant, precision)
    with threads(num_threads):
        check_a_random_registry(on, seed, num_tasks, num_images, 6, data)


@pytest.mark.slow
@pytest.mark.realdata
@PRECISIONS
@settings(deadline=None, max_examples=3)
@given(num_tasks=st.integers(1, 70), num_threads=st.integers(1, 2), **{**REGISTRY, "num_images": st.integers(1, 9)})
def test_a_task_keeps_its_bits_in_any_registry_on_a_real_backbone(
    precision: torch.dtype, num_tasks: int, num_threads: int, seed: int, num_images: int, data: st.DataObject
) -> None:
    on = cache(vit_tiny)(precision)
    with threads(num_threads):
        check_a_random_registry(on, seed, num_tasks, num_images, 3, data)


# --- one way at a time ------------------------------------------------------------------------------------------------


def assert_company_moves_no_bit(on: FrozenBackbone, task: Task, company: Sequence[Task]) -> None:
    """What every test here says; the sabotage tests see it fail."""
    pictures = images(3)
    expected = alone(on, task, pictures)
    assert bits(CombinedModel(on, [task, *company])(pictures)[task.name]) == expected
    assert bits(CombinedModel(on, [*company, task])(pictures)[task.name]) == expected


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
    assert len(tasks) > TILE
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


@PRECISIONS
@pytest.mark.parametrize("variant", ["plain", "wide"])
def test_tasks_keep_their_bits_at_every_rank(variant: str, precision: torch.dtype) -> None:
    """At rank 2, not filled up, products of 48 dimensions give four images other bits than eight."""
    on = wide_backbone(precision) if variant == "wide" else backbone(variant, precision)
    pictures = images(4)
    tasks = [random_task(on, f"rank-{r}", memory=4, seed=r, rank=r) for r in (0, 1, 2, 3, 4, 5, 8, 16, 32)]
    tasks.append(random_task(on, "child", memory=0, parents=(tasks[6],), seed=40, rank=2))
    tasks.append(random_task(on, "plain-child", memory=0, parents=(tasks[6],), seed=41))
    together = CombinedModel(on, tasks)(pictures)
    turned = CombinedModel(on, tasks[::-1])(pictures.roll(1, 0))
    for task in tasks:
        expected = alone(on, task, pictures)
        assert bits(together[task.name]) == expected, task.name
        assert bits(turned[task.name].roll(-1, 0)) == expected, task.name


def test_an_adapted_task_moves_no_bit_of_one_without() -> None:
    on = backbone()
    plain, adapted = random_task(on, "plain"), random_task(on, "adapted", seed=1, rank=4)
    assert_company_moves_no_bit(on, plain, [adapted])
    assert_company_moves_no_bit(on, adapted, [plain])
    assert len(CombinedModel(on, [plain, adapted]).layout.tiles) == 2


def test_empty_slots_and_filled_up_ranks_hold_zeros() -> None:
    on = backbone()
    tasks = [random_task(on, f"rank-{r}", memory=4, seed=r, rank=r) for r in (5, 8, 7)]
    (tile,) = CombinedModel(on, tasks).layout.tiles
    assert (len(tile.class_tokens), tile.rank, len(tile.adapters)) == (4, 8, on.depth)
    for layer in range(on.depth):
        for site, (down, up) in tile.block_adapters(layer)._asdict().items():
            for slot, task in enumerate(tasks):
                own = task.adapters[site]
                assert torch.equal(down[slot, : task.adapter_rank], own.down[layer])
                assert torch.equal(up[slot, :, : task.adapter_rank], own.up[layer])
                assert down[slot, task.adapter_rank :].count_nonzero() == 0
                assert up[slot, :, task.adapter_rank :].count_nonzero() == 0
            assert down[3].count_nonzero() == up[3].count_nonzero() == 0


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
    whole, broken = model(images()), images()
    broken[1], broken[6] = float("nan"), float("inf")
    for name, logits in model(broken).items():
        for place in (0, 2, 3, 4, 5, 7, 8):
            assert bits(logits)[place] == bits(whole[name])[place]


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
    wanted = [task, *task.closure]
    seen: list[list[bytes]] = []
    for company in ([task], list(family(on).values())):
        slots = layout.Layout(TileStore(on), company, offered=wanted)
        rows = [slots.offered[member.sha256] for member in wanted]
        layers: list[bytes] = []

        def note(layer: int, frozen: KeyValue, tokens: KeyValue, layers: list[bytes] = layers, rows: list[int] = rows):
            layers.extend(part.float().numpy().tobytes() for part in frozen)
            layers.extend(part[:, :, rows].float().numpy().tobytes() for part in tokens)

        streams.task_features(on, on.stream(images(8)), slots, note)
        seen.append(layers)
    assert len(seen[0]) == 4 * on.depth
    assert seen[0] == seen[1]


PROGRAM = """
import torch
from addenda.combined import CombinedModel, golden
from tests.models import backbone, random_registry

torch.set_num_threads(1)
on = backbone("dinov2")
print(*(golden(on, task).digest for task in random_registry(on, 8, seed=4)))
"""


@pytest.mark.slow
def test_a_task_keeps_its_bits_in_another_process() -> None:
    from addenda.combined import tensor_digest
    from addenda.combined.probes import probe_images

    on = backbone("dinov2")
    tasks = random_registry(on, 8, seed=4)
    together = CombinedModel(on, tasks)(probe_images(on))
    folder = Path(__file__).resolve().parents[1]
    other = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=folder)
    assert other.stdout.split() == [tensor_digest(together[task.name]) for task in tasks]


# --- a live model takes in tasks --------------------------------------------------------------------------------------


def test_a_live_model_computes_only_what_a_new_task_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    new = random_task(on, "new", memory=5, seed=30, rank=5)
    before = [*random_registry(on, 21, seed=3), random_task(on, "of its class", memory=6, seed=31, rank=8)]
    live = CombinedModel(on, before)
    answered = live(images(3))
    computed: list[int] = []
    compute = layout.memory_key_values

    def counted(on: FrozenBackbone, block: object, memory: Tensor) -> KeyValue:
        computed.append(memory.shape[1])
        return compute(on, block, memory)

    monkeypatch.setattr(layout, "memory_key_values", counted)
    grown = live.with_tasks([*before, new])
    assert computed == [new.num_memory_tokens] * on.depth
    heads = [grown._heads[task.sha256] is live._heads[task.sha256] for task in before]
    assert all(heads)
    assert list(live(images(3))) == list(answered) == [task.name for task in before]
    fresh = CombinedModel(on, [*before, new])(images(3))
    for name, logits in grown(images(3)).items():
        assert bits(logits) == bits(fresh[name])
        assert name == new.name or bits(logits) == bits(answered[name])


def test_tasks_that_leave_a_live_model_leave_its_memory() -> None:
    on = backbone()
    tasks = [random_task(on, f"task-{i}", memory=8, seed=i) for i in range(40)]
    live = CombinedModel(on, tasks)
    assert sorted(len(tile.class_tokens) for tile in live._store._tiles.values()) == [8, 32]
    live = live.with_tasks(tasks[:3])
    assert [len(tile.class_tokens) for tile in live._store._tiles.values()] == [4]
    assert list(live._heads) == [task.sha256 for task in tasks[:3]]


@pytest.mark.parametrize("sizes", [(TILE,), TILE_SIZES, None], ids=["canonical", "proven", "inexact"])
def test_every_task_has_a_slot_and_little_is_filled_up(sizes: tuple[int, ...] | None) -> None:
    for count in (1, 3, 4, 5, 10, 16, 17, 36, 64, 70, 100, 1000):
        cut = layout._cut(count, sizes)
        assert sum(cut) >= count
        assert sum(cut[:-1]) < count
        assert sum(cut) - count <= (0 if sizes is None else 15 if sizes == (TILE,) else 7), count


# --- the self-test ----------------------------------------------------------------------------------------------------


def fresh_backbone() -> FrozenBackbone:
    """One that no self-test has seen."""
    return FrozenBackbone(lively_vit(), "fresh", "hub")


def nudge(tensor: Tensor, where: object) -> Tensor:
    """Moves the last bits of a part of a tensor."""
    moved = tensor.clone()
    moved[where] *= 1 + 2**-20
    return moved


def finish_otherwise(monkeypatch: pytest.MonkeyPatch, when: Callable[[Tensor], bool], where: object) -> None:
    """Task tokens' linear layers give a part of the rows other bits."""
    honest = Family.finish

    def biased(self: Family, block: object, tokens: Tensor, *rest: object) -> Tensor:
        result = honest(self, block, tokens, *rest)
        return nudge(result, where) if when(tokens) else result

    monkeypatch.setattr(Family, "finish", biased)


def test_bits_that_depend_on_the_slot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    finish_otherwise(monkeypatch, lambda tokens: len(tokens) == TILE, 5)
    with pytest.raises(
        ExactnessError,
        match=r"Exact mode is refused .* tiles of 16 slots by 8 images, 1 private tokens and 8 memory keys\. Another",
    ):
        CombinedModel(on, [random_task(on, "task")])


def test_bits_that_depend_on_the_neighbour_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    honest = streams.attend

    def leaky(scale: float, queries: Tensor, frozen: KeyValue, *private: object) -> Tensor:
        return honest(scale, queries + 1e-6 * queries.roll(1, 0), frozen, *private)

    monkeypatch.setattr(streams, "attend", leaky)
    with pytest.raises(ExactnessError, match="its neighbours"):
        CombinedModel(on, [random_task(on, "task")])


def test_an_adapter_that_reaches_the_neighbour_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    honest = Adapter.__call__
    monkeypatch.setattr(Adapter, "__call__", lambda self, x: honest(self, x) + 1e-6 * honest(self, x).roll(1, 0))
    CombinedModel(on, [random_task(on, "plain")])
    with pytest.raises(ExactnessError, match=r"its neighbours .* 1 private tokens and 8 memory keys, rank 4\. Another"):
        CombinedModel(on, [random_task(on, "adapted", rank=3)])


@pytest.mark.parametrize("place", [0, 7])
def test_frozen_bits_that_depend_on_the_place_are_refused(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    honest = FrozenStream._embed
    monkeypatch.setattr(FrozenStream, "_embed", lambda self: nudge(honest(self), place))
    with pytest.raises(ExactnessError, match="keys and values depend on its place in 8 images"):
        CombinedModel(on, [random_task(on, "task")])


def test_a_head_whose_bits_depend_on_the_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    honest = F.linear

    def biased(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nudge(honest(inputs, weight, bias), 1)

    CombinedModel(on, [random_task(on, "narrow", classes=3)])
    monkeypatch.setattr("addenda.combined.heads.F.linear", biased)
    with pytest.raises(ExactnessError, match="a head of 32 rows on 8 images"):
        CombinedModel(on, [random_task(on, "wide", classes=20)])


def test_a_size_that_gives_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    finish_otherwise(monkeypatch, lambda tokens: len(tokens) == 64, 0)
    tasks = [random_task(on, f"task-{i}", seed=i) for i in range(70)]
    model = CombinedModel(on, tasks)
    assert model.shapes.slots == (4, 8, 12, 16, 32)
    assert {len(tile.class_tokens) for tile in model._layout(tuple(model.tasks)).tiles} == {32, 8}
    found = model(images(2))
    assert all(bits(found[task.name]) == alone(on, task, images(2)) for task in tasks[::9])


def test_one_image_goes_alone_only_where_that_was_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    task = random_task(on, "task")
    proven = CombinedModel(on, [task]).shapes.images
    if proven != (1, 4, 8):
        pytest.skip(f"this machine gives one image other bits than eight: {proven}")
    other = fresh_backbone()
    honest = FrozenStream._embed
    monkeypatch.setattr(
        FrozenStream, "_embed", lambda self: nudge(honest(self), 0) if len(self._images) == 1 else honest(self)
    )
    model = CombinedModel(other, [dataclasses.replace(task, backbone=other.fingerprint)])
    assert model.shapes.images == (4, 8)
    assert bits(model(images(1))["task"]) == bits(model(images(4))["task"])[:1]


def test_in_bfloat16_only_canonical_shapes_serve() -> None:
    """Another order of additions is nearly always rounded away there: no test of a few images tells equal from not."""
    on = backbone("plain", torch.bfloat16)
    model = CombinedModel(on, [random_task(on, "task")])
    assert model.shapes == Shapes((model.micro_batch,), (TILE,))
    assert [len(tile.class_tokens) for tile in model.layout.tiles] == [TILE]


def test_without_the_promise_nothing_is_tested_or_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    tasks = random_registry(on, 20, seed=8)
    exact = CombinedModel(on, tasks)
    finish_otherwise(monkeypatch, lambda tokens: True, 0)
    other = fresh_backbone()
    with pytest.raises(ExactnessError):
        CombinedModel(other, tasks)
    loose = CombinedModel(other, tasks, exact=False)
    found, expected = loose(images(5)), exact(images(5))
    assert (found.exact, expected.exact) == (False, True)
    assert all((found[name] - logits).abs().max() <= 1e-4 * logits.abs().max() for name, logits in expected.items())
    sizes = [len(tile.class_tokens) for tile in loose._layout(tuple(loose.tasks)).tiles]
    assert sum(sizes) == sum(task.class_token is not None for task in tasks)


def test_a_shape_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    CombinedModel(on, [random_task(on, "task", memory=5)])
    passes: list[int] = []
    honest = FrozenStream._embed
    monkeypatch.setattr(FrozenStream, "_embed", lambda self: passes.append(len(self._images)) or honest(self))
    CombinedModel(on, [random_task(on, "other", memory=7, classes=9)])
    assert passes == []
    with threads(torch.get_num_threads() + 1):
        CombinedModel(on, [random_task(on, "other", memory=7)])
    assert passes == [8, 8, 1, 1, 4, 4]


def test_a_head_is_tested_on_both_its_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    on = fresh_backbone()
    honest = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *inputs: nudge(honest(*inputs), 1))
    CombinedModel(on, [random_task(on, "token-only", pooled=False)])
    with pytest.raises(ExactnessError, match="a head of 16 rows on 8 images"):
        CombinedModel(on, [random_task(on, "both")])


def test_settings_that_changed_under_a_live_model_are_noticed() -> None:
    on = wide_backbone(torch.float32)
    tasks = [random_task(on, f"task-{i}", memory=5, seed=i) for i in range(3)]
    with threads(2):
        live = CombinedModel(on, tasks)
        live(images(1))
    with threads(1):
        with pytest.raises(ExactnessError, match=r"This model was made under .*'threads': 2.*make the model anew"):
            live(images(1))
        anew, fresh = live.with_tasks(tasks)(images(2)), CombinedModel(on, tasks)(images(2))
    assert all(bits(anew[name]) == bits(fresh[name]) for name in fresh)


def test_autocast_does_not_reach_the_pass() -> None:
    on = backbone()
    model = CombinedModel(on, list(family(on).values()))
    expected = model(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(2))
    assert all(bits(found[name]) == bits(logits) for name, logits in expected.items())


def test_a_backbone_that_carried_a_model_is_freed() -> None:
    on = fresh_backbone()
    CombinedModel(on, [random_task(on, "task")])(images(1))
    gone = weakref.ref(on)
    del on
    gc.collect()
    assert gone() is None


def test_subsets_do_not_push_out_the_whole() -> None:
    on = backbone()
    model = CombinedModel(on, [random_task(on, f"task-{i}", seed=i) for i in range(12)])
    whole = model.layout
    for name in model.tasks:
        model(images(1), [name])
    assert model.layout is whole
    assert len(model._store._tiles) <= len(whole.tiles) + 8


# --- sabotage: these tests would notice -------------------------------------------------------------------------------


def sabotage(monkeypatch: pytest.MonkeyPatch, harm: Callable[[layout.Tile], None]) -> None:
    """Every tile made from here on is harmed; the self-test, whose tiles are all alike, is put to sleep."""
    build = TileStore._build

    def harmed(self: TileStore, size: int, tasks: Sequence[Task], offered: dict[str, int]) -> layout.Tile:
        tile = build(self, size, tasks, offered)
        harm(tile)
        return tile

    monkeypatch.setattr(TileStore, "_build", harmed)
    monkeypatch.setattr("addenda.combined.selftest._equal", lambda one, other: True)


def first_slot_sees_the_last_offered_token(tile: layout.Tile) -> None:
    tile.ancestors[0, 0] = 2


def first_slot_sees_the_next_memory(tile: layout.Tile) -> None:
    for layer in tile.memory:
        layer.keys[0, :, -1], layer.values[0, :, -1] = layer.keys[1, :, 0], layer.values[1, :, 0]


def first_slot_has_the_next_ones_adapters(tile: layout.Tile) -> None:
    for layer in tile.adapters:
        layer.fc1.up[0] = layer.fc1.up[1]


def first_slot_has_some_of_the_next_ones_queries(tile: layout.Tile) -> None:
    tile.adapters[-1].q.down[0, -1], tile.adapters[-1].q.up[0, :, -1] = (
        tile.adapters[-1].q.down[1, -1],
        tile.adapters[-1].q.up[1, :, -1],
    )


def filling_counts(tile: layout.Tile) -> None:
    tile.bias.zero_()


def own_token_is_hidden(tile: layout.Tile) -> None:
    tile.bias[:, 0] = float("-inf")


def two_families() -> tuple[Task, list[Task]]:
    """A child of two, and another of the same class."""
    on = backbone()
    kin = [random_task(on, f"kin-{i}", memory=2, seed=i) for i in range(4)]
    task = random_task(on, "task", memory=4, parents=tuple(kin[:2]), seed=7, rank=3)
    return task, [random_task(on, "other", memory=4, parents=tuple(kin[2:]), seed=8, rank=4)]


@pytest.mark.parametrize(
    "harm",
    [
        first_slot_sees_the_last_offered_token,
        first_slot_sees_the_next_memory,
        first_slot_has_the_next_ones_adapters,
        first_slot_has_some_of_the_next_ones_queries,
    ],
)
def test_a_leak_between_tasks_would_move_bits(
    harm: Callable[[layout.Tile], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on = backbone()
    task, company = two_families()
    assert_company_moves_no_bit(on, task, company)

    def harm_children(tile: layout.Tile) -> None:
        if tile.ancestors.shape[1]:
            harm(tile)

    sabotage(monkeypatch, harm_children)
    with pytest.raises(AssertionError):
        assert_company_moves_no_bit(on, task, company)


@pytest.mark.parametrize("harm", [filling_counts, own_token_is_hidden])
def test_a_wrong_mask_would_differ_from_the_dense_one(
    harm: Callable[[layout.Tile], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filling key that counts moves no bits in company, since it is the task's own: only this test sees it."""
    on = backbone("plain", torch.float64)
    task, other = random_task(on, "task", memory=5), random_task(on, "other", memory=5, seed=1)
    expected = DenseMask(lively_vit())(images(2), [task])["task"]
    assert (CombinedModel(on, [task, other])(images(2))["task"] - expected).abs().max() <= 1e-10
    sabotage(monkeypatch, harm)
    assert (CombinedModel(on, [task, other])(images(2))["task"] - expected).abs().max() > 1e-3


def filled_up_rank_counts(tile: layout.Tile) -> None:
    for layer in tile.adapters or ():
        for down, up in layer:
            down[:, -1], up[:, :, -1] = 0.3, 0.3


def every_layer_has_the_firsts_adapters(tile: layout.Tile) -> None:
    for layer in tile.adapters or ():
        for (down, up), (first_down, first_up) in zip(layer, tile.adapters[0], strict=True):
            down.copy_(first_down), up.copy_(first_up)


def fc2_is_not_updated(tile: layout.Tile) -> None:
    for layer in tile.adapters or ():
        layer.fc2.up.zero_()


@pytest.mark.parametrize("whose", ["task", "parent"])
@pytest.mark.parametrize("harm", [filled_up_rank_counts, every_layer_has_the_firsts_adapters, fc2_is_not_updated])
def test_wrong_adapters_would_differ_from_the_dense_mask(
    harm: Callable[[layout.Tile], None], whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = backbone("plain", torch.float64)
    parent = random_task(on, "parent", memory=5, rank=3)
    asked = parent if whose == "task" else random_task(on, "child", memory=5, parents=(parent,), seed=1)
    expected = DenseMask(lively_vit())(images(2), [asked])[asked.name]
    assert (CombinedModel(on, [asked])(images(2))[asked.name] - expected).abs().max() <= 1e-10
    sabotage(monkeypatch, harm)
    assert (CombinedModel(on, [asked])(images(2))[asked.name] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("whose", ["task", "parent"])
def test_adapted_keys_or_values_would_differ_from_the_dense_mask(
    part: str, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a task offers, to itself and to those that extend it, is what the backbone's own weights make of it."""
    on = backbone("plain", torch.float64)
    parent = random_task(on, "parent", memory=5, rank=3)
    asked = parent if whose == "task" else random_task(on, "child", memory=5, parents=(parent,), seed=1)
    expected = DenseMask(lively_vit())(images(2), [asked])[asked.name]
    honest = Family.project

    def adapted(self: Family, block: object, tokens: Tensor, adapters: BlockAdapters | None = None) -> object:
        found = dict(zip(("queries", "keys", "values"), honest(self, block, tokens, adapters), strict=True))
        if adapters is not None:
            update = adapters.q(block.norm1(tokens))
            found[part] = found[part] + update.unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
        return tuple(found.values())

    monkeypatch.setattr(Family, "project", adapted)
    assert (CombinedModel(on, [asked])(images(2))[asked.name] - expected).abs().max() > 1e-3


def test_memory_shared_by_two_tasks_would_move_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    task, other = random_task(on, "task", memory=5), random_task(on, "other", memory=5, seed=1)
    honest = TileStore.memory
    last: dict[str, Task] = {}
    expected = alone(on, task, images(2))
    monkeypatch.setattr(TileStore, "memory", lambda self, asked: honest(self, last.setdefault("task", asked)))
    assert bits(CombinedModel(on, [other, task])(images(2))["task"]) != expected
