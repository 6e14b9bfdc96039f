"""What a family of timm models gives: how its frozen pass computes, and blocks for tasks' tokens to pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones.arithmetic import BlockAdapters

Reading = Literal["tokens", "pooled", "nothing"]
"""What is read of the last block's output."""


class KeyValue(NamedTuple):
    """Keys and values of one layer, each Float[B, H, P, d]; keys as attention meets them: k_norm and rotation done."""

    keys: Tensor
    values: Tensor


class Family(ABC):
    """One timm model, as the frozen pass and tasks' tokens compute with it; a subclass for each class of timm models.

    Everything above asks for nothing else. `project` and `finish` are written for the layers of timm's standard Block,
    by its names: norm1, attn (qkv, q_norm, k_norm, norm, proj), ls1, norm2, mlp, ls2. A family of other blocks gives
    stand-ins that have these layers and share the weights; `attn` has num_heads, head_dim, scale and fused_attn too.
    """

    TIMM_CLASS: ClassVar[type]  # of its models: this one, no subclass
    LAST_PROJECTIONS: ClassVar[int] = 3  # of q, k and v, those that `last` computes for all tokens where little is read
    convert: ClassVar[Callable[..., dict[str, Tensor]]]  # gives a checkpoint's tensors the names of the model's own

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: list[Any] = list(model.blocks)

    @staticmethod
    @abstractmethod
    def obstacle(model: Any) -> str | None:
        """Says which property of its own keeps a model of the class from being a backbone; None if nothing does."""

    @staticmethod
    def structure(model: Any) -> dict[str, Any]:
        """What a feature's bits depend on beside weights and what every family's models have."""
        return {}

    @abstractmethod
    def embed(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """What the first block meets, as timm's forward_features makes it."""

    @abstractmethod
    def run(self, block: Any, tokens: Float[Tensor, "B P D"]) -> tuple[Tensor, KeyValue, Tensor]:
        """A block over the frozen tokens, bit for bit as timm runs it.

        Returns:
            Its output, its keys and values, and what it computed them from: its input, normalised, Float[B, P, D].
        """

    @abstractmethod
    def last(self, block: Any, tokens: Float[Tensor, "B P D"], reading: Reading) -> tuple[Tensor, KeyValue, Tensor]:
        """As `run`, for the last block: of its output only what is read need be computed."""

    def place(self, block: Any, heads: Float[Tensor, "B H N d"]) -> Float[Tensor, "B H N d"]:
        """Queries or keys of a sequence that begins with the frozen tokens, turned as these tokens' positions say.

        Tokens behind the frozen ones have no position. Where positions are added to the tokens, nothing is turned.
        """
        return heads

    def project(
        self, block: Any, tokens: Float[Tensor, "B N D"], adapters: BlockAdapters | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of some tokens at a block's input, each [B, H, N, d], turned by no position.

        With adapters the tokens are those of B slots, N images of each; their `q` changes the queries, before q_norm.
        """
        return self.project_normed(block, block.norm1(tokens), adapters)

    def project_normed(
        self, block: Any, normed: Float[Tensor, "B N D"], adapters: BlockAdapters | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of tokens that have passed the block's first norm."""
        qkv = block.attn.qkv(normed)
        if adapters is not None:
            queries, offered = qkv.tensor_split((qkv.shape[-1] // 3,), dim=-1)
            qkv = torch.cat([queries + adapters.q(normed), offered], dim=-1)
        return self.split_qkv(block, qkv)

    def finish(
        self,
        block: Any,
        tokens: Float[Tensor, "B N D"],
        read: Float[Tensor, "B N D"],
        adapters: BlockAdapters | None = None,
    ) -> Float[Tensor, "B N D"]:
        """The rest of a block for tokens at its input and what their queries read: projection, residuals and MLP."""
        normed = block.attn.norm(read)
        projected = block.attn.proj(normed)
        if adapters is not None:
            projected = projected + adapters.proj(normed)
        tokens = tokens + block.ls1(projected)
        normed, mlp = block.norm2(tokens), block.mlp
        if adapters is None:
            update = mlp(normed)
        else:  # timm's plain Mlp, written out
            hidden = mlp.norm(mlp.act(mlp.fc1(normed) + adapters.fc1(normed)))
            update = mlp.fc2(hidden) + adapters.fc2(hidden)
        result: Tensor = tokens + block.ls2(update)
        return result

    @staticmethod
    def split_qkv(block: Any, qkv: Float[Tensor, "B N _"]) -> tuple[Tensor, Tensor, Tensor]:
        """Splits a qkv projection [B, N, 3 D] into normed q, normed k and v, each [B, H, N, d]."""
        attn = block.attn
        parts = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        return attn.q_norm(queries), attn.k_norm(keys), values
