"""Features of timm models without blocks for task tokens: the pooled feature, and statistics of each stage's map."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from addenda.backbones.arithmetic import layer_statistics, plain
from addenda.exceptions import BackboneError

LAYER_SETTINGS = (
    "eps", "stride", "padding", "dilation", "groups", "num_heads", "window_size", "shift_size", "pool_type",
)  # fmt: skip
"""Settings of a model's layers that change features and are in no checkpoint."""
MAX_DIFFERENCE = 0.05
"""Largest difference, relative to the largest feature, between two runs of an image; rounding stays far below it."""


class StageFeatures:
    """Computes the features of any timm model with `forward_intermediates`, which has no keys and values to attend to.

    A stage's map is normalised at each position over its channels, without affine; its layer features are the mean and
    the standard deviation over positions. The last stage is left out, because the pooled feature is made of it.
    """

    def __init__(self, model: Any, input_size: list[int]) -> None:
        self._model, self._shape = model, (1, *input_size)
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        with plain(self._device):
            pooled, layers = self(self._zeros())
        if not isinstance(pooled, Tensor) or pooled.ndim != 2:
            raise BackboneError("it does not pool an image into one feature")
        self.pooled_width, self.num_layer_features = pooled.shape[1], layers.shape[1]

    def __call__(
        self, images: Float[Tensor, "B 3 H W"], layers: bool = True
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B n"]]:
        """The pooled feature as timm computes it, of any shape, and the layer features; without `layers` n is 0."""
        final, maps = self._model.forward_intermediates(images)
        pooled: Tensor = self._model.forward_head(final, pre_logits=True)
        statistics = [_map_statistics(stage) for stage in maps[:-1]] if layers else []
        empty = torch.zeros(images.shape[0], 0, dtype=torch.float32, device=images.device)
        return pooled, torch.cat(statistics or [empty], dim=1)

    def operations(self) -> int:
        """Multiply-adds of one image's forward pass: convolutions and matrix products."""
        return counted_operations(lambda images: self(images, layers=False), self._zeros())

    def instability(self) -> str | None:
        """Returns how an image's features vary between runs, or None if they are its own."""
        random = torch.Generator().manual_seed(0)
        shape = (2, *self._shape[1:])
        pair = torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(self._device, self._dtype)
        with plain(self._device):
            first, again, swapped = (torch.cat(self(images), dim=1).float() for images in (pair, pair, pair.flip(0)))
        bound = MAX_DIFFERENCE * first.abs().max()
        if (first - again).abs().max() > bound:
            return "its features are random: two runs of the same images differ"
        if (first - swapped.flip(0)).abs().max() > bound:
            return "its features of an image depend on the other images in the batch"
        return None

    def _zeros(self) -> Tensor:
        return torch.zeros(self._shape, dtype=self._dtype, device=self._device)


def counted_operations(run: Callable[[Tensor], object], images: Tensor) -> int:
    """Multiply-adds of a computation, as torch counts them."""
    with plain(images.device), FlopCounterMode(display=False) as counter:
        run(images)
    return int(counter.get_total_flops()) // 2


def _map_statistics(stage: Float[Tensor, "B C h w"]) -> Float[Tensor, "B n"]:
    positions = stage.flatten(2).transpose(1, 2)
    positions = positions.to(torch.promote_types(stage.dtype, torch.float32)).contiguous()
    normed = F.layer_norm(positions, positions.shape[2:], eps=1e-6)
    return layer_statistics(normed, normed.shape[1], class_token=False)


def stage_obstacle(model: Any, input_size: list[int]) -> str | None:
    """Returns why the features of a model's stages cannot be used, or None if they can; also on the meta device."""
    if input_size[0] != 3:
        return f"it takes {input_size[0]} input channels, not 3"
    if not hasattr(model, "forward_intermediates"):
        return f"timm's {type(model).__name__} has no forward_intermediates"
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return "its batch norm has no running statistics, so that an image's features depend on the batch"
    try:
        StageFeatures(model.eval(), input_size)
    except BackboneError as error:
        return str(error)
    except Exception as error:  # a model's own code may raise anything
        first_line = next(iter(str(error).splitlines()), "").rstrip(".")
        return f"its features cannot be computed without gradients in eval mode: {type(error).__name__}, {first_line}"
    return None


def stage_structure(model: Any) -> dict[str, Any]:
    """Settings of a model besides its weights on which its features depend, for the fingerprint."""
    return {
        "class": type(model).__name__,
        "architecture": getattr(model, "pretrained_cfg", {}).get("architecture"),
        "layers": layer_settings(model),
        **_unlike_stock(model),
    }


def _unlike_stock(model: Any) -> dict[str, Any]:
    """The pooling and the activations of timm's own that differ from its architecture's; no checkpoint has them."""
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
    if not timm.is_model(architecture or ""):
        return {}
    own, stock = _choices(model), _stock_choices(architecture)
    return {"unlike timm's": changed} if (changed := {k: v for k, v in own.items() if stock.get(k, v) != v}) else {}


@cache
def _stock_choices(architecture: str) -> dict[str, str]:
    return _choices(timm.create_model(architecture, device="meta"))


def _choices(model: Any) -> dict[str, str]:
    activations = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__module__.startswith("timm.layers.activations")
    }
    return activations | {"global_pool": str(getattr(model, "global_pool", None))}


def layer_settings(model: nn.Module) -> dict[str, list[Any]]:
    """Settings of a model's layers that are in no checkpoint, by the layers' names."""
    layers = {name: _settings(module) for name, module in model.named_modules()}
    return {name: settings for name, settings in layers.items() if settings}


def _settings(module: nn.Module) -> list[Any]:
    """A layer's class, if it is one of torch's, and its settings."""
    is_torchs = type(module).__module__.startswith("torch.nn")
    values = [[name, str(getattr(module, name))] for name in LAYER_SETTINGS if name in vars(module)]
    return [type(module).__name__, *values] if is_torchs else values
