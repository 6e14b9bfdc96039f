"""What the pages draw, as plain numbers: training curves, confusion matrices, the graph of who extends whom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        kind: `train` or `validation`, for the eye `other` where it is of a candidate that was not chosen.
        points: as SVG writes them.
    """

    kind: str
    points: str


@dataclass(frozen=True)
class Curves:
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
    order = sorted(range(count), key=lambda i: i == picked)
    losses = {
        (kind, i): [epoch[f"{kind}_loss"][i] for epoch in epochs] for i in order for kind in ("train", "validation")
    }
    telling = [series for (_, i), series in losses.items() if picked in (None, i)]
    ceiling = max((value for series in telling for value in series if value is not None), default=0) or 1
    step = _round_step(ceiling / 4)
    most = step * math.ceil(ceiling / step)

    def x(epoch: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / max(1, len(epochs) - 1), 1)

    def y(loss: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(loss, most) / most), 1)

    lines = [
        Line(
            kind if picked in (None, i) else "other",
            " ".join(f"{x(n)},{y(value)}" for n, value in enumerate(series, 1) if value is not None),
        )
        for (kind, i), series in losses.items()
    ]
    every = max(1, math.ceil(_round_step(len(epochs) / 6)))
    named = [1, *range(every, len(epochs) + 1, every)] if every > 1 else range(1, len(epochs) + 1)
    epoch = chosen["epoch"] if picked is not None and chosen else None
    return Curves(
        lines=tuple(lines),
        across=tuple((x(n), str(n)) for n in named),
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
    """Images of some true and some predicted classes.

    Attributes:
        level: 0 to 10, their share of the true classes' images.
        right: whether it lies on the diagonal.
    """

    row: int
    column: int
    count: int
    level: int
    right: bool


@dataclass(frozen=True)
class Confusion:
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
    counts = scores.get("confusion")
    if not counts or len(counts) != len(labels):
        return None
    totals = [sum(row) for row in counts]
    wrong = [
        (labels[i], labels[j], count, count / totals[i])
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if count and i != j
    ]
    wrong.sort(key=lambda pair: (-pair[2], -pair[3]))
    few = len(labels) <= TABLE
    num_bins = min(len(labels), BINS)
    cells = tuple(_binned(counts, num_bins))
    rows = tuple(tuple(cells[i * num_bins : (i + 1) * num_bins]) for i in range(num_bins)) if few else ()
    drawn = () if few else tuple(cell for cell in cells if cell.count)
    return Confusion(tuple(labels), rows, drawn, num_bins, tuple(wrong[:PAIRS]))


def _binned(counts: Sequence[Sequence[int]], num_bins: int) -> Iterator[Cell]:
    """All cells, row by row."""
    place = [i * num_bins // len(counts) for i in range(len(counts))]
    sums = [[0] * num_bins for _ in range(num_bins)]
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            sums[place[i]][place[j]] += count
    for i, row in enumerate(sums):
        total = sum(row)
        for j, count in enumerate(row):
            yield Cell(i, j, count, math.ceil(10 * count / total) if total else 0, i == j)


@dataclass(frozen=True)
class ClassScore:
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


@dataclass(frozen=True)
class Node:
    """A task in a graph; without a reference it stands for `left_out` more."""

    ref: str | None
    x: float
    y: float
    retired: bool = False
    own: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class Graph:
    """What a task extends, to its left, and what extends it, to its right; edges as SVG paths."""

    nodes: tuple[Node, ...]
    edges: tuple[str, ...]
    width: float
    height: float


def graph(lineage: Lineage) -> Graph | None:
    """The graph of a task's family; None where it has none."""
    levels = {lineage.extends.ref: 0}
    retired: dict[str, bool] = {}
    edges: dict[tuple[str, str], None] = {}
    left_out: dict[int, int] = {}
    for root, side in ((lineage.extends, -1), (lineage.extended_by, 1)):
        found = list(_walk(root))
        retired |= {kin.ref: kin.retired for kin in found}
        steps = [(kin.ref, one.ref) for kin in found for one in kin.kin]
        edges |= dict.fromkeys((there, here) if side < 0 else (here, there) for here, there in steps)
        moved = True
        while moved:  # a task stands beyond all that lead to it
            moved = False
            for here, there in steps:
                if here in levels and levels.get(there, 0) * side <= levels[here] * side:
                    levels[there], moved = levels[here] + side, True
        for kin in found:
            if kin.left_out:
                left_out[levels[kin.ref] + side] = left_out.get(levels[kin.ref] + side, 0) + kin.left_out
    if not edges and not left_out:
        return None
    columns: dict[int, list[str]] = {level: [] for level in {*levels.values(), *left_out}}
    for ref, level in levels.items():
        if len(columns[level]) < IN_LEVEL:
            columns[level].append(ref)
        else:
            left_out[level] = left_out.get(level, 0) + 1
    tallest = max(len(refs) + (level in left_out) for level, refs in columns.items())
    height = tallest * (NODE_HEIGHT + GAP_Y) + GAP_Y
    nodes: dict[str | int, Node] = {}
    for place, level in enumerate(sorted(columns)):
        inside: list[str | int] = [*columns[level], *([level] if level in left_out else [])]
        start = (height - len(inside) * (NODE_HEIGHT + GAP_Y) + GAP_Y) / 2
        for i, key in enumerate(inside):
            x, y = GAP_Y + place * (NODE_WIDTH + GAP_X), start + i * (NODE_HEIGHT + GAP_Y)
            if isinstance(key, str):
                nodes[key] = Node(key, x, y, retired[key], own=key == lineage.extends.ref)
            else:
                nodes[key] = Node(None, x, y, left_out=left_out[key])
    width = len(columns) * (NODE_WIDTH + GAP_X) - GAP_X + 2 * GAP_Y
    drawn = [_edge(nodes[one], nodes[other]) for one, other in edges if one in nodes and other in nodes]
    return Graph(tuple(nodes.values()), tuple(drawn), width, height)


def _walk(kin: Kin) -> Iterator[Kin]:
    yield kin
    for one in kin.kin:
        yield from _walk(one)


def _edge(one: Node, other: Node) -> str:
    """From the right of what is extended to the left of what extends it."""
    x, y, end, down = one.x + NODE_WIDTH, one.y + NODE_HEIGHT / 2, other.x, other.y + NODE_HEIGHT / 2
    bend = (x + end) / 2
    return f"M{x:g},{y:g} C{bend:g},{y:g} {bend:g},{down:g} {end:g},{down:g}"
