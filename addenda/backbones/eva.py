"""timm's Eva (EVA-02, DINOv3, ViTs with rotary position embeddings), whose attention rotates queries and keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, checkpoint_filter_fn
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from addenda.backbones.arithmetic import MIN_ROWS
from addenda.backbones.family import Family, KeyValue, Reading


class EvaFamily(Family):
    """timm's Eva models with pre-norm blocks, reimplemented because no hook can read their keys and values.

    As in timm, only patches are rotated: the class token, registers, tasks' tokens and memory have no position in the
    image.
    """

    TIMM_CLASS = Eva
    convert = staticmethod(checkpoint_filter_fn)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        with torch.no_grad():  # timm computes every kind of rotation from the input size alone
            pixels = next(model.parameters()).new_zeros(1, 3, *model.patch_embed.img_size)
            _, rotation = model._pos_embed(model.patch_embed(pixels))
        rotations = rotation if model.rope_mixed else [rotation] * len(model.blocks)
        self.blocks = [_BlockView(block, rotation) for block, rotation in zip(model.blocks, rotations, strict=True)]

    @staticmethod
    def obstacle(model: Any) -> str | None:
        """Rejects blocks other than pre-norm ones, and gated or grouped attention."""
        for block in model.blocks:
            if type(block) is not EvaBlock:
                return f"its blocks are {type(block).__name__}, not timm's pre-norm EvaBlock"
            attn = block.attn
            if type(attn) not in (EvaAttention, AttentionRope):
                return f"its attention is {type(attn).__name__}, not timm's EvaAttention or AttentionRope"
            if getattr(attn, "gate", None) is not None:  # older timm has neither gates nor groups
                return "its attention is gated"
            if getattr(attn, "num_kv_groups", 1) != 1:
                return f"its attention is grouped: {attn.num_kv_groups} query heads share each key head"
        return None

    @staticmethod
    def structure(model: Any) -> dict[str, Any]:
        """The settings that determine the rotations; no checkpoint contains them."""
        rope = model.rope
        if rope is None:
            return {"rope": None}
        settings = ("grid_offset", "grid_indexing", "ref_feat_shape", "mrope_section")
        return {
            "rope": type(rope).__name__,
            "rotate_half": getattr(model.blocks[0].attn, "rotate_half", False),
            "temperature": float(rope.temperature),
            **{setting: getattr(rope, setting, None) for setting in settings},
        }

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """Patches, class token and registers, with absolute positions where the model has them."""
        tokens, _ = self.model._pos_embed(self.model.patch_embed(images))
        embedded: Tensor = self.model.norm_pre(tokens)
        return embedded

    def run(self, block: Any, tokens: Float[Tensor, "B P D"]) -> tuple[Tensor, KeyValue, Tensor]:
        """Runs the reimplemented block."""
        return self.last(block, tokens, "tokens")

    def last(self, block: Any, tokens: Float[Tensor, "B P D"], reading: Reading) -> tuple[Tensor, KeyValue, Tensor]:
        """Computes keys and values only for "nothing", and the class token only for "pooled" with token pooling.

        The class token, which is never rotated, is computed together with the next three tokens, because a product
        with one row gives different bits.
        """
        normed = block.norm1(tokens)
        queries, keys, values = self.project_normed(block, normed)
        key_values = KeyValue(self.place(block, keys), values)
        if reading == "nothing":
            return tokens, key_values, normed
        if reading == "pooled" and self.model.global_pool == "token":
            tokens, queries = tokens[:, :MIN_ROWS], queries[:, :, :MIN_ROWS]
        else:
            queries = self.place(block, queries)
        if block.attn.fused_attn:
            attended = F.scaled_dot_product_attention(queries, *key_values)
        else:
            attended = (queries * block.attn.scale @ key_values.keys.transpose(-2, -1)).softmax(dim=-1) @ values
        return self.finish(block, tokens, attended.transpose(1, 2).flatten(2)), key_values, normed

    def place(self, block: Any, heads: Float[Tensor, "B H N d"]) -> Float[Tensor, "B H N d"]:
        """Rotates the patches' queries or keys as timm does; all others stay unchanged."""
        if block.rotation is None:
            return heads
        start = self.model.num_prefix_tokens
        end = start + self.model.patch_embed.num_patches
        prefix, patches, suffix = heads.tensor_split((start, end), dim=2)
        rotated = apply_rot_embed_cat(patches, block.rotation, half=block.attn.rotate_half)
        return torch.cat([prefix, rotated, suffix], dim=2).type_as(heads)


class _BlockView(nn.Module):
    """An EvaBlock's layers under the names of timm's standard Block; `rotation` is None without rotary positions."""

    def __init__(self, block: Any, rotation: Tensor | None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attn = _AttentionView(block.attn)
        self.ls1, self.ls2 = _layer_scale(block.gamma_1), _layer_scale(block.gamma_2)
        self.rotation = rotation


class _AttentionView(nn.Module):
    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.qkv = _qkv_layer(attn)
        self.q_norm, self.k_norm, self.norm, self.proj = attn.q_norm, attn.k_norm, attn.norm, attn.proj
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.scale, self.fused_attn = attn.scale, attn.fused_attn
        self.rotate_half = getattr(attn, "rotate_half", False)


def _layer_scale(gamma: nn.Parameter | None) -> nn.Module:
    if gamma is None:
        return nn.Identity()
    scale = LayerScale(len(gamma))
    scale.gamma = gamma
    return scale


def _qkv_layer(attn: Any) -> nn.Module:
    """One layer that computes queries, keys and values, for each form in which timm stores them."""
    if attn.qkv is None:
        return _ConcatLinear(attn.q_proj, attn.k_proj, attn.v_proj)
    if getattr(attn, "q_bias", None) is None:  # no bias, or AttentionRope, whose linear layer holds it
        layer: nn.Module = attn.qkv
        return layer
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:  # added after the product, which rounds differently
        return nn.Sequential(attn.qkv, _AddBias(bias))
    biased = nn.Linear(attn.qkv.in_features, attn.qkv.out_features, device="meta")
    biased.weight, biased.bias = attn.qkv.weight, nn.Parameter(bias, requires_grad=False)
    return biased


class _ConcatLinear(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, rows: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        return torch.cat([layer(rows) for layer in self.layers], dim=-1)


class _AddBias(nn.Module):
    def __init__(self, bias: Float[Tensor, " n"]) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, rows: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return rows + self.bias
