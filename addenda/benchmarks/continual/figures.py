"""The pictures of a report: accuracy matrices as heat maps, and accuracy as a stream goes on. PNG, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from addenda.benchmarks.continual.results import Cell
from addenda.benchmarks.continual.summary import OURS, Spread

Scheme = Literal["light", "dark"]
SCHEMES: Mapping[Scheme, Mapping[str, str]] = {
    "light": {"paper": "#ffffff", "ink": "#1c2126", "faint": "#d5dade"},
    "dark": {"paper": "#171b1f", "ink": "#e3e7ea", "faint": "#3a4148"},
}
HUES = ("#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
"""Okabe and Ito's, told apart by colour-blind people too; their green is ours alone."""

OURS_HUE, MARKS, STROKES = "#009e73", "sD^vPX*", ("-", "--", ":")
SLANTED: Mapping[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "parse_math": False}
SCALE = "viridis"
CSS_DPI, SHARPNESS = 100, 2
LONGEST_NAME = 16


class Picture(NamedTuple):
    """A PNG and the width in CSS pixels at which it is meant to be seen."""

    png: bytes
    width: int


def mean_matrix(cells: Sequence[Cell], setting: Literal["told", "untold"]) -> list[list[float | None]]:
    """The mean accuracy matrix over seeds; None where no seed has one."""
    stages = range(len(cells[0].told))
    spreads = [[Spread.of(getattr(cell, setting)[i][j] for cell in cells) for j in stages] for i in stages]
    return [[spread and spread.mean for spread in row] for row in spreads]


def accuracy_so_far(cells: Sequence[Cell]) -> list[Spread | None]:
    """Untold accuracy after each experience, in the mean over all that were met; None where nothing was answered."""
    seen = [[Spread.of(row[: i + 1]) for i, row in enumerate(cell.untold)] for cell in cells]
    return [Spread.of(spread and spread.mean for spread in stage) for stage in zip(*seen, strict=True)]


def heat_map(matrix: Sequence[Sequence[float | None]], names: Sequence[str], scheme: Scheme) -> Picture:
    """An accuracy matrix, values in percent written in its cells; italic: before the experience was learned."""
    many, short = len(names), [_short(name) for name in names]
    side = 0.46 * many + 0.6 + 0.08 * max(map(len, short))
    with _drawing(scheme, (max(2.6, side), max(2.3, side))) as (figure, axes):
        shades = matplotlib.colormaps[SCALE]
        values = [[float("nan") if value is None else 100 * value for value in row] for row in matrix]
        axes.imshow(values, cmap=shades, vmin=0, vmax=100)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                if value is not None:
                    slant = "italic" if j > i else "normal"
                    ink = "#ffffff" if value < 0.48 else "#10151a"
                    axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", size=8.5, color=ink, style=slant)
        axes.set_xticks(range(many), short, **SLANTED)
        axes.set_yticks(range(many), short, parse_math=False)
        axes.set(xlabel="tested on", ylabel="after learning")
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        return _picture(figure)


def scale(scheme: Scheme) -> Picture:
    """What the colours of all heat maps stand for."""
    with _drawing(scheme, (3.2, 0.55)) as (figure, axes):
        axes.imshow([list(range(101))], cmap=SCALE, aspect="auto", extent=(0, 100, 0, 1))
        axes.set(yticks=[], xlabel="accuracy, %")
        axes.tick_params(length=2, labelsize=8)
        axes.xaxis.label.set_fontsize(9)
        axes.spines[:].set_visible(False)
        return _picture(figure)


def curves(
    lines: Mapping[str, tuple[str, Sequence[Spread | None]]], names: Sequence[str], scheme: Scheme, narrow: bool = False
) -> Picture:
    """Accuracy on everything met so far: a line for each method and a band of its spread over seeds.

    Args:
        lines: by the method's name, what people call it and its accuracy after each experience.
        names: of the experiences.
        scheme: of colours.
        narrow: for a phone: lines are named below the axes instead of at their ends.
    """
    height = max(4.2, 1.2 + 0.27 * len(lines))
    with _drawing(scheme, (3.7, 3.4 + 0.23 * len(lines)) if narrow else (7.4, height)) as (figure, axes):
        stages, last = range(1, len(names) + 1), len(names)
        ends = []
        for name, style in _styles(lines).items():
            label, found = lines[name]
            answered = [(stage, spread) for stage, spread in zip(stages, found, strict=True) if spread is not None]
            at = [stage for stage, _ in answered]
            means = [100 * spread.mean for _, spread in answered]
            edges = [100 * (spread.deviation or 0) for _, spread in answered]
            low, high = ([m + side * e for m, e in zip(means, edges, strict=True)] for side in (-1, 1))
            axes.plot(at, means, markersize=5, label=_short(label, 34), **style)
            axes.fill_between(at, low, high, color=style["color"], alpha=0.16, linewidth=0)
            ends.append((means[-1], label, style["color"]))
        axes.set(
            ylim=(0, 103),
            xlim=(0.95 - 0.03 * last, 1.03 * last + 0.05),
            ylabel="accuracy, task untold, %",
            xlabel="after learning",
        )
        shown = names if not narrow or last <= 6 else ["" if i % 2 else name for i, name in enumerate(names)]
        axes.set_xticks(stages, map(_short, shown), **SLANTED)
        axes.grid(axis="y", color=SCHEMES[scheme]["faint"], linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if narrow:
            for text in figure.legend(loc="outside lower left", frameon=False, fontsize=9).get_texts():
                text.set_parse_math(False)
            return _picture(figure)
        gap = 103 * 0.19 / (height - 1)  # of a line of text, in points of accuracy
        for place, (value, label, hue) in zip(_apart([end[0] for end in ends], gap), ends, strict=True):
            leader = {"arrowstyle": "-", "color": hue, "linewidth": 1.2, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 5}
            axes.annotate(_short(label, 28), (last, value), (1.07, place), textcoords=axes.get_yaxis_transform(),
                          va="center", annotation_clip=False, parse_math=False, arrowprops=leader)  # fmt: skip
        return _picture(figure)


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Hue, stroke and mark of each method's line; ours is the widest, and green."""
    others = [name for name in names if name != OURS]
    styles = {
        name: {"color": HUES[i % len(HUES)], "linestyle": STROKES[i // len(HUES) % len(STROKES)],
               "marker": MARKS[i % len(MARKS)], "linewidth": 1.6}
        for i, name in enumerate(others)
    }  # fmt: skip
    ours = {"color": OURS_HUE, "marker": "o", "linewidth": 2.8, "zorder": 3}
    return {name: styles.get(name, ours) for name in names}


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels near their values, in the same order and at least `gap` apart, none below zero."""
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []

    def low(group: list[int]) -> float:
        return max(0.0, sum(values[i] for i in group) / len(group) - gap * (len(group) - 1) / 2)

    for i in order:
        groups.append([i])
        while len(groups) > 1 and low(groups[-1]) < low(groups[-2]) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    places = {i: low(group) + gap * k for group in groups for k, i in enumerate(group)}
    return [places[i] for i in range(len(values))]


def _short(name: str, longest: int = LONGEST_NAME) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


@contextmanager
def _drawing(scheme: Scheme, inches: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """A figure of its own, without pyplot's windows and state, in a scheme's colours."""
    paper, ink = SCHEMES[scheme]["paper"], SCHEMES[scheme]["ink"]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with matplotlib.rc_context(
        {**colours, "figure.facecolor": paper, "axes.facecolor": paper, "font.size": 10, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=inches, dpi=CSS_DPI * SHARPNESS, layout="constrained")
        yield figure, figure.add_subplot()


def _picture(figure: Figure) -> Picture:
    drawn, png = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png")
    # A palette makes it a third as large: a page holds two for each method and setting.
    Image.open(drawn).convert("RGB").quantize(256).save(png, "png", optimize=True)
    return Picture(png.getvalue(), round(figure.get_figwidth() * CSS_DPI))
