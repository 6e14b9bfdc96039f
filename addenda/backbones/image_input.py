"""The input of a backbone: how images become its pixels. It needs no weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.functional import normalize

from addenda.backbones.arithmetic import plain
from addenda.backbones.images import prepared
from addenda.exceptions import BackboneError


class ImageInput:
    """Preprocessing of a backbone's images.

    Attributes:
        name: the backbone's timm name.
        preprocessing: timm's data configuration: input_size, interpolation, mean, std, crop_pct, crop_mode.
    """

    def __init__(self, name: str, preprocessing: dict[str, Any]) -> None:
        self.name, self.preprocessing = name, preprocessing
        # Normalisation is ours: timm's would use torch's default dtype.
        settings: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in preprocessing.items()}
        self._resize_and_crop: Any = create_transform(**settings, is_training=False, normalize=False)
        with plain(torch.device("cpu")):
            scale = torch.arange(256, dtype=torch.float32, device="cpu").repeat(3, 1, 1) / 255
            # The normalised value of each 8-bit one, by channel: to look it up takes a third less than to compute it.
            self._values = normalize(scale, preprocessing["mean"], preprocessing["std"])[:, 0].numpy()

    def transform(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        """Converts an image of any mode and size to the model's input: `prepared`, resized, cropped, normalised.

        Raises:
            DataError: the scale of the pixel values is unknown.
        """
        with plain(torch.device("cpu")):
            pixels = self._resize_and_crop(prepared(image)).numpy()
        return torch.from_numpy(np.stack([of.take(channel) for of, channel in zip(self._values, pixels, strict=True)]))

    def check_images(self, images: Tensor) -> None:
        """Raises BackboneError unless images are Float[B, 3, H, W] of the model's input size."""
        expected = tuple(self.preprocessing["input_size"])
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise BackboneError(
                f"Images must have the shape [B, {', '.join(map(str, expected))}] of backbone {self.name!r}; "
                f"got {list(images.shape)}. Use `backbone.transform`."
            )
        if not images.is_floating_point():
            raise BackboneError(
                f"Images must be floating point and normalised; got {images.dtype}. Use `backbone.transform`."
            )
