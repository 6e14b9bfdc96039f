"""What the pages draw, as plain numbers: training curves, confusion matrices, the graph of who extends whom."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

import numpy as np

from addenda.registry import Kin, Lineage

WIDTH, HEIGHT = 640, 260
LEFT, TOP, RIGHT, BOTTOM = 52, 12, 12, 34
"""Of a chart, and what its axes need of it."""

TABLE = 20
"""Classes of the largest confusion matrix that is shown in numbers; a larger one is drawn."""
BINS = 100
"""Rows and columns of a drawn one; of more classes, neighbours share a cell."""
PAIRS = 10

NODE_WIDTH, NODE_HEIGHT, GAP_X, GAP_Y = 184, 32, 56, 12
IN_LEVEL = 12
"""Tasks of one level of a graph that are drawn."""


class Line(NamedTuple):
    """A curve: `train`, `validation`, or `other` where it is of a candidate not chosen; its points as SVG has them."""

    kind: str
    points: str


class Curves(NamedTuple):
    """The losses of a training run over its epochs."""

    lines: list[Line]  # the chosen candidate's last, so that they lie on top
    across: list[tuple[float, str]]  # epochs to name, and where they stand
    up: list[tuple[float, str]]  # losses to name, and where they stand
    best: float | None  # where the chosen epoch stands; None where no token was taken
    epoch: int | None
    num_candidates: int


def curves(metrics: Mapping[str, Any]) -> Curves | None:
    """The curves of a task's record; None where it was not trained by epochs."""
    epochs, chosen = metrics.get("curves") or [], metrics.get("chosen")
    if not epochs:
        return None
    rows = metrics.get("candidates") or []
    count = len(epochs[0]["train_loss"])
    picked = next((i for i, row in enumerate(rows) if chosen and chosen.items() <= row.items()), None)
    losses = [
        (kind if picked in (None, i) else "other", [epoch[f"{kind}_loss"][i] for epoch in epochs])
        for i in sorted(range(count), key=lambda i: i == picked)
        for kind in ("train", "validation")
    ]
    known = (loss for kind, series in losses if kind != "other" for loss in series if loss is not None)
    ceiling = max(known, default=0) or 1
    step = _round_step(ceiling / 4)
    most = step * math.ceil(ceiling / step)

    def x(epoch: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / max(1, len(epochs) - 1), 1)

    def y(loss: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(loss, most) / most), 1)

    lines = [
        Line(kind, " ".join(f"{x(n)},{y(loss)}" for n, loss in enumerate(series, 1) if loss is not None))
        for kind, series in losses
    ]
    every = math.ceil(_round_step(len(epochs) / 6))
    across = [(x(n), str(n)) for n in dict.fromkeys((1, *range(every, len(epochs) + 1, every)))]
    up = [(y(step * n), f"{step * n:.4g}") for n in range(round(most / step) + 1)]
    epoch = chosen["epoch"] if picked is not None and chosen else None
    return Curves(lines, across, up, None if epoch is None else x(epoch), epoch, count)


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not less."""
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class ConfusionCell:
    """Images of some true and some predicted classes; `level`, 0 to 10, is their share of the true classes' images."""

    row: int
    column: int
    count: int
    level: int
    right: bool


class Confusion(NamedTuple):
    """A confusion matrix, in numbers or to be drawn."""

    labels: Sequence[str]
    in_numbers: bool
    rows: list[list[ConfusionCell]]
    pairs: Sequence[tuple[str, str, int, float]]
    """What is taken for something else most often: true label, predicted label, images, share of the true's."""


def confusion(scores: Mapping[str, Any], labels: Sequence[str]) -> Confusion | None:
    """The matrix of some scores; None where they have none."""
    counts = np.array(scores.get("confusion") or (), dtype=np.int64)
    if not labels or len(counts) != len(labels):
        return None
    totals = counts.sum(axis=1).tolist()
    wrong = [
        (labels[i], labels[j], int(counts[i, j]), int(counts[i, j]) / totals[i])
        for i, j in np.argwhere(counts).tolist()
        if i != j
    ]
    wrong.sort(key=lambda pair: (-pair[2], -pair[3]))
    num_bins = min(len(labels), BINS)
    starts = [-(-number * len(labels) // num_bins) for number in range(num_bins)]
    sums = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1).tolist()
    rows = [
        [ConfusionCell(i, j, n, math.ceil(10 * n / (sum(row) or 1)), i == j) for j, n in enumerate(row)]
        for i, row in enumerate(sums)
    ]
    return Confusion(labels, len(labels) <= TABLE, rows, tuple(wrong[:PAIRS]))


class ClassScore(NamedTuple):
    """How well a task knows one class: images of it that were scored (None where that is not known), and its score."""

    label: str
    num_images: int | None
    score: float | None


def per_class(scores: Mapping[str, Any], labels: Sequence[str]) -> list[ClassScore]:
    """The classes of some scores, the worst first; none where they tell nothing of classes."""
    known = scores.get("per_class") or {}
    counts = scores.get("confusion")
    totals = [sum(row) for row in counts] if counts else [None] * len(labels)
    found = [
        ClassScore(label, total, known.get(label) if total != 0 else None)
        for label, total in zip(labels, totals, strict=True)
        if label in known
    ]
    return sorted(found, key=lambda one: (one.score is None, one.score))


class Node(NamedTuple):
    """A task in a graph; without a reference it stands for `left_out` more."""

    ref: str | None
    x: float
    y: float
    retired: bool
    own: bool
    left_out: int


class Graph(NamedTuple):
    """What a task extends, to its left, and what extends it, to its right; edges as SVG paths."""

    nodes: list[Node]
    edges: list[str]
    width: float
    height: float


def graph(lineage: Lineage) -> Graph | None:
    """The graph of a task's family; None where it has none."""
    own = lineage.extends.ref
    levels, left_out, retired, edges = {own: 0}, Counter[int](), set[str](), dict[tuple[str, str], None]()
    for root, side in ((lineage.extends, -1), (lineage.extended_by, 1)):
        found, nearer = list(_walk(root)), defaultdict[str, set[str]](set)
        for here, there in ((kin.ref, one.ref) for kin in found for one in kin.kin):
            nearer[there].add(here)
            edges[(there, here) if side < 0 else (here, there)] = None
        retired |= {kin.ref for kin in found if kin.retired}
        far = {own: 0}
        for ref in TopologicalSorter(nearer).static_order():  # a task stands beyond all that lead to it
            far[ref] = max((far[one] + 1 for one in nearer.get(ref, ())), default=0)
        levels |= {ref: side * far[ref] for ref in nearer}
        for kin in found:
            if kin.left_out:
                left_out[levels[kin.ref] + side] += kin.left_out
    if not edges and not left_out:
        return None
    columns: list[list[tuple[str | None, int]]] = []
    for level in sorted({*levels.values(), *left_out}):
        refs = [ref for ref, at in levels.items() if at == level]
        more = left_out[level] + len(refs[IN_LEVEL:])
        columns.append([*((ref, 0) for ref in refs[:IN_LEVEL]), *([(None, more)] if more else [])])
    row_height = NODE_HEIGHT + GAP_Y
    height = max(map(len, columns)) * row_height + GAP_Y
    nodes = [
        Node(
            ref,
            x=GAP_Y + place * (NODE_WIDTH + GAP_X),
            y=(height - len(column) * row_height + GAP_Y) / 2 + row * row_height,
            retired=ref in retired,
            own=ref == own,
            left_out=more,
        )
        for place, column in enumerate(columns)
        for row, (ref, more) in enumerate(column)
    ]
    drawn = {node.ref: node for node in nodes}
    paths = [_edge(drawn[one], drawn[other]) for one, other in edges if one in drawn and other in drawn]
    return Graph(nodes, paths, len(columns) * (NODE_WIDTH + GAP_X) - GAP_X + 2 * GAP_Y, height)


def _walk(kin: Kin) -> Iterator[Kin]:
    yield kin
    for one in kin.kin:
        yield from _walk(one)


def _edge(one: Node, other: Node) -> str:
    """From the right of what is extended to the left of what extends it."""
    x, y, end, down = one.x + NODE_WIDTH, one.y + NODE_HEIGHT / 2, other.x, other.y + NODE_HEIGHT / 2
    bend = (x + end) / 2
    return f"M{x:g},{y:g} C{bend:g},{y:g} {bend:g},{down:g} {end:g},{down:g}"
