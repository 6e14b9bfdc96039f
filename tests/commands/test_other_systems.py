"""What Linux on x86-64 has and macOS, ARM and Apple's GPUs lack is not needed; each test removes it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from addenda.backbones import load_backbone
from addenda.combined import Router, feature_statistics
from addenda.exceptions import BackboneError
from addenda.learner.activations import Activations
from addenda.learner.objectives import OBJECTIVES
from tests.support.commands import Run

NUMERICS = importlib.import_module("addenda.combined.numerics")


class OnAppleGpu(Tensor):
    """A tensor that refuses float64, as one on the device `mps` does; a copy on the CPU does not."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "double":
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(Tensor) if func.__name__ == "cpu" else result


def on_apple_gpu(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).as_subclass(OnAppleGpu)


def test_what_a_device_without_float64_computed_is_converted_on_the_cpu() -> None:
    with pytest.raises(TypeError, match="MPS"):
        on_apple_gpu(3).double()
    pooled, layers, targets = on_apple_gpu(40, 4), on_apple_gpu(40, 8), torch.arange(40) % 2
    statistics = feature_statistics(pooled, targets, 2, layers)
    assert statistics.layer_sums is not None
    router = Router({"one": statistics, "two": feature_statistics(pooled + 3, targets, 2, layers + 3)})
    features = torch.cat([pooled, layers], dim=1)
    assert len(router.choose(features)) == 40
    logits = {name: on_apple_gpu(40, 2) for name in ("one", "two")}
    assert router.routed(logits, features)["one"].dtype == torch.float64
    assert OBJECTIVES["single-label"].fit_temperature(logits["one"], targets) > 0


@pytest.mark.slow
def test_a_run_needs_nothing_that_only_linux_has(
    run: Run, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("os.posix_fallocate", "os.sched_getaffinity", "os.sched_setaffinity", "os.memfd_create"):
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setattr("addenda.files.fcntl", None)
    monkeypatch.setattr("sys.platform", "darwin")
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: not str(self).startswith("/proc/") and is_file(self))
    NUMERICS._cpu.cache_clear()
    try:
        learned = run("learn", "twos", digits_folder, "--backbone", "glyphs", "--epochs", "1", "--lr", "0.3")
        assert learned.code == 0, learned.err
        verified = run("verify")
        assert (verified.code, "identical" in verified.out) == (0, True)
    finally:
        NUMERICS._cpu.cache_clear()


def test_apples_gpu_is_named_in_the_numerics_and_refused_where_there_is_none() -> None:
    assert NUMERICS._device(torch.device("mps")).startswith("mps of ")
    with pytest.raises(BackboneError, match=r"Device 'mps' cannot be used: .*Use auto, cpu, cuda:N or mps\."):
        load_backbone("glyphs", device="mps")


def test_cached_keys_and_values_stay_in_the_memory_that_an_apple_gpu_shares() -> None:
    activations = SimpleNamespace(
        _frozen=SimpleNamespace(store=SimpleNamespace(key_values=torch.ones(2))),
        backbone=SimpleNamespace(device=torch.device("mps")),
    )
    assert Activations._to_device(activations) is None
