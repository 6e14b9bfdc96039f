"""Data for the pages' charts: training curves, confusion matrices and lineage graphs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

import numpy as np

from addenda.registry import Kin, Lineage

WIDTH, HEIGHT = 640, 260
LEFT, TOP, RIGHT, BOTTOM = 52, 12, 12, 34
"""Size of a chart and its margins, in SVG units."""

MAX_TABLE_CLASSES = 20
"""Confusion matrices of up to this many classes are shown as a table, larger ones as an image."""
BINS = 100
"""Rows and columns of the image; with more classes, neighbouring ones are merged."""
MAX_PAIRS = 10

NODE_WIDTH, NODE_HEIGHT, GAP_X, GAP_Y = 184, 32, 56, 12
MAX_PER_LEVEL = 12
"""Maximum number of tasks drawn in one level of a graph."""


class Curves(NamedTuple):
    """The loss curves of a training run; a line's kind is `train`, `validation`, or `other` if it was not selected."""

    lines: list[tuple[str, str]]  # kind and SVG points; the selected candidate's last, so that they are drawn on top
    x_ticks: list[tuple[float, str]]  # x and epoch
    y_ticks: list[tuple[float, str]]  # y and loss
    best: float | None  # x of the selected epoch; None if no class token was selected
    epoch: int | None
    num_candidates: int


def curves(metrics: Mapping[str, Any]) -> Curves | None:
    """The curves from a task's metrics, or None if it was not trained in epochs."""
    epochs, chosen = metrics.get("curves") or [], metrics.get("chosen")
    if not epochs:
        return None
    rows = metrics.get("candidates") or []
    num_candidates = len(epochs[0]["train_loss"])
    selected = next((i for i, row in enumerate(rows) if chosen and chosen.items() <= row.items()), None)
    losses = [
        (kind if selected in (None, i) else "other", [epoch[f"{kind}_loss"][i] for epoch in epochs])
        for i in sorted(range(num_candidates), key=lambda i: i == selected)
        for kind in ("train", "validation")
    ]
    drawn = (loss for kind, series in losses if kind != "other" for loss in series if loss is not None)
    max_loss = max(drawn, default=0) or 1
    step = _round_step(max_loss / 4)
    y_max = step * math.ceil(max_loss / step)

    def x(epoch: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / max(1, len(epochs) - 1), 1)

    def y(loss: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(loss, y_max) / y_max), 1)

    lines = [
        (kind, " ".join(f"{x(n)},{y(loss)}" for n, loss in enumerate(series, 1) if loss is not None))
        for kind, series in losses
    ]
    x_step = math.ceil(_round_step(len(epochs) / 6))
    x_ticks = [(x(n), str(n)) for n in dict.fromkeys((1, *range(x_step, len(epochs) + 1, x_step)))]
    y_ticks = [(y(step * n), f"{step * n:.4g}") for n in range(round(y_max / step) + 1)]
    epoch = chosen["epoch"] if selected is not None and chosen else None
    return Curves(lines, x_ticks, y_ticks, None if epoch is None else x(epoch), epoch, num_candidates)


def _round_step(minimum: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not less than `minimum`."""
    power: float = 10.0 ** math.floor(math.log10(minimum))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= minimum * (1 - 1e-9))


class Confusion(NamedTuple):
    """A confusion matrix, to be shown as a table or as an image."""

    labels: Sequence[str]
    as_table: bool
    rows: list[list[tuple[int, int]]]  # of each cell the number of images, and 0 to 10 for its share of the row's
    pairs: Sequence[tuple[str, str, int, float]]
    """The most frequent confusions: true label, predicted label, number of images, share of the true label's images."""


def confusion(scores: Mapping[str, Any], labels: Sequence[str]) -> Confusion | None:
    """The confusion matrix of an evaluation, or None if it has none."""
    counts = np.array(scores.get("confusion") or (), dtype=np.int64)
    if not labels or len(counts) != len(labels):
        return None
    totals = counts.sum(axis=1).tolist()
    confusions = [
        (labels[i], labels[j], int(counts[i, j]), int(counts[i, j]) / totals[i])
        for i, j in np.argwhere(counts).tolist()
        if i != j
    ]
    confusions.sort(key=lambda pair: (-pair[2], -pair[3]))
    num_bins = min(len(labels), BINS)
    starts = [-(-number * len(labels) // num_bins) for number in range(num_bins)]
    sums = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1).tolist()
    rows = [[(count, math.ceil(10 * count / (sum(row) or 1))) for count in row] for row in sums]
    return Confusion(labels, len(labels) <= MAX_TABLE_CLASSES, rows, tuple(confusions[:MAX_PAIRS]))


def per_class(scores: Mapping[str, Any], labels: Sequence[str]) -> list[tuple[str, int | None, float | None]]:
    """Label, number of evaluated images and score of each class, worst first, None where unknown; empty without."""
    by_label, counts = scores.get("per_class") or {}, scores.get("confusion")
    totals = [sum(row) for row in counts] if counts else [None] * len(labels)
    classes = [
        (label, total, by_label[label] if total != 0 else None)
        for label, total in zip(labels, totals, strict=True)
        if label in by_label
    ]
    return sorted(classes, key=lambda each: (each[2] is None, each[2]))


class Node(NamedTuple):
    """A task in a graph; without a reference it stands for `num_omitted` further tasks."""

    ref: str | None
    x: float
    y: float
    retired: bool
    is_current: bool
    num_omitted: int


class Graph(NamedTuple):
    """A task, what it extends (to its left) and what extends it (to its right); edges are SVG paths."""

    nodes: list[Node]
    edges: list[str]
    width: float
    height: float


def graph(lineage: Lineage) -> Graph | None:
    """The lineage graph of a task, or None if it extends nothing and nothing extends it."""
    current = lineage.extends.ref
    levels, omitted, retired, edges = {current: 0}, Counter[int](), set[str](), dict[tuple[str, str], None]()
    for root, side in ((lineage.extends, -1), (lineage.extended_by, 1)):
        relatives, nearer = list(_walk(root)), defaultdict[str, set[str]](set)
        for near, far in ((kin.ref, relative.ref) for kin in relatives for relative in kin.kin):
            nearer[far].add(near)
            edges[(far, near) if side < 0 else (near, far)] = None
        retired |= {kin.ref for kin in relatives if kin.retired}
        distances = {current: 0}
        for ref in TopologicalSorter(nearer).static_order():  # a task is farther out than all that lead to it
            distances[ref] = max((distances[near] + 1 for near in nearer.get(ref, ())), default=0)
        levels |= {ref: side * distances[ref] for ref in nearer}
        for kin in relatives:
            if kin.left_out:
                omitted[levels[kin.ref] + side] += kin.left_out
    if not edges and not omitted:
        return None
    columns: list[list[tuple[str | None, int]]] = []
    for level in sorted({*levels.values(), *omitted}):
        refs = [ref for ref, ref_level in levels.items() if ref_level == level]
        num_omitted = omitted[level] + len(refs[MAX_PER_LEVEL:])
        columns.append([*((ref, 0) for ref in refs[:MAX_PER_LEVEL]), *([(None, num_omitted)] if num_omitted else [])])
    row_height = NODE_HEIGHT + GAP_Y
    height = max(map(len, columns)) * row_height + GAP_Y
    nodes = [
        Node(
            ref,
            x=GAP_Y + index * (NODE_WIDTH + GAP_X),
            y=(height - len(column) * row_height + GAP_Y) / 2 + row * row_height,
            retired=ref in retired,
            is_current=ref == current,
            num_omitted=num_omitted,
        )
        for index, column in enumerate(columns)
        for row, (ref, num_omitted) in enumerate(column)
    ]
    drawn = {node.ref: node for node in nodes}
    paths = [_edge(drawn[parent], drawn[child]) for parent, child in edges if parent in drawn and child in drawn]
    return Graph(nodes, paths, len(columns) * (NODE_WIDTH + GAP_X) - GAP_X + 2 * GAP_Y, height)


def _walk(kin: Kin) -> Iterator[Kin]:
    yield kin
    for relative in kin.kin:
        yield from _walk(relative)


def _edge(parent: Node, child: Node) -> str:
    """An SVG path from the right side of a task to the left side of one that extends it."""
    x1, y1, x2, y2 = parent.x + NODE_WIDTH, parent.y + NODE_HEIGHT / 2, child.x, child.y + NODE_HEIGHT / 2
    middle = (x1 + x2) / 2
    return f"M{x1:g},{y1:g} C{middle:g},{y1:g} {middle:g},{y2:g} {x2:g},{y2:g}"
