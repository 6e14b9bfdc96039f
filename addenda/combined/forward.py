"""The combined forward pass: the frozen stream, the task streams with their attention, and the heads.

Nothing else runs these. The caller's contexts (autocast, gradients, inference mode, default device) do not change bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue, Reading, is_traced, plain, product, uncompiled
from addenda.combined.heads import HeadGroup, complete_groups, head_rows
from addenda.combined.shapes import batch_size, micro_batch
from addenda.combined.tiles import Layout, Tile, TileStore
from addenda.exceptions import RegistryError
from addenda.registry import Task

Observer = Callable[[int, KeyValue, KeyValue], None]
"""Called per batch and layer with the layer's index, the frozen keys and values [B, H, P, d], and those of the layout's
offered tokens [B, H, 1 + N, d], whose row 0 is zeros."""
AttentionObserver = Callable[[int, int, Tensor], None]
"""Called per batch, layer and tile with the indices of both and the slots' attention weights [B, H, S, P + w]."""
HeadFunction = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""A `Head` or another function of a task's feature [B, D] (the pooled one for head-only tasks), the pooled feature and
the layer features [B, n], all from `head_rows`."""

_PAUSE: ContextVar[Callable[[], None] | None] = ContextVar("pause", default=None)


@contextmanager
def pausing(pause: Callable[[], None] | None) -> Iterator[None]:
    """In this context, forward passes call a function after each layer; it may run other forward passes meanwhile."""
    token = _PAUSE.set(pause)
    try:
        yield
    finally:
        _PAUSE.reset(token)


class ForwardResult(NamedTuple):
    """Outputs of a forward pass."""

    answers: dict[str, Tensor]  # the output of each head, Float[B, C], by its task's sha256
    pooled: Tensor | None  # the pooled feature in the backbone's precision, Float[B, D], if requested
    layers: Tensor | None  # the layer features, Float[B, n], if requested

    @property
    def features(self) -> Float[Tensor, "B F"] | None:
        """The requested features in float32, side by side; None if none was requested."""
        requested = [part.float() for part in (self.pooled, self.layers) if part is not None]
        return torch.cat(requested, dim=1) if requested else None


def forward_pass(
    backbone: FrozenBackbone,
    images: Tensor,
    layout: Layout | None = None,
    heads: Mapping[str, HeadFunction] | None = None,
    sizes: Sequence[int] | None = None,
    pooled: bool = False,
    layers: bool = False,
    observe: Observer | None = None,
    observe_attention: AttentionObserver | None = None,
) -> ForwardResult:
    """Runs images through the backbone and the tasks of a layout.

    Args:
        backbone: the frozen backbone.
        images: Float[B, 3, H, W] from the backbone's transform.
        layout: the tasks' slots; None runs only the frozen stream.
        heads: functions that compute the outputs of some of the layout's tasks, by sha256.
        sizes: allowed batch sizes, ascending, ending with the micro-batch; each batch is padded with zeros to one of
            them. None pads nothing.
        pooled: whether to return the pooled feature.
        layers: whether to return the layer features.
        observe: see `Observer`.
        observe_attention: see `AttentionObserver`.

    Raises:
        BackboneError: the images have another shape.
    """
    layout, heads = layout or Layout(TileStore(backbone), ()), heads or {}
    requested = [task for task in layout.tasks if task.sha256 in heads]
    reading: Reading = "pooled" if pooled or any(task.reads_pooled for task in requested) else "nothing"
    needs_layers = layers or any(task.num_layer_features for task in requested)
    grouped: dict[HeadGroup, list[Tensor]] = {group: [] for group in complete_groups(heads)}
    in_groups = {sha256 for group in grouped for sha256 in group.num_labels}
    answers: dict[str, list[Tensor]] = {sha256: [] for sha256 in heads if sha256 not in in_groups}
    features: dict[str, list[Tensor]] = {"pooled": [], "layers": []}
    # When traced for export, the caller has already entered `plain`.
    with nullcontext() if is_traced() else plain(backbone.device):
        for batch, count in _batches(backbone, images, sizes):
            stream = backbone.stream(batch, reading, needs_layers)
            tiles = _task_streams(backbone, stream, layout, observe, observe_attention)
            pooled_feature = stream.pooled if reading == "pooled" else None
            layer_features = stream.layers if needs_layers else None
            shared = [None if each is None else head_rows(each, backbone) for each in (pooled_feature, layer_features)]
            read = _read_by_heads(backbone, layout, tiles, heads, shared[0])
            for sha256, batches in answers.items():
                batches.append(heads[sha256](read[sha256], *shared)[:count])
            for group, batches in grouped.items():
                batches.append(group(torch.stack([read[sha256] for sha256 in group.num_labels]), *shared)[:, :count])
            if pooled and pooled_feature is not None:
                features["pooled"].append(pooled_feature[:count])
            if layers and layer_features is not None:
                features["layers"].append(layer_features[:count])
        joined = {sha256: torch.cat(batches) for sha256, batches in answers.items()}
        for group, batches in grouped.items():
            joined |= group.divide(torch.cat(batches, dim=1))
        return ForwardResult(joined, *(torch.cat(batches) if batches else None for batches in features.values()))


def task_features(
    backbone: FrozenBackbone, stream: Iterable[KeyValue], layout: Layout, observe: Observer | None = None
) -> dict[str, Float[Tensor, "B D"]]:
    """Runs only the task streams, over a frozen stream computed earlier for one batch.

    Args:
        backbone: the frozen backbone.
        stream: the frozen keys and values of each layer.
        layout: the tasks' slots.
        observe: see `Observer`.

    Returns:
        The final feature of each task's token, by the task's sha256.
    """
    with plain(backbone.device):
        tiles = _task_streams(backbone, stream, layout, observe)
        return {sha256: tiles[tile][slot] for sha256, (tile, slot) in layout.slot.items()}


def backbone_logits(backbone: FrozenBackbone, images: Tensor) -> Float[Tensor, "B C"]:
    """Logits of timm's own forward pass for images Float[B, 3, H, W], computed in canonical micro-batches."""
    with plain(backbone.device):
        batches = _batches(backbone, images, (micro_batch(backbone.device),))
        return torch.cat([backbone.backbone_logits(batch)[:count] for batch, count in batches])


def _batches(
    backbone: FrozenBackbone, images: Tensor, sizes: Sequence[int] | None
) -> Iterator[tuple[Tensor, int | None]]:
    """Splits images into micro-batches, padded with zeros to one of `sizes`; yields each with its number of images."""
    backbone.check_images(images)
    if is_traced():
        yield images, None
        return
    for chunk in images.detach().as_subclass(Tensor).split(micro_batch(backbone.device)):
        # Copied into one memory layout, because strides decide which kernel runs.
        shape = (batch_size(len(chunk), sizes), *chunk.shape[1:])
        batch = torch.zeros(shape, dtype=backbone.precision, device=backbone.device)
        batch[: len(chunk)] = chunk
        yield batch, len(chunk)


def _task_streams(
    backbone: FrozenBackbone,
    stream: Iterable[KeyValue],
    layout: Layout,
    observe: Observer | None = None,
    observe_attention: AttentionObserver | None = None,
) -> list[Float[Tensor, "S B D"]]:
    """Runs a frozen stream with all task streams of a layout; returns the features of each tile's slots."""
    hidden: list[Tensor] = []
    for layer, frozen in enumerate(stream):
        batch, num_heads, _, head_dim = frozen.keys.shape
        block = backbone.blocks[layer]
        if layer == 0:
            hidden = [tile.class_tokens.unsqueeze(1).repeat(1, batch, 1) for tile in layout.tiles]
            zeros = frozen.keys.new_zeros(batch, num_heads, 1 + len(layout.offered), head_dim)
            offered = KeyValue(zeros, zeros.clone())
        if layout.tiles:
            prefix = KeyValue(frozen.keys.contiguous(), frozen.values.contiguous())
        # Offered tokens are projected before any task attends: a child's tile may come before its parent's.
        updates = [tile.adapters(layer) for tile in layout.tiles]
        projected = {}
        for i, pairs in enumerate(layout.offers):
            if pairs:
                slots, rows = map(list, zip(*pairs, strict=True))
                projected[i] = backbone.family.project(block, hidden[i], updates[i])
                _, keys, values = projected[i]  # [S, H, B, d]
                offered.keys[:, :, rows] = keys[slots].permute(2, 1, 0, 3)
                offered.values[:, :, rows] = values[slots].permute(2, 1, 0, 3)
        for i, tile in enumerate(layout.tiles):
            if i not in projected:
                projected[i] = backbone.family.project(block, hidden[i], updates[i])
            queries, keys, values = projected.pop(i)
            visible = _visible_tokens(tile, KeyValue(keys, values), offered)
            attention = block.attn.scale, queries, prefix, visible, tile.memory(layer), tile.bias
            if observe_attention is not None:
                observe_attention(layer, i, attention_weights(*attention))
            hidden[i] = backbone.family.finish(block, hidden[i], attend(*attention), updates[i])
        if observe is not None:
            observe(layer, frozen, offered)
        if (pause := _PAUSE.get()) is not None:
            pause()
    return [backbone.final_norm(tokens) for tokens in hidden]


def _read_by_heads(
    backbone: FrozenBackbone, layout: Layout, tiles: Sequence[Tensor], heads: Iterable[str], pooled: Tensor | None
) -> dict[str, Float[Tensor, "B D"]]:
    """The rows that each head reads: of its task's slot, or those of the pooled feature."""
    slots = [head_rows(tokens, backbone).unbind(0) for tokens in tiles]
    features = {sha256: slots[tile][slot] for sha256, (tile, slot) in layout.slot.items()}
    if pooled is not None:
        features |= {sha256: pooled for sha256 in heads if sha256 not in features}
    return features


def _visible_tokens(tile: Tile, own: KeyValue, offered: KeyValue) -> KeyValue:
    """Keys and values of the task tokens that each slot sees in one layer: its own and its ancestors'."""
    visible = KeyValue(own.keys.unsqueeze(3), own.values.unsqueeze(3))  # [S, H, B, t, d]
    if tile.ancestors.shape[1]:
        ancestors = (tensor[:, :, tile.ancestors].permute(2, 1, 0, 3, 4) for tensor in offered)  # from [B, H, S, a, d]
        visible = KeyValue(*(torch.cat(pair, dim=3) for pair in zip(visible, ancestors, strict=True)))
    return visible


def attend(
    scale: float,
    queries: Float[Tensor, "S H B d"],
    frozen: KeyValue,  # [B, H, P, d], visible to every task
    tokens: KeyValue,  # tokens of the task and its ancestors, [S, H, B, t, d]
    memory: KeyValue,  # memory of the task and its ancestors, [S, H, m, d]; the same for all images
    bias: Float[Tensor, "S w"] | None = None,  # -inf for padding among the private keys; w = t + m
) -> Float[Tensor, "S B D"]:
    """Attention output of each task's query over its visible keys: the mask of the paper's Table 1, never built."""
    num_tasks, num_heads, batch, _ = queries.shape
    num_frozen = frozen.keys.shape[-2]
    weights = attention_weights(scale, queries, frozen, tokens, memory, bias)
    from_frozen = weights[..., :num_frozen].flatten(0, 1) @ frozen.values.flatten(0, 1)
    from_private = private_read(weights[..., num_frozen:].permute(2, 1, 0, 3), tokens, memory)
    # The order of these operands decides the memory layout of the sum: with this one, nothing is copied below.
    output: Tensor = from_private + from_frozen.unflatten(0, (batch, num_heads)).permute(2, 1, 0, 3)
    return output.transpose(1, 2).reshape(num_tasks, batch, -1)


def attention_weights(
    scale: float,
    queries: Float[Tensor, "S H B d"],
    frozen: KeyValue,
    tokens: KeyValue,
    memory: KeyValue,
    bias: Float[Tensor, "S w"] | None = None,
) -> Float[Tensor, "B H S K"]:
    """Softmax weights of each task's query over its K = P + w keys: the frozen ones, then the private ones."""
    _, num_heads, batch, _ = queries.shape
    queries = queries * scale
    by_image = queries.permute(2, 1, 0, 3).flatten(0, 1)  # [B H, S, d]: all tasks share an image's frozen keys
    on_frozen = by_image @ frozen.keys.flatten(0, 1).transpose(1, 2)
    private = (scores.permute(2, 1, 0, 3) for scores in private_scores(queries.contiguous(), tokens, memory))
    scores = torch.cat([on_frozen.unflatten(0, (batch, num_heads)), *private], dim=-1)
    if bias is not None:
        scores[..., -bias.shape[1] :].add_(bias)
    return scores.softmax(dim=-1)


def private_scores(
    queries: Float[Tensor, "S H B d"], tokens: KeyValue, memory: KeyValue
) -> tuple[Float[Tensor, "S H B t"], Float[Tensor, "S H B m"]]:
    """Scores of scaled queries for the private keys: of tokens and of memory."""
    return (queries.unsqueeze(-2) * tokens.keys).sum(-1), product(queries, memory.keys.transpose(-1, -2))


def private_read(weights: Float[Tensor, "S H B w"], tokens: KeyValue, memory: KeyValue) -> Float[Tensor, "S H B d"]:
    """Weighted sum of the private values."""
    on_tokens, on_memory = weights.tensor_split((tokens.values.shape[-2],), dim=-1)
    weighted = tokens.values * on_tokens.unsqueeze(-1)
    from_tokens = weighted.squeeze(-2) if weighted.shape[-2] == 1 else weighted.sum(-2)
    return from_tokens + product(on_memory, memory.values)


@uncompiled
def attention_map(
    backbone: FrozenBackbone, task: Task, images: Float[Tensor, "N 3 H W"]
) -> Float[Tensor, "N rows columns"]:
    """Attention weights of a task's class token over the patches in the last layer, averaged over heads.

    An image's map sums to less than 1: the softmax also covers the backbone's class token and registers, and the tokens
    and memory of the task and of the tasks that it extends.

    Args:
        backbone: the backbone that the task was learned on.
        task: the task, which is computed with only the tasks that it extends.
        images: images from the backbone's transform.

    Raises:
        RegistryError: the task is head-only, without a class token.
    """
    if task.class_token is None:
        raise RegistryError(
            f"Task {task.ref!r} is head-only: without class token there is no attention map. Choose a task with one."
        )
    layout = Layout(TileStore(backbone), [task], sizes=None)
    task_tile, slot = layout.slot[task.sha256]
    batches: list[Tensor] = []

    def observe_attention(layer: int, tile: int, weights: Float[Tensor, "N heads S K"]) -> None:
        if (layer, tile) == (backbone.depth - 1, task_tile):
            batches.append(weights[:, :, slot].float().mean(1))

    forward_pass(backbone, images, layout, observe_attention=observe_attention)
    rows, columns = backbone.grid_size
    patches = slice(backbone.num_tokens - rows * columns, backbone.num_tokens)
    maps: Tensor = torch.cat(batches)[:, patches].unflatten(-1, (rows, columns)).cpu()
    return maps
