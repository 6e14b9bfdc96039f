"""One labelled image as it was had: read once, and asked for its digest and its views."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from addenda.backbones import FrozenBackbone, prepared, read_image
from addenda.exceptions import DataError


@dataclass(frozen=True)
class EncodedImage:
    """An image file's bytes that lie in no file of their own.

    Attributes:
        name: what it is called in messages.
        content: as they would stand in a file.
    """

    name: str
    content: bytes


@dataclass(frozen=True)
class Item:
    """One image as it was had, once.

    Attributes:
        called: what it is called in messages.
        held: a file's content, a PIL image that is `prepared`, or whatever else a dataset gave.
        named: what its file is called where it is no image.
    """

    called: str
    held: Any
    named: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 over a file's bytes, or over a dataset's image."""
        content = self.held
        if isinstance(content, Tensor):
            pixels = content.detach().cpu().contiguous()
            content = pixels.reshape(-1).view(torch.uint8).numpy().tobytes()
            if pixels.dtype != torch.float32:  # equal bytes of another dtype are other values
                content = str(pixels.dtype).encode() + content
        elif isinstance(content, Image.Image):
            content = f"{content.mode}{content.size}".encode() + content.tobytes()
        elif not isinstance(content, bytes):
            content = repr(type(content)).encode()
        return hashlib.sha256(content).hexdigest()

    def picture(self) -> Any:
        """A PIL image in most cases, or what a dataset gives.

        Raises:
            DataError: a file is not a readable image.
        """
        return read_image(io.BytesIO(self.held), self.named) if isinstance(self.held, bytes) else self.held

    def views(
        self, backbone: FrozenBackbone, transforms: Sequence[Callable[[Image.Image], Tensor] | None] = (None,)
    ) -> list[Float[Tensor, "3 H W"]]:
        """The image as the backbone takes it, once for each transform; it is decoded once.

        Args:
            backbone: says how it is transformed, and which shape a tensor must have.
            transforms: None is the backbone's own.

        Raises:
            DataError: it cannot be decoded, has the wrong shape, or cannot be transformed.
        """
        image = self.picture()
        if isinstance(image, Image.Image):
            return [(backbone.transform if transform is None else transform)(image) for transform in transforms]
        shape = backbone.preprocessing["input_size"]
        if not isinstance(image, Tensor) or list(image.shape) != shape or not image.is_floating_point():
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise DataError(
                f"{self.called} is {found}; it must be a PIL image or a normalised floating-point tensor {shape}."
            )
        if any(transform is not None for transform in transforms):
            raise DataError(f"{self.called} is a tensor; random views are made of PIL images only.")
        if not image.isfinite().all():
            raise DataError(f"{self.called} holds NaN or infinity.")
        return [image for _ in transforms]


def load(item: Any, called: str) -> Item:
    """Reads an item of some images, and decodes nothing.

    Args:
        item: a file's path, an encoded image, or a dataset's image and target.
        called: what it is called in messages, unless it is a file.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(item, Path):
        try:
            return Item(str(item), item.read_bytes(), f"Image {str(item)!r}")
        except OSError as error:
            raise DataError(f"Image {str(item)!r} cannot be read: {error.strerror}.") from error
    if isinstance(item, EncodedImage):
        return Item(called, item.content, item.name)
    return Item(called, prepared(item[0], called) if isinstance(item[0], Image.Image) else item[0])
