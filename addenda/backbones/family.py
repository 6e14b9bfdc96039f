"""The interface to one class of timm models: its frozen forward pass, and the blocks that task tokens run through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor

from addenda.backbones.arithmetic import BlockAdapters

Reading = Literal["tokens", "pooled", "nothing"]
"""What the caller reads from the last block's output."""


class KeyValue(NamedTuple):
    """Keys and values of one layer, each Float[B, H, P, d]; k_norm and rotation are already applied to the keys."""

    keys: Tensor
    values: Tensor


class Family(ABC):
    """Computes the frozen forward pass and the task stream with one timm model; one subclass per timm class.

    `project` and `finish` use the layers of timm's standard Block by name: norm1, attn (qkv, q_norm, k_norm, norm,
    proj, and num_heads, head_dim, scale, fused_attn), ls1, norm2, mlp, ls2. A family with other blocks wraps them in
    views that have these layers and share the weights.
    """

    TIMM_CLASS: ClassVar[type]  # the exact class of its models; subclasses do not qualify
    # How many of q, k and v `last` computes for all tokens unless reading is "tokens".
    LAST_PROJECTIONS: ClassVar[int] = 3
    convert: ClassVar[Callable[..., dict[str, Tensor]]]  # renames a checkpoint's tensors to the model's names

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: list[Any] = list(model.blocks)

    @staticmethod
    @abstractmethod
    def obstacle(model: Any) -> str | None:
        """Returns why a model of this class cannot be a backbone, or None if it can."""

    @staticmethod
    def structure(model: Any) -> dict[str, Any]:
        """Settings of this family, besides the weights and the common ones, on which the bits of a feature depend."""
        return {}

    @abstractmethod
    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """The first block's input, computed as in timm's forward_features."""

    @abstractmethod
    def run(self, block: Any, tokens: Float[Tensor, "B P D"]) -> tuple[Tensor, KeyValue, Tensor]:
        """Runs a block over the frozen tokens, bit for bit as timm does.

        Returns:
            Its output, its keys and values, and its normalised input, Float[B, P, D].
        """

    @abstractmethod
    def last(self, block: Any, tokens: Float[Tensor, "B P D"], reading: Reading) -> tuple[Tensor, KeyValue, Tensor]:
        """Like `run`, for the last block, which need only compute the outputs that are read."""

    def place(self, block: Any, heads: Float[Tensor, "B H N d"]) -> Float[Tensor, "B H N d"]:
        """Applies rotary positions to queries or keys of a sequence that begins with the frozen tokens.

        Tokens after the frozen ones have no position. Models without rotary positions return `heads` unchanged.
        """
        return heads

    def project(
        self, block: Any, tokens: Float[Tensor, "B N D"], adapters: BlockAdapters | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block's input tokens, each [B, H, N, d], without rotary positions.

        With adapters, B counts slots and N images; the adapters' `q` updates the queries, before q_norm.
        """
        return self.project_normed(block, block.norm1(tokens), adapters)

    def project_normed(
        self, block: Any, normed: Float[Tensor, "B N D"], adapters: BlockAdapters | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like `project`, for tokens after the block's first norm."""
        qkv = block.attn.qkv(normed)
        if adapters is not None:
            queries, keys_values = qkv.tensor_split((qkv.shape[-1] // 3,), dim=-1)
            qkv = torch.cat([queries + adapters.q(normed), keys_values], dim=-1)
        return self.split_qkv(block, qkv)

    def finish(
        self,
        block: Any,
        tokens: Float[Tensor, "B N D"],
        attended: Float[Tensor, "B N D"],
        adapters: BlockAdapters | None = None,
    ) -> Float[Tensor, "B N D"]:
        """The remainder of a block, given its input and the attention output: projection, residuals and MLP."""
        normed = block.attn.norm(attended)
        projected = block.attn.proj(normed)
        if adapters is not None:
            projected = projected + adapters.proj(normed)
        tokens = tokens + block.ls1(projected)
        normed, mlp = block.norm2(tokens), block.mlp
        if adapters is None:
            update = mlp(normed)
        else:
            hidden = mlp.norm(_hidden(mlp, normed, adapters.fc1(normed)))
            update = mlp.fc2(hidden) + adapters.fc2(hidden)
        result: Tensor = tokens + block.ls2(update)
        return result

    def first_tokens(self, class_tokens: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
        """The first block's input for tasks' class tokens.

        Each gets the position embedding of the backbone's class token (none in DeiT-III or without a class token), and
        norm_pre where the model has one (CLIP).
        """
        model, position = self.model, self.model.pos_embed
        if position is not None and model.cls_token is not None and not model.no_embed_class:
            class_tokens = class_tokens + position[0, 0]
        tokens: Tensor = model.norm_pre(class_tokens)
        return tokens

    def class_token(self, zeros: Float[Tensor, "1 3 H W"]) -> Float[Tensor, " D"]:
        """The backbone's class token, without position embedding.

        Without one, it is the attention pool's latent query, or else the mean patch that the first block reads of an
        image of zeros (before norm_pre).
        """
        model = self.model
        if model.cls_token is not None:
            token: Tensor = model.cls_token[0, 0]
        elif hasattr(model.attn_pool, "latent"):
            token = model.attn_pool.latent[0, 0]
        else:
            patches = model.patch_embed(zeros).flatten(1, -2)
            if model.pos_embed is not None:
                patches = patches + model.pos_embed[:, -patches.shape[1] :]
            token = patches.mean(dim=(0, 1))
        return token

    def adapter_obstacle(self) -> str | None:
        """Returns why the blocks cannot carry adapters, or None if they can."""
        for block in self.model.blocks:
            if type(block.mlp) not in (Mlp, GluMlp, SwiGLU):
                return f"its MLPs are {type(block.mlp).__name__}, not timm's Mlp, GluMlp or SwiGLU"
        return None

    def adapter_shapes(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer that adapters update, by its name in BlockAdapters."""
        attn, mlp, width = self.blocks[0].attn, self.blocks[0].mlp, self.model.embed_dim
        first = [mlp.fc1_g, mlp.fc1_x] if isinstance(mlp, SwiGLU) else [mlp.fc1]
        return {
            "q": (width, attn.proj.in_features),
            "proj": (attn.proj.in_features, width),
            "fc1": (width, sum(layer.out_features for layer in first)),
            "fc2": (mlp.fc2.in_features, width),
        }

    @staticmethod
    def split_qkv(block: Any, qkv: Float[Tensor, "B N _"]) -> tuple[Tensor, Tensor, Tensor]:
        """Splits a qkv projection [B, N, 3 D] into normed q, normed k and v, each [B, H, N, d]."""
        attn = block.attn
        parts = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        return attn.q_norm(queries), attn.k_norm(keys), values


def _hidden(mlp: Any, normed: Float[Tensor, "B N D"], update: Float[Tensor, "B N m"]) -> Float[Tensor, "B N h"]:
    """Hidden units of timm's Mlp (m = h), GluMlp or SwiGLU (m = 2 h), the first layer's outputs being updated."""
    if isinstance(mlp, SwiGLU):
        gate, value = update.chunk(2, dim=-1)
        hidden: Tensor = mlp.act(mlp.fc1_g(normed) + gate) * (mlp.fc1_x(normed) + value)
        return hidden
    outputs = mlp.fc1(normed) + update
    if isinstance(mlp, GluMlp):
        first, second = outputs.chunk(2, dim=-1)
        hidden = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        hidden = mlp.act(outputs)
    return hidden
