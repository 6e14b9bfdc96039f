"""Settings that ordinary scripts change: bits stay the same, or the call is refused.

Two rules hold for every setting. Equal numerics fingerprints give equal bits. A model that is called under other
settings than it was made under gives its original bits or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from addenda import CombinedModel, FrozenBackbone, LearnConfig, Learner, Registry, load_backbone
from addenda.combined import attention_map, golden, numerics, numerics_fingerprint, verify
from addenda.exceptions import ExactnessError
from addenda.learner import ActivationCache, Augmentation
from tests.support.images import colour_folder
from tests.support.models import backbone, bits, family, images
from tests.support.ordinary import PLAIN_AND_ROTARY, changed, plain_bits, same_bits, tasks_of
from tests.support.tasks import random_task


def dtype(value: torch.dtype) -> Callable[[], AbstractContextManager[None]]:
    return lambda: changed(torch.get_default_dtype, torch.set_default_dtype, value)


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


@PLAIN_AND_ROTARY
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
@PLAIN_AND_ROTARY
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


@PLAIN_AND_ROTARY
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


@PLAIN_AND_ROTARY
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


@PLAIN_AND_ROTARY
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
