"""`addenda bench cost`: its baseline is the paper's dense mask, and operations are those that torch counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from addenda.backbones import MIN_ROWS
from addenda.benchmarks.baselines.dense_mask import DenseMask
from addenda.benchmarks.cost import DENSE, DENSE_PRECOMPUTED, LAYER_HEADS, STOCK, run_cost
from addenda.combined import CombinedModel, loaded_bytes, pass_operations, task_cost
from tests.support import dense_mask as reference
from tests.support.models import backbone, images, lively_vit, quick_first
from tests.support.tasks import random_task
from tests.support.tiny import EVA

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche and what it imports warn while they load


@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("variant", ["plain", "dinov2", "clip", "average", *EVA])
def test_the_baseline_is_the_papers_dense_mask(variant: str, precomputed: bool) -> None:
    on = backbone(variant, torch.float64)
    tasks = [random_task(on, f"task-{m}", memory=m, classes=2 + m, seed=m, pooled=m % 2 == 0) for m in (0, 5, 9)]
    expected = reference.DenseMask(lively_vit(variant))(images(3), tasks)
    outputs = DenseMask(on, tasks, precomputed=precomputed)(images(3))
    assert list(outputs) == list(expected)
    for name, logits in outputs.items():
        assert (logits - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max()  # its heads are in float32


@pytest.mark.slow
@quick_first(["plain", "average", "siglip", "gap-registers", *EVA])
def test_operations_are_those_that_torch_counts(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "addenda.combined.model.operations_sample", bytes
    )  # else the operations of its check are counted too
    on = backbone(variant)
    tasks = [
        random_task(on, f"task-{i}", memory=i % 7, classes=2 + i, seed=i, pooled=i % 2 == 0, rank=(0, 0, 3, 8)[i % 4])
        for i in range(21)
    ]
    model = CombinedModel(on, tasks)
    with FlopCounterMode(display=False) as counter:
        model(images(model.micro_batch))
    operations = counter.get_flop_counts()["Global"].items()
    counted = sum(flops for name, flops in operations if "scaled_dot_product" not in str(name)) / 2 / model.micro_batch
    # torch does not count elementwise products (a query with its own token) nor, in older versions, the CPU's fused
    # attention. If the class token is pooled, the last block has MIN_ROWS queries.
    own = sum(2 * on.depth * on.embed_dim * len(tile.class_tokens) for tile in model.layout.tiles)
    queries = on.num_tokens * (on.depth - 1) + 4 if on.pools_class_token else on.num_tokens * on.depth
    queries += MIN_ROWS * (on.model.global_pool == "map")  # the attention pool's
    fused = 2 * on.embed_dim * on.num_tokens * queries
    assert pass_operations(model) == counted + own + fused
    assert pass_operations(model, filled=False) < pass_operations(model)


@pytest.mark.slow
def test_a_tasks_cost_is_what_it_adds_to_the_forward_pass() -> None:
    on = backbone()
    for rank in (0, 3, 8):
        first, task = (random_task(on, name, memory=5, rank=rank, seed=i) for i, name in enumerate(("first", "task")))
        operations = [pass_operations(CombinedModel(on, tasks), filled=False) for tasks in ([first], [first, task])]
        cost = task_cost(on, 5, adapter_rank=rank)
        head = 2 * 3 * on.embed_dim  # 3 classes, two features
        assert operations[1] - operations[0] == cost.operations + head
        assert cost.token_bytes == 4 * (task.num_parameters - 3 * (2 * on.embed_dim + 1))


def test_operations_of_a_model_without_blocks_are_its_own_and_its_heads() -> None:
    on = backbone("resnet")
    task = random_task(on, "task", classes=3, layers=0)
    assert task_cost(on, 0).backbone_operations == on.patch_operations() > 0
    head = 3 * (on.embed_dim + on.num_layer_features)
    assert pass_operations(CombinedModel(on, [task]), filled=False) == on.patch_operations() + head


def test_loaded_bytes_grow_by_the_bytes_of_a_task() -> None:
    on = backbone()
    tasks = [random_task(on, f"task-{i}", memory=8, classes=16, seed=i) for i in range(128)]
    sizes = [loaded_bytes(CombinedModel(on, tasks[:count])) for count in (64, 128)]
    keys_and_values = 2 * 4 * 8 * on.depth * on.embed_dim
    heads = 4 * 16 * (2 * on.embed_dim + 1)
    assert sizes == [64 * (keys_and_values + heads + 4 * on.embed_dim + 4 * 9), 2 * sizes[0]]
    adapted = [random_task(on, f"task-{i}", memory=8, classes=16, seed=i, rank=8) for i in range(64)]
    updates = 4 * 8 * on.depth * (4 * on.embed_dim + 2 * 5 * on.embed_dim)
    assert loaded_bytes(CombinedModel(on, adapted)) == sizes[0] + 64 * updates


@pytest.mark.slow
def test_bench_cost_measures_and_records_every_method(tmp_path: Path) -> None:
    rows = run_cost(["test_vit"], tmp_path, quick=True, batch=4)
    variants = {(row.what, row.num_tasks) for row in rows}
    assert {("combined, exact", 1), ("combined, exact", 10), ("combined, exact", 100)} < variants
    assert {(LAYER_HEADS, 1), (LAYER_HEADS, 10), (LAYER_HEADS, 100)} < variants
    assert {(DENSE_PRECOMPUTED, 100), (DENSE, 100)} < variants
    assert {("separate passes", 10), ("one image, exact", 10), ("vit-pytorch's adapter", 1), (STOCK, 0)} < variants
    for row in rows:
        assert 0 < row.low <= row.seconds <= row.high
        assert row.what != row.reference or row.ratio == 1
    written = json.loads((tmp_path / "cost.json").read_text())
    assert [row["what"] for row in written["rows"]] == [row.what for row in rows]
    assert "| combined, exact | 100 | 4 |" in (tmp_path / "cost.md").read_text()
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
