"""Renames tensors of Hugging Face transformers' ViTs to the names that timm, or its converters, read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from addenda.backbones.checkpoint import single_network

Rules = tuple[tuple[str, str], ...]
"""(pattern at the start of a name or after a dot, replacement), applied in order; an empty result drops the tensor."""

_BLOCKS: Rules = (
    (r"((model|encoder)\.)?layers?\.(?=\d)", "blocks."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"(attention\.attention|attention|self_attn)\.(q|k|v)(_proj|uery|ey|alue)\.", r"attn.\2."),
    (r"(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
)


class Names(NamedTuple):
    """The names in one kind of transformers model."""

    title: str
    anchor: str  # the name that tells it from others; what precedes it is the prefix of all its tensors
    rules: Rules


KINDS = (
    Names(
        "ViT or DINOv2",
        "embeddings.patch_embeddings.projection.weight",
        (
            *_BLOCKS,
            (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"embeddings\.position_embeddings$", "pos_embed"),
            (r"embeddings\.(?=(cls|mask|register)_)", ""),
            (r"(intermediate\.dense|mlp\.weights_in)\.", "mlp.fc1."),
            (r"(output\.dense|mlp\.weights_out)\.", "mlp.fc2."),
            (r"layernorm_before\.", "norm1."),
            (r"layernorm_after\.", "norm2."),
            (r"layernorm\.", "norm."),
        ),
    ),
    Names(
        "DINOv3",
        "embeddings.patch_embeddings.weight",
        (
            *_BLOCKS,
            (r"embeddings\.patch_embeddings\.", "patch_embed.proj."),
            (r"embeddings\.register_tokens$", "storage_tokens"),
            (r"embeddings\.(?=(cls|mask)_)", ""),
            (r"mlp\.gate_proj\.", "mlp.w1."),
            (r"mlp\.up_proj\.", "mlp.w2."),
            (r"mlp\.down_proj\.", "mlp.w3."),
        ),
    ),
    Names(
        "SigLIP or CLIP",
        "embeddings.patch_embedding.weight",
        (
            (r"head\.attention\.in_proj_", "attn_pool.in_proj_"),
            (r"head\.attention\.out_proj\.", "attn_pool.proj."),
            (r"head\.layernorm\.", "attn_pool.norm."),
            (r"head\.mlp\.", "attn_pool.mlp."),
            (r"head\.probe$", "attn_pool.latent"),
            *_BLOCKS,
            (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"embeddings\.position_embedding\.weight$", "pos_embed"),
            (r"embeddings\.class_embedding$", "cls_token"),
            (r"layer_norm([12])\.", r"norm\1."),
            (r"pre_layrnorm\.", "norm_pre."),
            (r"post_layernorm\.", "norm."),
        ),
    ),
)


def names_of(names: Iterable[str]) -> tuple[Names, str] | None:
    """The kind of a file's names and the prefix of its tensors; None if they are not transformers'."""
    names = list(names)
    for kind in KINDS:
        anchors = [name for name in names if f".{name}".endswith(f".{kind.anchor}")]
        if anchors:
            return kind, single_network([anchor.removesuffix(kind.anchor) for anchor in anchors])
    return None


def check_config(folder: Path, model: Any) -> None:
    """ValueError if a config.json beside the weights has other heads than the model, or QuickGELU in one alone."""
    if not (folder / "config.json").is_file():
        return
    config = json.loads((folder / "config.json").read_bytes())
    config = config.get("vision_config", config)
    block = model.blocks[0]
    heads, own_heads = config.get("num_attention_heads"), block.attn.num_heads
    if heads not in (None, own_heads):
        raise ValueError(f"its config.json has {heads} attention heads, the model {own_heads}; name the file's model")
    quick, own = config.get("hidden_act") == "quick_gelu", type(block.mlp.act).__name__
    if quick != (own == "QuickGELU"):
        raise ValueError(
            f"its config.json has the activation {config.get('hidden_act')!r}, the model {own}; name the timm model "
            f"{'with' if quick else 'without'} 'quickgelu' in its name"
        )


def renamed(kind: Names, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of one network, without their prefix, and joins queries, keys and values."""
    gated = any(".mlp.gate_proj." in name for name in tensors)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in kind.rules:
            new = re.sub(rf"(?:^|(?<=\.)){pattern}", replacement, new)
        if not gated:
            new = new.replace("mlp.w2.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")
        if new in result:
            raise ValueError(f"{name!r} and another tensor would both be {new!r}")
        result[new] = tensor
    _join_queries_keys_values(result)
    _adjust_shapes(result)
    return result


def _join_queries_keys_values(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", name)]:
        names = [name.replace("attn.q.", f"attn.{part}.") for part in "qkv"]
        if "storage_tokens" in tensors and name.endswith("bias"):  # DINOv3: timm gives keys no bias
            keys_bias = tensors.setdefault(names[1], torch.zeros_like(tensors[name]))
            if keys_bias.any():
                raise ValueError(f"{names[1]!r} is not zero, and keys have no bias in timm")
        if missing := [part for part in names if part not in tensors]:
            raise ValueError(f"{missing[0]!r} is missing")
        tensors[name.replace("attn.q.", "attn.qkv.")] = torch.cat([tensors.pop(part) for part in names])


def _adjust_shapes(tensors: dict[str, Tensor]) -> None:
    """Gives class token and positions a batch dimension, and divides the attention pool's projection as timm does."""
    if (token := tensors.get("cls_token")) is not None:
        tensors["cls_token"] = token.reshape(1, 1, -1)
    if (positions := tensors.get("pos_embed")) is not None and positions.ndim == 2:
        tensors["pos_embed"] = positions.unsqueeze(0)
    for kind in ("weight", "bias"):
        if (joined := tensors.pop(f"attn_pool.in_proj_{kind}", None)) is not None:
            third = len(joined) // 3
            tensors[f"attn_pool.q.{kind}"], tensors[f"attn_pool.kv.{kind}"] = joined[:third], joined[third:]
