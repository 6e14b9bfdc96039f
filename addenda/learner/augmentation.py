"""Random views of an image: each a function of its content and the view's number, in timm's terms."""

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
    """How the training images are varied.

    Attributes:
        views: random views of each image, kept beside the plain one and drawn from in every epoch; 0 takes images as
            they are. None means DEFAULT_VIEWS; of ready tensors, which cannot be varied, none.
        fresh: a new view for each epoch instead, computed anew every time: as many passes over the images as epochs.
        scale: smallest and largest share of the area that a random crop keeps.
        ratio: smallest and largest aspect ratio of it.
        hflip: probability of a mirror image.
        color_jitter: brightness, contrast and saturation each by a factor of 1 ± this.
    """

    views: Annotated[int, Field(ge=0, le=64)] | None = None
    fresh: bool = False
    scale: tuple[Share, Share] = (0.5, 1.0)
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def num_views(self) -> int:
        """Random views that are kept of each image."""
        return self.views or 0

    def resolved(self, variable: bool) -> Augmentation:
        """With the number of views settled, for images that can be varied or that cannot."""
        if self.views is not None:
            return self
        return replace(self, views=DEFAULT_VIEWS if variable and not self.fresh else 0)

    def transforms(
        self, digest: str, numbers: Sequence[int], preprocessing: Mapping[str, Any]
    ) -> list[Callable[[Image.Image], Tensor] | None]:
        """What makes some views, by their numbers, of the image that has this digest; None takes it as it is."""
        make = partial(augment, how=self, preprocessing=preprocessing)
        return [partial(make, seed=view_seed(digest, number)) if number else None for number in numbers]


def view_seed(digest: str, number: int) -> int:
    """The seed of one view of an image, by its content and the view's number, from 1."""
    return int(hashlib.sha256(f"{digest} {number}".encode()).hexdigest()[:16], 16)


def augment(
    image: Image.Image, how: Augmentation, seed: int, preprocessing: Mapping[str, Any]
) -> Float[Tensor, "3 H W"]:
    """One random view of an RGB image, normalised as the backbone's preprocessing says.

    Source: the crop of Szegedy et al. 2015 (Inception), as timm and torchvision draw it.
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


def _crop(image: Image.Image, how: Augmentation, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop; the whole image where ten draws do not fit."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(*how.scale)
        ratio = math.exp(random.uniform(math.log(how.ratio[0]), math.log(how.ratio[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            top, left = random.integers(image.height - height + 1), random.integers(image.width - width + 1)
            return int(top), int(left), height, width
    return 0, 0, image.height, image.width
