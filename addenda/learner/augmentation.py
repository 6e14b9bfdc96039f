"""Random views of an image, each a function of its content and the view's number; the settings are named as in timm."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from addenda.backbones import plain

DEFAULT_VIEWS = 3

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Augmentation:
    """Augmentation of the training images.

    Attributes:
        views: number of random views of each image that are cached beside the unaugmented one; each epoch draws one of
            them all for each image. 0 disables augmentation. None means DEFAULT_VIEWS, or 0 for tensors, which cannot
            be augmented.
        fresh: draw a new view in each epoch instead; this costs a forward pass over all images in every epoch.
        scale: minimum and maximum area of a random crop, as a share of the image's.
        ratio: minimum and maximum aspect ratio of a random crop.
        hflip: probability of a horizontal flip.
        color_jitter: brightness, contrast and saturation are each scaled by a random factor in 1 ± this.
    """

    views: Annotated[int, Field(ge=0, le=64)] | None = None
    fresh: bool = False
    scale: tuple[Share, Share] = (0.5, 1.0)
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def num_views(self) -> int:
        """Number of random views that are cached of each image."""
        return self.views or 0

    def resolved(self, variable: bool) -> Augmentation:
        """Replaces `views=None` by a number, given whether the images can be augmented."""
        if self.views is not None:
            return self
        return replace(self, views=DEFAULT_VIEWS if variable and not self.fresh else 0)

    def transforms(
        self, digest: str, numbers: Sequence[int], preprocessing: Mapping[str, Any]
    ) -> list[Callable[[Image.Image], Tensor] | None]:
        """Returns the transform of each numbered view of the image with this digest; None is the unaugmented image."""
        make = partial(augment, how=self, preprocessing=preprocessing)
        return [partial(make, seed=view_seed(digest, number)) if number else None for number in numbers]


def view_seed(digest: str, number: int) -> int:
    """Returns the seed of one view from the image's digest and the view's number, which counts from 1."""
    return int(hashlib.sha256(f"{digest} {number}".encode()).hexdigest()[:16], 16)


def augment(
    image: Image.Image, how: Augmentation, seed: int, preprocessing: Mapping[str, Any]
) -> Float[Tensor, "3 H W"]:
    """Returns one random view of an RGB image, normalised for the backbone.

    Source: the crop of Szegedy et al. 2015 (Inception), drawn as in timm and torchvision.
    """
    random = np.random.default_rng(seed)
    top, left, height, width = _crop(image, how, random)
    mode = InterpolationMode(preprocessing["interpolation"])
    size = list(preprocessing["input_size"][1:])
    view = transforms.resized_crop(image, top, left, height, width, size, mode)
    if random.random() < how.hflip:
        view = transforms.horizontal_flip(view)
    if how.color_jitter:
        brightness, contrast, saturation = random.uniform(1 - how.color_jitter, 1 + how.color_jitter, 3)
        view = transforms.adjust_brightness(view, brightness)
        view = transforms.adjust_contrast(view, contrast)
        view = transforms.adjust_saturation(view, saturation)
    with plain(torch.device("cpu")):
        pixels: Tensor = transforms.pil_to_tensor(view).float() / 255
        normalised: Tensor = transforms.normalize(pixels, preprocessing["mean"], preprocessing["std"])
    return normalised


def _crop(image: Image.Image, augmentation: Augmentation, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws top, left, height and width of a random crop.

    If ten draws do not fit into the image, it is the largest central crop with an aspect ratio within the bounds.
    """
    for _ in range(10):
        area = image.width * image.height * random.uniform(*augmentation.scale)
        ratio = math.exp(random.uniform(math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            top, left = random.integers(image.height - height + 1), random.integers(image.width - width + 1)
            return int(top), int(left), height, width
    narrowest, widest = augmentation.ratio
    width = min(image.width, round(image.height * widest))
    height = min(image.height, round(image.width / narrowest))
    return (image.height - height) // 2, (image.width - width) // 2, height, width
