"""Backbones and tasks that a script has changed, compiled or copied: refused, or with the bits of before."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from addenda import CombinedModel, FrozenBackbone, Registry, load_backbone
from addenda.combined import attention_map, golden, numerics, numerics_fingerprint
from addenda.exceptions import BackboneError, ExactnessError, IntegrityError
from addenda.registry import Task
from tests.support.models import backbone, bits, fresh_backbone, head_only, images, lively_vit
from tests.support.ordinary import PLAIN_AND_ROTARY, changed, plain_bits, same_bits, tasks_of
from tests.support.tasks import random_task

# --- changes of a live model's backbone and tasks ---------------------------------------------------------------------


@pytest.mark.slow
@PLAIN_AND_ROTARY
def test_attention_that_is_no_longer_fused_is_refused(variant: str) -> None:
    on = backbone(variant)
    model = CombinedModel(on, tasks_of(on))
    attention = on.blocks[1].attn
    with (
        changed(lambda: attention.fused_attn, lambda new: setattr(attention, "fused_attn", new), False),
        pytest.raises(ExactnessError, match="fused_attention was True, now 101"),
    ):
        model(images(2))
    model(images(2))


def replace_activation(on: FrozenBackbone) -> None:
    on.model.blocks[1].mlp.act = nn.ReLU()


def replace_block(on: FrozenBackbone) -> None:
    on.model.blocks[1] = nn.Identity()


def compile_block(on: FrozenBackbone) -> None:
    on.model.blocks[1].compile()


def train(on: FrozenBackbone) -> None:
    on.model.train()


def add_hook(on: FrozenBackbone) -> None:
    on.model.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def write_weight(on: FrozenBackbone) -> None:
    with torch.no_grad():
        on.model.blocks[1].mlp.fc1.weight[0, 0] += 1


def load_weights(on: FrozenBackbone) -> None:
    on.model.load_state_dict({name: 1.01 * tensor for name, tensor in on.model.state_dict().items()})


def cast_and_back(on: FrozenBackbone) -> None:
    on.model.bfloat16().float()


def cast_up(on: FrozenBackbone) -> None:
    on.model.double()


def from_a_vector(on: FrozenBackbone) -> None:
    parameters = nn.utils.parameters_to_vector(on.model.parameters())
    nn.utils.vector_to_parameters(parameters * 1.01, on.model.parameters())


def other_gelu(on: FrozenBackbone) -> None:
    on.model.blocks[1].mlp.act.approximate = "tanh"


def other_pooling(on: FrozenBackbone) -> None:
    on.model.global_pool = "avg"


def weights_channels_last(on: FrozenBackbone) -> None:
    on.model.to(memory_format=torch.channels_last)


def own_forward(on: FrozenBackbone) -> None:
    on.model.blocks[1].norm1.forward = nn.Identity()


def other_epsilon(on: FrozenBackbone) -> None:
    on.model.blocks[1].norm1.eps = 1e-2


def other_scale(on: FrozenBackbone) -> None:
    on.model.blocks[1].attn.scale *= 2


def other_hook(on: FrozenBackbone) -> None:
    qkv = on.model.blocks[1].attn.qkv
    (key, hook), *_ = qkv._forward_hooks.items()
    qkv._forward_hooks[key] = lambda module, inputs, output: hook(module, inputs, 2 * output)


HARMS = [
    replace_activation, replace_block, compile_block, train, add_hook, write_weight, load_weights, own_forward,
    other_epsilon, other_scale, cast_and_back, cast_up, from_a_vector, other_gelu, other_pooling,
    weights_channels_last, other_hook,
]  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_backbone_that_has_changed_since_it_was_loaded_is_refused(harm: Callable[[FrozenBackbone], None]) -> None:
    on = fresh_backbone()
    task = random_task(on, "task")
    model = CombinedModel(on, [task])
    model(images(1))
    harm(on)
    uses: list[Callable[[], object]] = [
        lambda: model(images(1)), lambda: CombinedModel(on, [task]), lambda: golden(on, task),
        lambda: copy.deepcopy(on), lambda: pickle.dumps(on),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(IntegrityError, match=r"has changed since it was loaded|have changed since they were"):
            use()


@pytest.mark.parametrize("kind", ["eva02", "pe-core"])
def test_a_buffer_that_no_checkpoint_has_is_part_of_what_must_not_change(kind: str) -> None:
    on = FrozenBackbone(lively_vit(kind), kind, "hub")
    model = CombinedModel(on, [random_task(on, "task")])
    saved = on.model.state_dict()
    for name, buffer in on.model.named_buffers():
        if name not in saved:
            buffer.mul_(0.5)
    with pytest.raises(IntegrityError, match="have changed since they were loaded"):
        model(images(1))


def test_a_model_with_hooks_is_no_backbone() -> None:
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = lively_vit()
        hook = getattr(model.blocks[1].mlp, register)(lambda *_: None)
        with pytest.raises(BackboneError, match=r"its module 'blocks.1.mlp' has a forward hook; remove it"):
            FrozenBackbone(model, "hooked", "hub")
        hook.remove()
        on = FrozenBackbone(model, "hooked", "hub")
        assert FrozenBackbone(model, "again", "hub").fingerprint == on.fingerprint  # with our own hooks


def reload_state(on: FrozenBackbone) -> None:
    on.model.load_state_dict(on.model.state_dict())


def share(on: FrozenBackbone) -> None:
    on.model.share_memory()


def evaluate_again(on: FrozenBackbone) -> None:
    on.model.train().eval()


def unfreeze(on: FrozenBackbone) -> None:
    on.model.requires_grad_(True)


def add_and_remove_hook(on: FrozenBackbone) -> None:
    on.model.blocks[0].register_forward_hook(lambda *_: None).remove()


@pytest.mark.parametrize("use", [reload_state, share, evaluate_again, unfreeze, add_and_remove_hook])
def test_uses_that_change_nothing_are_not_refused(use: Callable[[FrozenBackbone], None]) -> None:
    """With glyphs, because a weight that requires gradients changed its bits but not those of the tiny models."""
    on = load_backbone("glyphs", device="cpu")
    tasks = [random_task(on, "token"), head_only(random_task(on, "head", seed=1))]
    model, pixels = CombinedModel(on, tasks), images(3)
    expected, probe = {name: bits(logits) for name, logits in model(pixels).items()}, golden(on, tasks[0])
    use(on)
    assert same_bits(model(pixels), expected)
    assert same_bits(CombinedModel(on, tasks)(pixels), expected)
    again = golden(on, tasks[0])
    assert (again.digest, again.numerics_fingerprint) == (probe.digest, probe.numerics_fingerprint)
    fresh = load_backbone("glyphs", device="cpu")
    use(fresh)
    assert numerics_fingerprint(numerics(fresh)) == probe.numerics_fingerprint


def nudging(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    """A torch.compile backend whose kernels change the last bits, as real ones do."""
    return lambda *given: [x * (1 + 2**-18) if x.is_floating_point() else x for x in graph(*given)]


@pytest.mark.slow
def test_a_call_within_compiled_code_keeps_its_bits() -> None:
    on = backbone()
    model, pixels = CombinedModel(on, tasks_of(on)), images(3)
    expected = plain_bits(on)

    def serve(given: Tensor) -> Tensor:
        return model(given * 1.0)["child"] + 0.0

    layer, ones = nn.Linear(4, 4), torch.ones(1, 4)
    assert not torch.equal(torch.compile(layer, backend=nudging)(ones), layer(ones))
    compiled = torch.compile(model, backend=nudging)
    assert same_bits(compiled(pixels), expected)
    within = torch.compile(serve, backend=nudging)(pixels)
    assert (within - serve(pixels)).abs().max() <= 2**-16 * serve(
        pixels
    ).abs().max()  # from the caller's own operations
    tasks = tasks_of(on)
    child = torch.compile(lambda: CombinedModel(on, tasks)(pixels)["child"], backend=nudging)()
    assert bits(child) == expected["child"]
    uses: list[Callable[[], Tensor]] = [
        lambda: attention_map(on, tasks[0], pixels), lambda: on.backbone_logits(pixels), lambda: on.class_token,
        lambda: golden(on, tasks[0]).logits,
    ]  # fmt: skip
    for use in uses:
        assert torch.equal(torch.compile(use, backend=nudging)(), use())


def test_compiling_in_another_thread_changes_no_bit() -> None:
    on = backbone()
    model, pixels = CombinedModel(on, tasks_of(on)), images(3)
    started, finish = threading.Event(), threading.Event()

    def waiting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        started.set()
        assert finish.wait(60)
        return graph.forward

    other = threading.Thread(target=torch.compile(lambda given: 2 * given, backend=waiting), args=(torch.ones(3),))
    other.start()
    assert started.wait(60)
    try:
        assert torch.compiler.is_compiling()
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(model(pixels), plain_bits(on))
        assert bits(model(pixels[:1])["child"]) == plain_bits(on)["child"][:1]
    finally:
        finish.set()
        other.join()


def test_an_operation_that_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on = backbone()
    model = CombinedModel(on, tasks_of(on))
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kw: original(*args, **kw) * (1 + 2**-20)
    )
    with pytest.raises(ExactnessError, match="basic torch operations now give different bits"):
        model(images(1))


@pytest.mark.parametrize("name", ["class_token", "memory", "head_weight", "head_bias", "pooled_weight", "adapters"])
def test_a_task_that_was_written_to_is_refused(name: str) -> None:
    on = backbone()
    task = random_task(on, "task", classes=16, rank=2)
    sha256, pixels = task.sha256, images(2)
    model = CombinedModel(on, [task, random_task(on, "other", seed=5)])
    expected = bits(model(pixels)["task"])
    tensor = task.adapters["fc1"].up if name == "adapters" else getattr(task, name)
    tensor.data.add_(1)
    assert task.sha256 == sha256
    assert bits(model(pixels)["task"]) == expected
    with pytest.raises(IntegrityError, match="The tensors of task 'task' were modified in memory"):
        CombinedModel(on, [task])
    with pytest.raises(IntegrityError, match="were modified in memory"):
        CombinedModel(on, [random_task(on, "child", parents=(task,))])


def test_a_registered_task_that_was_written_to_is_refused(registered: Callable[..., Task], registry: Registry) -> None:
    ref = registered("task", classes=4).ref
    task = registry.get(ref)
    task.head_bias[0] += 1  # before its sha256 was first computed
    with pytest.raises(IntegrityError, match="The tensors of task 'task:1' were modified in memory"):
        registry.register(task, registry.goldens(ref)[0])
    assert registry.get(ref).sha256 == registry.record(ref).sha256


def test_a_users_own_model_can_be_a_backbone() -> None:
    with torch.inference_mode():
        model = lively_vit()
    on = FrozenBackbone(model, "own", "hub")
    combined = CombinedModel(on, [random_task(on, "task")])
    assert combined(images(1))["task"].isfinite().all()
    with torch.inference_mode():
        on.model.blocks[1].mlp.fc1.weight.mul_(1.1)
    with pytest.raises(IntegrityError, match="have changed since they were loaded"):
        combined(images(1))
