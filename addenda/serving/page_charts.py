"""What the pages draw, as plain numbers: training curves, confusion matrices, the graph of who extends whom."""

from __future__ import annotations

import math
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
    """The losses of a training run over its epochs.

    Attributes:
        lines: the chosen candidate's last, so that they lie on top.
        across: epochs to name, and where they stand.
        up: losses to name, and where they stand.
        best: where the chosen epoch stands; None where the regression was better.
        epoch: the chosen epoch.
        num_candidates: how many there were.
    """

    lines: tuple[Line, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    best: float | None
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
    epoch = chosen["epoch"] if picked is not None and chosen else None
    return Curves(
        lines=tuple(lines),
        across=tuple((x(n), str(n)) for n in dict.fromkeys((1, *range(every, len(epochs) + 1, every)))),
        up=tuple((y(step * n), f"{step * n:.4g}") for n in range(round(most / step) + 1)),
        best=None if epoch is None else x(epoch),
        epoch=epoch,
        num_candidates=count,
    )


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not less."""
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


@dataclass(frozen=True)
class Cell:
    """Images of some true and some predicted classes; `level`, 0 to 10, is their share of the true classes' images."""

    row: int
    column: int
    count: int
    level: int
    right: bool


class Confusion(NamedTuple):
    """A confusion matrix, in numbers or to be drawn.

    Attributes:
        labels: the classes.
        rows: every cell, where there are few classes.
        drawn: the cells that are not empty, where there are many.
        num_bins: rows and columns of what is drawn.
        pairs: what is taken for something else most often: true label, predicted label, images, share of the true's.
    """

    labels: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    drawn: tuple[Cell, ...]
    num_bins: int
    pairs: tuple[tuple[str, str, int, float], ...]


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
    rows = tuple(
        tuple(Cell(i, j, n, math.ceil(10 * n / (sum(row) or 1)), i == j) for j, n in enumerate(row))
        for i, row in enumerate(sums)
    )
    few = len(labels) <= TABLE
    drawn = () if few else tuple(cell for row in rows for cell in row if cell.count)
    return Confusion(tuple(labels), rows if few else (), drawn, num_bins, tuple(wrong[:PAIRS]))


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
    retired: bool = False
    own: bool = False
    left_out: int = 0


class Graph(NamedTuple):
    """What a task extends, to its left, and what extends it, to its right; edges as SVG paths."""

    nodes: tuple[Node, ...]
    edges: tuple[str, ...]
    width: float
    height: float


def graph(lineage: Lineage) -> Graph | None:
    """The graph of a task's family; None where it has none."""
    own = lineage.extends.ref
    levels, kin_of, edges = {own: 0}, {own: lineage.extends}, dict[tuple[str, str], None]()
    left_out: dict[int, int] = {}
    for root, side in ((lineage.extends, -1), (lineage.extended_by, 1)):
        found = list(_walk(root))
        nearer: dict[str, set[str]] = {}
        for here, there in ((kin.ref, one.ref) for kin in found for one in kin.kin):
            nearer.setdefault(there, set()).add(here)
            edges[(there, here) if side < 0 else (here, there)] = None
        kin_of |= {kin.ref: kin for kin in found}
        far = {own: 0}
        for ref in TopologicalSorter(nearer).static_order():  # a task stands beyond all that lead to it
            far[ref] = max((far[one] + 1 for one in nearer.get(ref, ())), default=0)
        levels |= {ref: side * far[ref] for ref in nearer}
        for kin in found:
            if kin.left_out:
                level = levels[kin.ref] + side
                left_out[level] = left_out.get(level, 0) + kin.left_out
    if not edges and not left_out:
        return None
    columns: dict[int, list[str]] = {level: [] for level in sorted({*levels.values(), *left_out})}
    for ref, level in levels.items():
        if len(columns[level]) < IN_LEVEL:
            columns[level].append(ref)
        else:
            left_out[level] = left_out.get(level, 0) + 1
    height = max(len(refs) + (level in left_out) for level, refs in columns.items()) * (NODE_HEIGHT + GAP_Y) + GAP_Y
    nodes: list[Node] = []
    for place, (level, refs) in enumerate(columns.items()):
        x = GAP_Y + place * (NODE_WIDTH + GAP_X)
        y = (height - (len(refs) + (level in left_out)) * (NODE_HEIGHT + GAP_Y) + GAP_Y) / 2
        for ref in refs:
            nodes.append(Node(ref, x, y, kin_of[ref].retired, own=ref == own))
            y += NODE_HEIGHT + GAP_Y
        if level in left_out:
            nodes.append(Node(None, x, y, left_out=left_out[level]))
    width = len(columns) * (NODE_WIDTH + GAP_X) - GAP_X + 2 * GAP_Y
    drawn = {node.ref: node for node in nodes if node.ref is not None}
    paths = [_edge(drawn[one], drawn[other]) for one, other in edges if one in drawn and other in drawn]
    return Graph(tuple(nodes), tuple(paths), width, height)


def _walk(kin: Kin) -> Iterator[Kin]:
    yield kin
    for one in kin.kin:
        yield from _walk(one)


def _edge(one: Node, other: Node) -> str:
    """From the right of what is extended to the left of what extends it."""
    x, y, end, down = one.x + NODE_WIDTH, one.y + NODE_HEIGHT / 2, other.x, other.y + NODE_HEIGHT / 2
    bend = (x + end) / 2
    return f"M{x:g},{y:g} C{bend:g},{y:g} {bend:g},{down:g} {end:g},{down:g}"
