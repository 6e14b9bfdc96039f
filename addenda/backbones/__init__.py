"""A timm Vision Transformer, frozen: loading, fingerprint, preprocessing, layer-by-layer keys and values."""

from addenda.backbones.catalogue import catalogue
from addenda.backbones.frozen import MIN_ROWS, FrozenBackbone, FrozenStream, KeyValue
from addenda.backbones.images import SUFFIXES, read_image
from addenda.backbones.loading import load_backbone, untrained_backbone

__all__ = [
    "MIN_ROWS",
    "SUFFIXES",
    "FrozenBackbone",
    "FrozenStream",
    "KeyValue",
    "catalogue",
    "load_backbone",
    "read_image",
    "untrained_backbone",
]
