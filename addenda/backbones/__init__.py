"""Frozen timm backbones: loading, fingerprints, preprocessing, and the keys and values of each layer."""

from addenda.backbones.arithmetic import MIN_ROWS, Adapter, BlockAdapters, is_traced, plain, product, traced, uncompiled
from addenda.backbones.family import KeyValue, Reading
from addenda.backbones.frozen import FrozenBackbone
from addenda.backbones.image_files import (
    THREADS,
    Files,
    LeftOut,
    counted,
    image_files,
    in_words,
    joined,
    read_ahead,
    read_files,
)
from addenda.backbones.image_input import ImageInput
from addenda.backbones.images import PREPARATION, prepared, read_image
from addenda.backbones.loader import load_backbone, untrained_backbone
from addenda.backbones.scope import cached_weights, catalogue

__all__ = [
    "MIN_ROWS",
    "PREPARATION",
    "THREADS",
    "Adapter",
    "BlockAdapters",
    "Files",
    "FrozenBackbone",
    "ImageInput",
    "KeyValue",
    "LeftOut",
    "Reading",
    "cached_weights",
    "catalogue",
    "counted",
    "image_files",
    "in_words",
    "is_traced",
    "joined",
    "load_backbone",
    "plain",
    "prepared",
    "product",
    "read_ahead",
    "read_files",
    "read_image",
    "traced",
    "uncompiled",
    "untrained_backbone",
]
