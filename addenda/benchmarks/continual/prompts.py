"""Ports of L2P and CODA-Prompt: prompts beside the frozen backbone's own tokens, found by its own feature of the image.

Unverified: small ports of what the papers describe, with their settings; no published figure was reproduced with them.
Here the images are taken as they are, without random views, so that the query of each is computed once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.continual.method import NEVER
from addenda.benchmarks.continual.one_head import OneHead, PooledFeatures, pixel_batches
from addenda.benchmarks.continual.settings import BaselineSettings
from addenda.benchmarks.continual.stream import Stream
from addenda.combined import task_cost
from addenda.exceptions import TrainingError
from addenda.learner.candidates import schedule
from addenda.learner.data.labelled import LabelledImages
from addenda.learner.regimes import EVALUATION_BATCH


class PromptMethod(OneHead):
    """A method that learns prompts and one head; in training, the logits of other experiences' classes are masked."""

    def __init__(self, stream: Stream, backbone: FrozenBackbone, settings: BaselineSettings, seed: int) -> None:
        super().__init__(stream, backbone, settings, seed)
        backbone.check_vision_transformer(f"The method {type(self).__name__}")
        self._pooled = PooledFeatures(backbone)
        self._random = torch.Generator().manual_seed(seed)
        self._head_weight = Parameter(
            torch.zeros(len(stream.labels), backbone.embed_dim, device=backbone.device, dtype=torch.float32)
        )
        self._head_bias = Parameter(torch.zeros(len(stream.labels), device=backbone.device, dtype=torch.float32))

    def _learn(self, number: int) -> None:
        how, device, experience = self._settings, self._backbone.device, self._stream.experiences[number]
        own = torch.zeros(len(self._stream.labels), dtype=torch.bool, device=device)
        own[list(experience.classes)] = True
        learned = [*self._grow(), self._head_weight, self._head_bias]
        optimizer = torch.optim.Adam(learned)
        pixels, queries = experience.train.read_all(self._backbone), self._pooled(experience.train)
        steps = how.epochs * math.ceil(len(pixels) / how.batch_size)
        orders = [
            torch.randperm(len(pixels), generator=self._random, dtype=torch.int64, device="cpu")
            for _ in range(how.epochs)
        ]
        batches = [rows for order in orders for rows in order.split(how.batch_size)]
        for step, rows in enumerate(batches):
            features, penalty = self._features(pixels[rows].to(device), queries[rows].to(device))
            logits = F.linear(features, self._head_weight, self._head_bias).masked_fill(~own, NEVER)
            (F.cross_entropy(logits, experience.train.targets[rows].to(device)) + penalty).backward()
            torch.nn.utils.clip_grad_norm_(learned, how.clip_norm)
            optimizer.param_groups[0]["lr"] = self._rate * schedule(step, how.warmup_steps, steps)
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def _logits(self, images: LabelledImages) -> Float[Tensor, "N C"]:
        batches = zip(pixel_batches(images, self._backbone), self._pooled(images).split(EVALUATION_BATCH), strict=True)
        features = [self._features(pixels, queries.to(pixels.device))[0] for pixels, queries in batches]
        return F.linear(torch.cat(features), self._head_weight, self._head_bias).cpu()

    def _features(self, pixels: Float[Tensor, "B 3 H W"], queries: Float[Tensor, "B D"]) -> tuple[Tensor, Tensor]:
        """What the head reads, in float32, and what is added to the loss."""
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self._settings.autocast):
            features, penalty = self._prompted(pixels, queries)
        return features.float(), penalty.float()

    def _stored_bytes(self) -> float:
        return sum(kept.nbytes for kept in (self._head_weight, self._head_bias, *self._prompts()))

    def _relative_inference(self) -> float:
        """A pass for the query, and a pass with prompts."""
        return 2 + self._added_operations() / task_cost(self._backbone, 0).backbone_operations

    @property
    @abstractmethod
    def _rate(self) -> float:
        """The learning rate at its highest."""

    @abstractmethod
    def _grow(self) -> Sequence[Parameter]:
        """Gets ready for one more experience; returns the prompts that it learns."""

    @abstractmethod
    def _prompted(self, pixels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _prompts(self) -> Sequence[Tensor]:
        """All that is kept beside the head."""

    @abstractmethod
    def _added_operations(self) -> int:
        """Multiply-adds of one image that prompts add to a pass."""


class L2P(PromptMethod):
    """The prompts of a pool whose keys are nearest to the image's feature are put before its tokens.

    The head reads the mean of their outputs. Prompts are chosen image by image, as the paper has it; its code lets a
    batch vote.

    Source: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022.
    """

    def __init__(self, stream: Stream, backbone: FrozenBackbone, settings: BaselineSettings, seed: int) -> None:
        super().__init__(stream, backbone, settings, seed)
        if settings.l2p_top > settings.l2p_pool:
            raise TrainingError(
                f"L2P cannot choose l2p_top = {settings.l2p_top} of l2p_pool = {settings.l2p_pool} prompts: raise "
                "l2p_pool, or lower l2p_top."
            )

        def uniform(*shape: int) -> Parameter:
            return Parameter(
                (2 * torch.rand(shape, generator=self._random, dtype=torch.float32, device="cpu") - 1).to(
                    backbone.device
                )
            )

        self._pool = uniform(settings.l2p_pool, settings.l2p_length, backbone.embed_dim)
        self._keys = uniform(settings.l2p_pool, backbone.embed_dim)

    @property
    def _rate(self) -> float:
        return self._settings.l2p_rate

    def _grow(self) -> Sequence[Parameter]:
        return self._pool, self._keys

    def _prompted(self, pixels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        nearness = F.normalize(queries, dim=1) @ F.normalize(self._keys, dim=1).T  # [B, pool]
        found = nearness.topk(self._settings.l2p_top, dim=1)
        prompts = self._pool[found.indices].flatten(1, 2).to(self._backbone.precision)
        tokens = torch.cat([prompts, self._backbone.embed(pixels)], dim=1)
        for block in self._backbone.blocks:
            tokens = block(tokens)
        features = self._backbone.final_norm(tokens[:, : prompts.shape[1]]).mean(1)
        return features, -self._settings.l2p_matching * found.values.sum(1).mean()

    def _prompts(self) -> Sequence[Tensor]:
        return self._pool, self._keys

    def _added_operations(self) -> int:
        backbone, more = self._backbone, self._settings.l2p_top * self._settings.l2p_length
        attention = 2 * backbone.depth * backbone.embed_dim
        linear = task_cost(backbone, 0).operations - attention * (backbone.num_tokens + 1)
        return more * linear + attention * ((backbone.num_tokens + more) ** 2 - backbone.num_tokens**2)


class CodaPrompt(PromptMethod):
    """Keys and values for the first blocks: a sum of components, weighted by how the image's feature meets their keys.

    Each experience adds its share of the components, orthogonal to all before; earlier ones are frozen.

    Source: Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting", CVPR 2023.
    """

    def __init__(self, stream: Stream, backbone: FrozenBackbone, settings: BaselineSettings, seed: int) -> None:
        super().__init__(stream, backbone, settings, seed)
        if settings.coda_pool > backbone.embed_dim:
            raise TrainingError(
                f"CODA-Prompt cannot have coda_pool = {settings.coda_pool} orthogonal components in the "
                f"{backbone.embed_dim} dimensions of backbone {backbone.name!r}: lower coda_pool."
            )
        self._layers = min(settings.coda_layers, backbone.depth)
        self._share = max(1, settings.coda_pool // len(stream.experiences))
        self._groups: list[tuple[Parameter, ...]] = []

    @property
    def _rate(self) -> float:
        return self._settings.coda_rate

    def _grow(self) -> Sequence[Parameter]:
        width = self._backbone.embed_dim
        for component in self._prompts():
            component.requires_grad_(False)
        grown = []
        for kind, size in enumerate((width, width, width * self._settings.coda_length)):
            known = torch.cat(
                [
                    torch.zeros(self._layers, 0, size, dtype=torch.float32, device="cpu"),
                    *(group[kind].cpu() for group in self._groups),
                ],
                dim=1,
            )
            fresh = torch.stack([self._orthonormal(of_layer) for of_layer in known])
            grown.append(Parameter(fresh.to(self._backbone.device)))
        self._groups.append(tuple(grown))
        return self._groups[-1]

    def _orthonormal(self, known: Float[Tensor, "K D"]) -> Float[Tensor, "S D"]:
        """A share of new components, orthogonal to each other and to those that are known."""
        fresh = torch.randn(self._share, known.shape[1], generator=self._random, dtype=torch.float32, device="cpu")
        basis = torch.linalg.qr(known.T)[0]
        new: Tensor = torch.linalg.qr((fresh - fresh @ basis @ basis.T).T)[0]
        return new.T

    def _components(self) -> list[Float[Tensor, "L M _"]]:
        """Keys, attention and flat prompts of all components so far, each by layer."""
        return [torch.cat(kind, dim=1) for kind in zip(*self._groups, strict=True)]

    def _prompted(self, pixels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        backbone, components = self._backbone, self._components()
        tokens = self._backbone.embed(pixels)
        for layer, block in enumerate(backbone.blocks):
            if layer < self._layers:
                tokens = self._block(block, tokens, queries, *(kind[layer] for kind in components))
            else:
                tokens = block(tokens)
        features = backbone.model.forward_head(backbone.model.norm(tokens), pre_logits=True)
        with torch.autocast(pixels.device.type, enabled=False):
            penalty = torch.stack([_skew(of_layer) for kind in components for of_layer in kind]).sum()
        return features, self._settings.coda_orthogonality * penalty

    def _block(
        self, block: Any, tokens: Tensor, queries: Tensor, keys: Tensor, attention: Tensor, prompts: Tensor
    ) -> Tensor:
        met = F.cosine_similarity(queries[:, None] * attention, keys, dim=-1)  # [B, M]
        prefix = (met @ prompts).unflatten(1, (2, -1, block.attn.num_heads, block.attn.head_dim))
        more_keys, more_values = prefix.transpose(2, 3).unbind(1)  # each [B, H, length / 2, d]
        query, key, value = self._backbone.family.project(block, tokens)
        key = torch.cat([more_keys.to(key.dtype), key], dim=2)
        value = torch.cat([more_values.to(value.dtype), value], dim=2)
        read = F.scaled_dot_product_attention(query, key, value, scale=block.attn.scale)
        return self._backbone.family.finish(block, tokens, read.transpose(1, 2).flatten(2))

    def _prompts(self) -> Sequence[Tensor]:
        return [component for group in self._groups for component in group]

    def _added_operations(self) -> int:
        width, length = self._backbone.embed_dim, self._settings.coda_length
        num_components = self._share * len(self._groups)
        attention = 2 * self._backbone.num_tokens * (length // 2) * width
        return self._layers * (attention + num_components * width * (2 + length))


def _skew(rows: Float[Tensor, "M D"]) -> Float[Tensor, ""]:
    """How far rows are from orthonormal."""
    skew: Tensor = (rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=torch.float32)).square().mean()
    return skew
