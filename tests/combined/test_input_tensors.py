"""Input tensors as ordinary scripts have them: any stride, subclass and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from addenda import CombinedModel
from addenda.combined.forward import _batches
from tests.support.models import backbone, bits, images
from tests.support.ordinary import PLAIN_AND_ROTARY, tasks_of


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


@PLAIN_AND_ROTARY
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
