"""Exactness in ordinary scripts: whatever the caller has set, bits stay the same or the call is refused.

Two rules hold for every setting. Equal numerics fingerprints give equal bits. A model that is called under other
settings than it was made under gives its original bits or refuses.
"""

from __future__ import annotations

import ast
import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import tv_tensors

import addenda
from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry, load_backbone
from addenda.combined import attention_map, golden, numerics, numerics_fingerprint, verify
from addenda.combined.forward import _batches
from addenda.exceptions import BackboneError, ExactnessError, IntegrityError
from addenda.learner import ActivationCache, Augmentation
from addenda.registry import Task
from tests.support.images import colour_folder
from tests.support.models import backbone, bits, family, fresh_backbone, head_only, images, lively_vit
from tests.support.tasks import random_task

VARIANTS = pytest.mark.parametrize("variant", ["plain", "dinov3"])


# --- input tensors ----------------------------------------------------------------------------------------------------


class Subclass(Tensor):
    """A tensor subclass, as libraries define them."""


def misaligned(pixels: Tensor) -> Tensor:
    buffer = torch.zeros(pixels.numel() + 1)
    buffer[1:] = pixels.flatten()
    return buffer[1:].view(pixels.shape)


def window(pixels: Tensor) -> Tensor:
    larger = torch.full((len(pixels) + 2, 5, 40, 37), torch.nan)
    larger[1:-1, 1:4, 3:35, 2:34] = pixels
    return larger[1:-1, 1:4, 3:35, 2:34]


def every_other(pixels: Tensor) -> Tensor:
    return torch.stack([pixels, pixels + 1], 1).flatten(0, 1)[::2]


def fortran(pixels: Tensor) -> Tensor:
    return pixels.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def mapped(pixels: Tensor) -> Tensor:
    return pixels.clone().share_memory_()


def as_inference(pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return pixels.clone()


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda p: p.contiguous(memory_format=torch.channels_last),
    "height first": lambda p: p.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "width first": lambda p: p.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "fortran": fortran,
    "window": window,
    "misaligned": misaligned,
    "every other": every_other,
    "flipped twice": lambda p: p.flip(3).flip(3),
    "float64": Tensor.double,
    "requires grad": lambda p: p.clone().requires_grad_(),
    "of a graph": lambda p: p.clone().requires_grad_() * 1.0,
    "parameter": lambda p: nn.Parameter(p.clone()),
    "subclass": lambda p: p.clone().as_subclass(Subclass),
    "torchvision's": tv_tensors.Image,
    "inference": as_inference,
    "shared memory": mapped,
    "numpy": lambda p: torch.from_numpy(p.numpy().copy()),
}


@VARIANTS
@pytest.mark.parametrize("kind", INPUTS)
def test_bits_do_not_depend_on_the_kind_of_tensor(variant: str, kind: str) -> None:
    on = backbone(variant)
    model = CombinedModel(on, tasks_of(on))
    pixels = images(5)
    converted = INPUTS[kind](pixels)
    assert converted.shape == pixels.shape
    expected, outputs = model(pixels), model(converted)
    assert all(bits(outputs[name]) == bits(logits) for name, logits in expected.items())
    assert all(type(logits) is Tensor and not logits.requires_grad for logits in outputs.values())
    assert bits(model.backbone_logits(converted)) == bits(model.backbone_logits(pixels))


@pytest.mark.parametrize("kind", INPUTS)
def test_images_are_copied_into_one_memory_layout(kind: str) -> None:
    """Strides changed no bits on the machines tried, but they may select another convolution elsewhere."""
    model = CombinedModel(backbone(), [])
    for count in (3, model.micro_batch):
        ((batch, _),) = _batches(model.backbone, INPUTS[kind](images(count)), (model.micro_batch,))
        assert type(batch) is Tensor
        assert batch.stride() == torch.empty(batch.shape).stride()
        assert batch.data_ptr() % 64 == 0


def test_one_image_expanded_to_a_batch_has_the_same_bits_at_every_position() -> None:
    on = backbone()
    model, image = CombinedModel(on, tasks_of(on)), images(1)
    for name, logits in model(image.expand(11, -1, -1, -1)).items():
        assert bits(logits) == bits(model(image)[name]) * 11


# --- settings ---------------------------------------------------------------------------------------------------------


@contextmanager
def changed(read: Callable[[], object], write: Callable[[object], object], value: object) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def dtype(value: torch.dtype) -> Callable[[], AbstractContextManager[None]]:
    return lambda: changed(torch.get_default_dtype, torch.set_default_dtype, value)


def attribute(owner: object, name: str, value: object) -> Callable[[], AbstractContextManager[None]]:
    return lambda: changed(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def conv_precision() -> Iterator[None]:
    conv = getattr(torch.backends.mkldnn, "conv", None)
    if conv is None:
        pytest.skip("this torch has no such setting")
    with changed(lambda: conv.fp32_precision, lambda new: setattr(conv, "fp32_precision", new), "bf16"):
        yield


cuda = torch.backends.cuda
SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "nothing": nullcontext,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default bfloat16": dtype(torch.bfloat16),
    "default float16": dtype(torch.float16),
    "default float64": dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "deterministic": deterministic,
    "denormals": denormals,
    "math attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "no flash": lambda: changed(cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
    "no mem-efficient": lambda: changed(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
    "no mkldnn": lambda: changed(lambda: torch.backends.mkldnn.enabled, torch._C._set_mkldnn_enabled, False),
    "medium": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "convolution in bfloat16": conv_precision,
    "threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 2),
}
REFUSED = {
    "default bfloat16": "default_dtype was the default, now torch.bfloat16",
    "default float16": "default_dtype was the default, now torch.float16",
    "default float64": "default_dtype was the default, now torch.float64",
    "denormals": "flush_denormal was the default, now True",
    "math attention": "flash_sdp was the default, now False, mem_efficient_sdp was the default, now False",
    "no flash": "flash_sdp was the default, now False",
    "no mem-efficient": "mem_efficient_sdp was the default, now False",
    "no mkldnn": "mkldnn was True, now False",
    "medium": "float32_matmul_precision was highest, now medium",
    "convolution in bfloat16": "conv_fp32_precision was the default, now bf16",
    "threads": "threads was 1, now 2",
}
"""What a live model reports when a setting has changed; under the other settings it keeps its bits."""
LOWERED = {"medium", "convolution in bfloat16"}
"""Settings that reduce the precision of float32, under which no exact model is made."""
ALL = pytest.mark.parametrize("setting", SETTINGS)
MAKING = pytest.mark.parametrize("setting", [name for name in SETTINGS if name not in LOWERED])


def tasks_of(on: FrozenBackbone) -> list[Task]:
    """One task of each kind: alone, with memory, extending, adapted, head-only."""
    known = family(on)
    return [known[name] for name in ("five", "child", "adapted", "sees-two", "none", "nine", "head-only")]


def plain_bits(on: FrozenBackbone) -> dict[str, list[bytes]]:
    return {name: bits(logits) for name, logits in CombinedModel(on, tasks_of(on))(images(3)).items()}


def same_bits(outputs: dict[str, Tensor], expected: dict[str, list[bytes]]) -> bool:
    assert outputs
    return all(bits(logits) == expected[name] for name, logits in outputs.items())


@VARIANTS
@ALL
def test_a_live_model_keeps_its_bits_or_refuses(variant: str, setting: str) -> None:
    on = backbone(variant)
    expected, model, pixels = plain_bits(on), CombinedModel(on, tasks_of(on)), images(3)
    with SETTINGS[setting]():
        if setting in REFUSED:
            with pytest.raises(ExactnessError, match=f"since this model was made: {REFUSED[setting]}"):
                model(pixels)
        else:
            assert same_bits(model(pixels), expected)
            assert same_bits(model(pixels, ["child", "adapted"]), expected)  # a subset requested for the first time
    assert same_bits(model(pixels), expected)
    assert same_bits(model(pixels, ["child", "adapted"]), expected)


@pytest.mark.slow
@VARIANTS
@MAKING
def test_a_model_made_under_a_setting_has_the_bits_of_its_numerics(variant: str, setting: str) -> None:
    on, pixels = backbone(variant), images(3)
    expected, before = plain_bits(on), numerics_fingerprint(numerics(on))
    with SETTINGS[setting]():
        model = CombinedModel(on, tasks_of(on))
        logits, now = model(pixels), numerics_fingerprint(numerics(on))
        assert (now == before) == (setting not in REFUSED)
        if now == before or setting.startswith("default"):
            assert same_bits(logits, expected)
        grown = CombinedModel(on, tasks_of(on)[:2]).with_tasks(tasks_of(on))(pixels)
        assert same_bits(grown, {name: bits(values) for name, values in logits.items()})
    if setting in REFUSED:
        with pytest.raises(ExactnessError, match="since this model was made"):
            model(pixels)
        model = model.with_tasks(tasks_of(on))
    assert same_bits(model(pixels), expected)


@VARIANTS
@MAKING
def test_a_task_joins_under_a_setting(variant: str, setting: str) -> None:
    on, pixels = backbone(variant), images(3)
    expected, model = plain_bits(on), CombinedModel(on, tasks_of(on)[:3])
    with SETTINGS[setting]():
        grown = model.with_tasks(tasks_of(on))
    if setting in REFUSED:
        with pytest.raises(ExactnessError, match="since this model was made"):
            grown(pixels)
        grown = model.with_tasks(tasks_of(on))
    assert same_bits(grown(pixels), expected)


@VARIANTS
@MAKING
def test_golden_probes_made_under_a_setting_verify(variant: str, setting: str) -> None:
    on = backbone(variant)
    task = family(on)["sees-two"]
    reference = golden(on, task)
    with SETTINGS[setting]():
        probe = golden(on, task)
        (inside,) = verify(on, [(task, [probe])])
    assert (probe.numerics_fingerprint == reference.numerics_fingerprint) == (setting not in REFUSED)
    if setting not in REFUSED or setting.startswith("default"):
        assert probe.digest == reference.digest
    (outside,) = verify(on, [(task, [probe])])
    assert inside.ok
    assert inside.identical
    assert outside.ok
    assert outside.same_numerics == (setting not in REFUSED)


@VARIANTS
@pytest.mark.parametrize("setting", sorted(LOWERED))
def test_no_exact_model_is_made_with_reduced_precision(variant: str, setting: str) -> None:
    on = backbone(variant)
    model = CombinedModel(on, tasks_of(on)[:3])
    with SETTINGS[setting]():
        for make in (lambda: CombinedModel(on, tasks_of(on)), lambda: model.with_tasks(tasks_of(on))):
            with pytest.raises(ExactnessError, match="settings allow float32 to be computed in lower precision"):
                make()
        with pytest.raises(ExactnessError, match="in lower precision"):
            golden(on, family(on)["five"])
        assert CombinedModel(on, tasks_of(on), exact=False)(images(2))


@MAKING
def test_attention_maps_are_the_same_under_a_setting(setting: str) -> None:
    on = backbone()
    task, pixels = family(on)["child"], images(2)
    expected = attention_map(on, task, pixels)
    with SETTINGS[setting]():
        maps = attention_map(on, task, pixels)
    tolerance = 1e-5 if setting in REFUSED and not setting.startswith("default") else 0.0
    assert (maps - expected).abs().max() <= tolerance


LOADED = ["autocast bfloat16", "default bfloat16", "default float64", "default device", "inference"]


@pytest.mark.parametrize("setting", LOADED)
def test_a_backbone_loaded_under_a_setting_is_the_same(setting: str) -> None:
    picture = Image.effect_noise((50, 41), 90).convert("RGB")
    expected = load_backbone("glyphs", device="cpu")
    with SETTINGS[setting]():
        loaded = load_backbone("glyphs", device="cpu")
        pixels = loaded.transform(picture)
        assert torch.get_default_dtype() is {"default bfloat16": torch.bfloat16, "default float64": torch.float64}.get(
            setting, torch.float32
        )
    assert loaded.fingerprint == expected.fingerprint
    assert pixels.dtype is torch.float32
    assert torch.equal(pixels, expected.transform(picture))
    task = random_task(expected, "task")
    batch = pixels[None]
    assert bits(CombinedModel(loaded, [task])(batch)["task"]) == bits(CombinedModel(expected, [task])(batch)["task"])


LEARNED = [
    "nothing", "autocast bfloat16", "autocast float16", "default bfloat16", "default float64", "default device",
    "no grad", "inference", "anomaly", "deterministic",
]  # fmt: skip


@pytest.fixture(scope="module")
def learned_plainly(tmp_path_factory: pytest.TempPathFactory, tiny: FrozenBackbone) -> tuple[str, str, str]:
    return learned(tiny, tmp_path_factory.mktemp("plainly"))


def learned(on: FrozenBackbone, folder: Path) -> tuple[str, str, str]:
    """Digests of a learned task's artifact, of its golden probe, and of its logits for a test dataset."""
    colours = colour_folder(folder / "colours", per_class=6)
    config = LearnConfig(epochs=2, batch_size=5, fall_back=False, adapter_rank=2, augmentation=Augmentation(views=1))
    with Registry.open(folder / "tasks.db") as registry:
        learner = Learner(on, registry, ActivationCache(folder / "cache"))
        task = learner.learn("colours", colours, config=config)
        (probe,) = registry.goldens(task.ref)
        return task.sha256, probe.digest, learner.evaluate("colours", colours).logits_digest


@pytest.mark.slow
@pytest.mark.parametrize("setting", LEARNED)
def test_a_task_learned_and_evaluated_under_a_setting_is_the_same(
    setting: str, tiny: FrozenBackbone, learned_plainly: tuple[str, str, str], tmp_path: Path
) -> None:
    with SETTINGS[setting]():
        result = learned(tiny, tmp_path)
    assert result == learned_plainly


# --- changes of a live model's backbone and tasks ---------------------------------------------------------------------


@VARIANTS
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


# --- threads and processes --------------------------------------------------------------------------------------------


def test_several_models_in_several_threads_keep_their_bits() -> None:
    on = backbone("dinov2")
    all_tasks = list(family(on).values())
    pixels = images(5)
    expected = {name: bits(logits) for name, logits in CombinedModel(on, all_tasks)(pixels).items()}
    start = threading.Barrier(6)

    def work(number: int) -> None:
        start.wait()
        with torch.autocast("cpu", torch.bfloat16) if number % 2 else torch.inference_mode():
            for turn in range(3):
                chosen = all_tasks[number % 3 :: 2] if turn else all_tasks
                model = CombinedModel(on, chosen) if turn < 2 else CombinedModel(on, chosen[:1]).with_tasks(chosen)
                assert same_bits(model(pixels), expected)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [None] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_keeps_the_bits() -> None:
    on = backbone()
    model, pixels = CombinedModel(on, tasks_of(on)), images(3)
    expected = plain_bits(on)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            outputs = {name: bits(logits) for name, logits in model(pixels).items()}
            os.write(writer, pickle.dumps(outputs))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pickle.loads(pipe.read()) == expected
    os.waitpid(child, 0)


# --- tensors that the package makes -----------------------------------------------------------------------------------

FACTORIES = {
    "zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "logspace", "eye",
    "tensor", "scalar_tensor", "empty_strided", "triu_indices", "tril_indices", "normal",
}  # fmt: skip


def test_every_tensor_that_the_package_makes_names_its_dtype_and_device() -> None:
    """The caller may change torch's defaults."""
    package = Path(addenda.__file__).parent
    missing_names, num_calls = [], 0
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if getattr(node.func.value, "id", "") == "torch" and node.func.attr in FACTORIES:
                num_calls += 1
                missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
                missing_names += [f"{path.relative_to(package)}:{node.lineno}: {name}" for name in sorted(missing)]
    assert num_calls > 50
    assert missing_names == []


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
