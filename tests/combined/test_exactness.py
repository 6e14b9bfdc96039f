"""Exactness: a task's logits have the same bytes alone and with any other tasks, order, subset, batch and process."""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from functools import cache
from multiprocessing.connection import Connection

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from addenda.backbones import FrozenBackbone, KeyValue, load_backbone
from addenda.combined import CombinedModel, Layout, TileStore, forward_pass, golden, loaded_bytes, tiles
from addenda.combined.shapes import TILE, TILE_SIZES, size_class, tile_sizes
from addenda.combined.tiles import memory_key_values
from addenda.exceptions import ExactnessError
from addenda.registry import Task
from tests.support.models import (
    PRECISIONS,
    alone,
    assert_company_moves_no_bit,
    backbone,
    bits,
    family,
    fresh_backbone,
    head_only,
    images,
    in_both_precisions,
    lively_vit,
    random_registry,
    threads,
    wide_backbone,
)
from tests.support.places import SHARED
from tests.support.processes import FORKS, exit_code
from tests.support.tasks import random_task
from tests.support.tiny import STAGED

# --- random registries ------------------------------------------------------------------------------------------------


def vit_tiny(precision: torch.dtype) -> FrozenBackbone:
    weights = SHARED / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    name = str(precision).removeprefix("torch.")
    return load_backbone("vit_tiny_patch16_224", weights, (0.5,) * 3, (0.5,) * 3, precision=name, device="cpu")


def check_a_random_registry(
    on: FrozenBackbone, seed: int, num_tasks: int, num_images: int, num_checked: int, data: st.DataObject
) -> None:
    """Compares tasks of a random registry, in any order, subset and batch, with each task alone on one image."""
    size = on.preprocessing["input_size"][1]
    pictures = torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    tasks = random_registry(on, num_tasks, seed)
    model = CombinedModel(on, data.draw(st.permutations(tasks), label="order"))
    names = st.sampled_from([task.name for task in tasks])
    checked = data.draw(st.lists(names, min_size=1, max_size=num_checked, unique=True), label="checked")
    more = data.draw(st.lists(names, max_size=10, unique=True), label="also requested")
    together, subset = model(pictures), model(pictures, [*checked, *more])
    assert together.exact
    assert set(subset) == {*checked, *more}
    positions = {0, num_images - 1, data.draw(st.integers(0, num_images - 1), label="position")}
    for task in (task for task in tasks if task.name in checked):
        single = CombinedModel(on, [task])
        for i in positions:
            (expected,) = bits(single(pictures[i : i + 1])[task.name])
            assert bits(together[task.name])[i] == expected
            assert bits(subset[task.name])[i] == expected


REGISTRY = {"seed": st.integers(0, 2**20), "num_images": st.integers(1, 33), "data": st.data()}


@in_both_precisions(
    ["plain", "dinov2", "average", "wide", "dinov3", "eva02", "siglip", "gap-registers", "pe-core", *STAGED]
)
@settings(deadline=None, max_examples=2)
@given(num_tasks=st.integers(1, 24), **REGISTRY)
def test_a_task_keeps_its_bits_in_any_registry(
    variant: str, precision: torch.dtype, num_tasks: int, seed: int, num_images: int, data: st.DataObject
) -> None:
    on = wide_backbone(precision) if variant == "wide" else backbone(variant, precision)
    check_a_random_registry(on, seed, num_tasks, num_images, 3, data)


@in_both_precisions(["siglip", *STAGED])
def test_a_head_on_layer_features_keeps_its_bits_in_any_batch_on_one_and_two_threads(
    variant: str, precision: torch.dtype
) -> None:
    on, pictures = backbone(variant, precision), images(9)
    tasks = [head_only(random_task(on, f"task-{i}", classes=2 + i, seed=i, layers=(0, 3)[i])) for i in range(2)]
    compared = 0
    for num_threads in (1, 2):
        with threads(num_threads):
            model = CombinedModel(on, tasks)
            expected = {name: bits(logits) for name, logits in model(pictures).items()}
            for task in tasks:
                assert alone(on, task, pictures) == expected[task.name]
                for order in (torch.arange(9).roll(4), torch.arange(8), torch.arange(5).flip(0)):
                    assert bits(model(pictures[order])[task.name]) == [expected[task.name][i] for i in order]
                    compared += 1
    assert compared == 12


@pytest.mark.slow
@PRECISIONS
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("variant", ["plain", "clip", "wide", "dinov3", "eva02-small", "siglip", "resnet", "maxvit"])
@settings(deadline=None, max_examples=3)
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


# --- single influences ------------------------------------------------------------------------------------------------


@PRECISIONS
def test_a_task_keeps_its_bits_when_wider_tasks_join(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    narrow = random_task(on, "narrow", memory=1)
    wide = [random_task(on, f"wide-{memory}", memory, seed=memory) for memory in (7, 9, 17, 40)]
    deep = random_task(on, "deep", memory=9, parents=tuple(wide), seed=50)
    assert len({size_class(task) for task in (narrow, *wide, deep)}) > 4
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


@pytest.mark.slow
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


@pytest.mark.slow
@PRECISIONS
def test_tasks_keep_their_bits_with_the_heads_of_a_real_backbone(precision: torch.dtype) -> None:
    """With 64 dimensions per head, some products of two or three columns give different bits in different rows."""
    on = wide_backbone(precision)
    pictures = images(4)
    tasks = [random_task(on, f"memory-{m}", memory=m, classes=m + 1, seed=m, pooled=m % 2 == 0) for m in range(11)]
    tasks.append(random_task(on, "child", memory=1, classes=3, parents=(tasks[1],), seed=20))
    together = CombinedModel(on, tasks)(pictures)
    rolled = CombinedModel(on, tasks[::-1])(pictures.roll(1, 0))
    for task in tasks:
        expected = alone(on, task, pictures)
        assert bits(together[task.name]) == expected, task.name
        assert bits(rolled[task.name].roll(-1, 0)) == expected, task.name


@pytest.mark.slow
@PRECISIONS
@pytest.mark.parametrize("variant", ["plain", "wide"])
def test_tasks_keep_their_bits_at_every_rank(variant: str, precision: torch.dtype) -> None:
    """Without padding, at rank 2 and 48 dimensions, batches of four and eight images give different bits."""
    on = wide_backbone(precision) if variant == "wide" else backbone(variant, precision)
    pictures = images(4)
    tasks = [random_task(on, f"rank-{r}", memory=4, seed=r, rank=r) for r in (0, 1, 2, 3, 4, 5, 8, 16, 32)]
    tasks.append(random_task(on, "child", memory=0, parents=(tasks[6],), seed=40, rank=2))
    tasks.append(random_task(on, "plain-child", memory=0, parents=(tasks[6],), seed=41))
    together = CombinedModel(on, tasks)(pictures)
    rolled = CombinedModel(on, tasks[::-1])(pictures.roll(1, 0))
    for task in tasks:
        expected = alone(on, task, pictures)
        assert bits(together[task.name]) == expected, task.name
        assert bits(rolled[task.name].roll(-1, 0)) == expected, task.name


def test_an_adapted_task_changes_no_bit_of_a_task_without_adapters() -> None:
    on = backbone()
    plain, adapted = random_task(on, "plain"), random_task(on, "adapted", seed=1, rank=4)
    assert_company_moves_no_bit(on, plain, [adapted])
    assert_company_moves_no_bit(on, adapted, [plain])
    assert len(CombinedModel(on, [plain, adapted]).layout.tiles) == 2


def test_empty_slots_and_padded_ranks_are_zeros() -> None:
    on = backbone()
    tasks = [random_task(on, f"rank-{r}", memory=4, seed=r, rank=r) for r in (5, 8, 7)]
    (tile,) = CombinedModel(on, tasks).layout.tiles
    assert isinstance(tile, tiles.Tile)
    assert (len(tile.class_tokens), tile.rank, len(tile.updates)) == (4, 8, on.depth)
    for layer in range(on.depth):
        for site, (down, up) in tile.adapters(layer)._asdict().items():
            for slot, task in enumerate(tasks):
                expected = task.adapters[site]
                assert torch.equal(down[slot, : task.adapter_rank], expected.down[layer])
                assert torch.equal(up[slot, :, : task.adapter_rank], expected.up[layer])
                assert down[slot, task.adapter_rank :].count_nonzero() == 0
                assert up[slot, :, task.adapter_rank :].count_nonzero() == 0
            assert down[3].count_nonzero() == up[3].count_nonzero() == 0


@pytest.mark.slow
def test_a_head_gives_an_image_the_same_bits_at_every_position_in_the_batch() -> None:
    on = backbone()
    picture = images(1)
    for classes in (*range(1, 18), 100):
        task = random_task(on, "task", memory=1, classes=classes, seed=classes)
        model = CombinedModel(on, [task, head_only(dataclasses.replace(task, name="head"))])
        results = []
        for i in range(model.micro_batch):
            batch = images(model.micro_batch, seed=8)
            batch[i] = picture
            results.append([bits(logits)[i] for logits in model(batch).values()])
        assert results == [results[0]] * model.micro_batch, f"{classes} classes"


@pytest.mark.slow
def test_a_broken_image_changes_no_other_image_in_its_batch() -> None:
    on = backbone()
    model = CombinedModel(on, list(family(on).values()))
    expected, broken = model(images()), images()
    broken[1], broken[6] = float("nan"), float("inf")
    for name, logits in model(broken).items():
        for i in (0, 2, 3, 4, 5, 7, 8):
            assert bits(logits)[i] == bits(expected[name])[i]


def test_equal_tasks_with_two_names_give_the_same_bits() -> None:
    on = backbone()
    task = family(on)["child"]
    twin = dataclasses.replace(task, name="twin")
    logits = CombinedModel(on, [task, *family(on).values(), twin])(images(2))
    assert bits(logits["twin"]) == bits(logits["child"])


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
                expected = torch.cat([stock(chunk) for chunk in padded.split(model.micro_batch)])[:count]
            assert torch.equal(model.backbone_logits(images(count)), expected)


@PRECISIONS
def test_observed_keys_and_values_do_not_depend_on_other_tasks(precision: torch.dtype) -> None:
    on = backbone("plain", precision)
    task = family(on)["sees-two"]
    offered = [task, *task.closure]
    observed: list[list[bytes]] = []
    for company in ([task], list(family(on).values())):
        layout = Layout(TileStore(on), company, offered=offered)
        rows = [layout.offered[member.sha256] for member in offered]
        layers: list[bytes] = []

        def record(
            layer: int, frozen: KeyValue, tokens: KeyValue, layers: list[bytes] = layers, rows: list[int] = rows
        ):
            layers.extend(part.float().numpy().tobytes() for part in frozen)
            layers.extend(part[:, :, rows].float().numpy().tobytes() for part in tokens)

        forward_pass(on, images(8), layout, observe=record)
        observed.append(layers)
    assert len(observed[0]) == 4 * on.depth
    assert observed[0] == observed[1]


def send_digests(sender: Connection) -> None:
    torch.set_num_threads(1)
    on = backbone("dinov2")
    sender.send([golden(on, task).digest for task in random_registry(on, 8, seed=4)])


@pytest.mark.slow
@pytest.mark.usefixtures("another_interpreter")
def test_a_task_keeps_its_bits_in_another_process() -> None:
    from addenda.combined import tensor_digest
    from addenda.combined.probe_inputs import probe_images

    on = backbone("dinov2")
    tasks = random_registry(on, 8, seed=4)
    together = CombinedModel(on, tasks)(probe_images(on))
    receiver, sender = FORKS.Pipe(duplex=False)
    assert exit_code(send_digests, sender, timeout_s=300) == 0
    assert receiver.recv() == [tensor_digest(together[task.name]) for task in tasks]


# --- adding tasks to a live model -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_live_model_computes_only_the_memory_of_a_new_task(monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    new = random_task(on, "new", memory=5, seed=30, rank=5)
    before = [*random_registry(on, 21, seed=3), random_task(on, "of its class", memory=6, seed=31, rank=8)]
    live = CombinedModel(on, before)
    logits_before = live(images(3))
    computed: list[int] = []

    def counting(on: FrozenBackbone, block: object, memory: Tensor) -> KeyValue:
        computed.append(memory.shape[1])
        return memory_key_values(on, block, memory)

    monkeypatch.setattr(tiles, "memory_key_values", counting)
    grown = live.with_tasks([*before, new])
    assert computed == [new.num_memory_tokens] * on.depth
    heads = [grown._heads[task.sha256] is live._heads[task.sha256] for task in before]
    assert all(heads)
    assert list(live(images(3))) == list(logits_before) == [task.name for task in before]
    fresh = CombinedModel(on, [*before, new])(images(3))
    for name, logits in grown(images(3)).items():
        assert bits(logits) == bits(fresh[name])
        assert name == new.name or bits(logits) == bits(logits_before[name])


def test_tasks_removed_from_a_live_model_are_freed() -> None:
    on = backbone()
    tasks = [random_task(on, f"task-{i}", memory=8, seed=i) for i in range(40)]
    live = CombinedModel(on, tasks)
    assert sorted(len(tile.class_tokens) for tile in live._store._tiles.values()) == [8, 32]
    live = live.with_tasks(tasks[:3])
    assert [len(tile.class_tokens) for tile in live._store._tiles.values()] == [4]
    assert list(live._heads) == [task.sha256 for task in tasks[:3]]


@pytest.mark.parametrize("sizes", [(TILE,), TILE_SIZES, None], ids=["canonical", "proven", "inexact"])
def test_every_task_has_a_slot_and_padding_is_small(sizes: tuple[int, ...] | None) -> None:
    for count in (1, 3, 4, 5, 10, 16, 17, 36, 64, 70, 100, 1000):
        slots = tile_sizes(count, sizes)
        assert sum(slots) >= count
        assert sum(slots[:-1]) < count
        assert sum(slots) - count <= (0 if sizes is None else 15 if sizes == (TILE,) else 7), count


def test_settings_that_changed_under_a_live_model_are_detected() -> None:
    on = wide_backbone(torch.float32)
    tasks = [random_task(on, f"task-{i}", memory=5, seed=i) for i in range(3)]
    with threads(2):
        live = CombinedModel(on, tasks)
        live(images(1))
    with threads(1):
        with pytest.raises(ExactnessError, match=r"this model was made: threads was 2, now 1\. Restore it"):
            live(images(1))
        reloaded, fresh = live.with_tasks(tasks)(images(2)), CombinedModel(on, tasks)(images(2))
    assert all(bits(reloaded[name]) == bits(fresh[name]) for name in fresh)


def test_autocast_does_not_affect_the_forward_pass() -> None:
    on = backbone()
    model = CombinedModel(on, list(family(on).values()))
    expected = model(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        logits_in_autocast = model(images(2))
    assert all(bits(logits_in_autocast[name]) == bits(logits) for name, logits in expected.items())


def test_a_backbone_is_freed_after_its_model() -> None:
    on = fresh_backbone()
    CombinedModel(on, [random_task(on, "task")])(images(1))
    reference = weakref.ref(on)
    del on
    gc.collect()
    assert reference() is None


def test_subsets_do_not_evict_the_full_layout() -> None:
    on = backbone()
    model = CombinedModel(on, [random_task(on, f"task-{i}", seed=i) for i in range(12)])
    layout = model.layout
    for name in model.tasks:
        model(images(1), [name])
    assert model.layout is layout
    assert len(model._store._tiles) == len(layout.tiles)


@pytest.mark.slow
def test_subsets_store_no_copies() -> None:
    on, choose = backbone(), random.Random(0)
    model = CombinedModel(on, [random_task(on, f"task-{i}", memory=40, rank=4 * (i % 2), seed=i) for i in range(48)])
    pixels = images(1)
    expected = {name: bits(logits) for name, logits in model(pixels).items()}
    before = bytes_alive()
    for _ in range(16):
        subset = choose.sample(list(model.tasks), 40)
        found = {name: bits(logits) for name, logits in model(pixels, subset).items()}
        assert found == {name: expected[name] for name in subset}
    assert bytes_alive() - before < 0.05 * loaded_bytes(model)


def bytes_alive() -> int:
    """Total memory of all tensors; those of a test that compiled something have none."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    storages = [value.untyped_storage() for value in tensors if not issubclass(type(value), FakeTensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
