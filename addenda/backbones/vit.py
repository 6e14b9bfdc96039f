"""timm's VisionTransformer: runs the stock blocks, with a hook that reads their keys and values."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from addenda.backbones.arithmetic import MIN_ROWS
from addenda.backbones.family import Family, KeyValue, Reading


class VisionTransformerFamily(Family):
    """timm's VisionTransformer models with standard blocks."""

    TIMM_CLASS = VisionTransformer
    LAST_PROJECTIONS = 2
    convert = staticmethod(partial(checkpoint_filter_fn, adapt_layer_scale=True))  # DeiT-III's names of LayerScale

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # A hook on the qkv projection reads what timm computes, without changing bits or computing it twice.
        self._captured = threading.local()  # passes the projection's input and output from the hook to `run`
        for block in self.blocks:
            block.attn.qkv.register_forward_hook(self._capture)

    @staticmethod
    def obstacle(model: Any) -> str | None:
        """Rejects blocks other than timm's standard ones."""
        for block in model.blocks:
            if type(block) is not Block:
                return f"its blocks are {type(block).__name__}, not timm's standard Block"
            if type(block.attn) is not Attention:
                return f"its attention is {type(block.attn).__name__}, not timm's standard Attention"
            if getattr(block.attn, "gate", None) is not None:  # older timm has no gates
                return "its attention is gated"
        return None

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """Patches, class token and registers, with position embeddings."""
        model = self.model
        embedded: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return embedded

    def run(self, block: Any, tokens: Float[Tensor, "B P D"]) -> tuple[Tensor, KeyValue, Tensor]:
        """Runs timm's own block."""
        self._captured.wanted = True
        tokens = block(tokens)
        normed, qkv = vars(self._captured).pop("projection")
        _, keys, values = self.split_qkv(block, qkv)
        return tokens, KeyValue(keys, values), normed

    def last(self, block: Any, tokens: Float[Tensor, "B P D"], reading: Reading) -> tuple[Tensor, KeyValue, Tensor]:
        """Computes less than `run` for "nothing", and for "pooled" with class-token pooling.

        Keys and values are computed for all tokens, but patches need neither queries nor the MLP. The class token is
        computed together with the next three tokens, because a product with one row gives different bits.
        """
        pools_class_token = self.model.global_pool == "token"
        if reading == "tokens" or (reading == "pooled" and not pools_class_token):
            return self.run(block, tokens)
        normed = block.norm1(tokens)
        if not pools_class_token:
            _, keys, values = self.project_normed(block, normed)
            return tokens, KeyValue(keys, values), normed
        attn, width = block.attn, self.model.embed_dim
        # Detached: with non-contiguous rows, torch uses another kernel if the weight requires gradients.
        weight, bias = attn.qkv.weight.detach(), None if attn.qkv.bias is None else attn.qkv.bias.detach()
        projected = F.linear(normed, weight[width:], None if bias is None else bias[width:])
        keys, values = projected.unflatten(-1, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        keys = attn.k_norm(keys)
        if reading == "pooled":
            queries = F.linear(normed[:, :MIN_ROWS], weight[:width], None if bias is None else bias[:width])
            queries = attn.q_norm(queries.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2))
            attended = F.scaled_dot_product_attention(queries, keys, values, scale=attn.scale)
            tokens = self.finish(block, tokens[:, :MIN_ROWS], attended.transpose(1, 2).flatten(2))
        return tokens, KeyValue(keys, values), normed

    def _capture(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if getattr(self._captured, "wanted", False):  # otherwise nothing would free the tensors
            self._captured.projection, self._captured.wanted = (inputs[0], output), False
