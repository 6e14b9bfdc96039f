"""The plots of all reports: accuracy matrices and curves of a stream, cost, training and the paper comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.isotonic import isotonic_regression

from addenda.benchmarks.report.tables import Spread
from addenda.terminal import size

Scheme = Literal["light", "dark"]
SCHEMES: Mapping[Scheme, Mapping[str, str]] = {
    "light": {"paper": "#ffffff", "ink": "#1c2126", "faint": "#d5dade"},
    "dark": {"paper": "#171b1f", "ink": "#e3e7ea", "faint": "#3a4148"},
}
# The colour-blind-safe palette of Okabe and Ito; its green is reserved for our method.
HUES = ("#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
# Colours of the plots of cost, training and the paper.
INKS, FAINT = ("#0b6e4f", "#c1666b", "#4059ad", "#b8860b", "#8d3b72", "#555555"), "#bbbbbb"
MARKS, STROKES = "sD^vPX*", ("-", "--", ":")
OURS_STYLE: Mapping[str, Any] = {"color": "#009e73", "marker": "o", "linewidth": 2.8, "zorder": 3}
SLANTED: Mapping[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "parse_math": False}
SCALE = "viridis"
CSS_DPI, SHARPNESS = 100, 2


class Picture(NamedTuple):
    """A PNG and its display width in CSS pixels."""

    png: bytes
    width: int


def heat_map(matrix: Sequence[Sequence[float | None]], names: Sequence[str], scheme: Scheme) -> Picture:
    """An accuracy matrix with the values in percent; italic values are from before the experience was learned."""
    count, short = len(names), [_short(name) for name in names]
    side = 0.46 * count + 0.6 + 0.08 * max(map(len, short))
    with _drawing(scheme, (max(2.6, side), max(2.3, side))) as (figure, axes):
        values = 100 * np.array(matrix, dtype=float)  # None becomes NaN
        axes.imshow(values, cmap=SCALE, vmin=0, vmax=100)
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                slant, ink = "italic" if j > i else "normal", "#ffffff" if value < 48 else "#10151a"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", size=8.5, color=ink, style=slant)
        axes.set_xticks(range(count), short, **SLANTED)
        axes.set_yticks(range(count), short, parse_math=False)
        axes.set(xlabel="tested on", ylabel="after learning")
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        return _picture(figure)


def scale(scheme: Scheme) -> Picture:
    """The colour scale of all heat maps."""
    with _drawing(scheme, (3.2, 0.55)) as (figure, axes):
        axes.imshow([list(range(101))], cmap=SCALE, aspect="auto", extent=(0, 100, 0, 1))
        axes.set(yticks=[], xlabel="accuracy, %")
        axes.tick_params(length=2, labelsize=8)
        axes.xaxis.label.set_fontsize(9)
        axes.spines[:].set_visible(False)
        return _picture(figure)


def curves(
    lines: Mapping[str, tuple[str, Sequence[Spread | None]]],
    ours: str,
    names: Sequence[str],
    scheme: Scheme,
    narrow: bool = False,
) -> Picture:
    """Accuracy on the experiences so far: a line per method (name -> label and spreads), with a band for its spread."""
    height = max(4.2, 1.2 + 0.27 * len(lines))
    with _drawing(scheme, (3.7, 3.4 + 0.23 * len(lines)) if narrow else (7.4, height)) as (figure, axes):
        stages, last = range(1, len(names) + 1), len(names)
        ends, baselines = [], zip(cycle(product(STROKES, HUES)), cycle(MARKS), strict=False)
        for name, (label, spreads) in lines.items():
            style = OURS_STYLE
            if name != ours:
                (stroke, hue), mark = next(baselines)
                style = {"color": hue, "linestyle": stroke, "marker": mark, "linewidth": 1.6}
            points = [(stage, spread) for stage, spread in zip(stages, spreads, strict=True) if spread is not None]
            x = [stage for stage, _ in points]
            means, deviations = 100 * np.array([(spread.mean, spread.deviation or 0) for _, spread in points]).T
            axes.plot(x, means, markersize=5, label=_short(label, 34), **style)
            axes.fill_between(x, means - deviations, means + deviations, color=style["color"], alpha=0.16, linewidth=0)
            ends.append((means[-1], label, style["color"]))
        axes.set(xlim=(0.95 - 0.03 * last, 1.03 * last + 0.05), ylim=(0, 103))
        axes.set(xlabel="after learning", ylabel="class-incremental accuracy, %")
        ticks = names if not narrow or last <= 6 else ["" if i % 2 else name for i, name in enumerate(names)]
        axes.set_xticks(stages, map(_short, ticks), **SLANTED)
        axes.grid(axis="y", color=SCHEMES[scheme]["faint"], linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if narrow:  # for a phone: a legend below the axes instead of labels at the ends of the lines
            for text in figure.legend(loc="outside lower left", frameon=False, fontsize=9).get_texts():
                text.set_parse_math(False)
            return _picture(figure)
        gap = 103 * 0.19 / (height - 1)  # height of a line of text, in points of accuracy
        for y, (value, label, hue) in zip(_apart([end[0] for end in ends], gap), ends, strict=True):
            leader = {"arrowstyle": "-", "color": hue, "linewidth": 1.2, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 5}
            axes.annotate(_short(label, 28), (last, value), (1.07, y), textcoords=axes.get_yaxis_transform(),
                          va="center", annotation_clip=False, parse_math=False, arrowprops=leader)  # fmt: skip
        return _picture(figure)


def cost_curves(measured: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Cost against the number of tasks, a panel per backbone; `measured` are rows of `CostRow`."""
    styles = {
        "combined, exact": {"color": INKS[0], "marker": "o"},
        "dense mask, precomputed": {"color": INKS[1], "marker": "s"},
        "dense mask": {"color": INKS[4], "marker": "^"},
        "separate passes": {"color": INKS[5], "marker": "x", "linestyle": "none"},
    }
    names = list(dict.fromkeys(row["backbone"] for row in measured))
    figure = Figure(figsize=(max(7, 1 + 4.2 * len(names)), 5), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(panels, names, strict=True):
        for method, style in styles.items():
            rows = [row for row in measured if (row["backbone"], row["what"]) == (name, method)]
            keys = ("num_tasks", "ratio", "low", "seconds", "high")
            tasks, ratios, low, seconds, high = (np.array([row[key] for row in rows]) for key in keys)
            quartiles = ratios * (1 - low / seconds), ratios * (high / seconds - 1)
            axis.errorbar(tasks, ratios, yerr=quartiles, label=method, capsize=3, **style)
            if method == "combined, exact":
                label = "combined, by operations without padding"
                axis.plot(tasks, [row["limit"] for row in rows], color=INKS[0], linestyle=":", label=label)
        axis.axhline(1, color=FAINT, linewidth=1, zorder=0)
        axis.set(xscale="log", yscale="log", title=name, xlabel="tasks")
        axis.set_yticks([1, 2, 5, 10], ["1x", "2x", "5x", "10x"])
        axis.minorticks_off()
        axis.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    panels[0].set_ylabel("forward-pass time, stock timm = 1")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 3 if len(names) > 1 else 2
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=columns)
    figure.savefig(file, dpi=140)


def training_curves(details: Mapping[str, Any], file: Path) -> None:
    """Left: time of learning a task against epochs. Right: peak memory of a training step."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    num, few, green, red = details["epochs"], details["dense_epochs"], INKS[0], INKS[4]
    epochs = np.arange(1, num + 1)
    dense = details["dense_epoch_s"] * epochs
    left.plot(epochs, dense, color=red, linestyle="--", label="dense mask, extrapolated")
    left.plot(epochs[:few], dense[:few], "o", color=red, label="dense mask, measured")
    cached = details["fill_s"] + details["train_s"] / num * epochs
    left.plot(epochs, cached, color=green, linewidth=2, label="cached, including cache filling")
    left.axhline(details["pass_s"], color="#999999", linestyle=":", label="stock timm, one forward pass of all images")
    left.set(xscale="log", yscale="log", xlabel="epochs", ylabel="seconds", title="learning a task")
    left.set_xticks([1, 10, 100], ["1", "10", "100"])
    left.legend(frameon=False, fontsize=8)
    names = {"one": "one\ncandidate", "eight": "eight\ncandidates", "full": "full\nfine-tuning"}
    values = [details["peak_bytes"][name] / 1e6 for name in names]
    bars = right.bar(list(names.values()), values, color=[green, green, red])
    right.bar_label(bars, [size(1e6 * value) for value in values], fontsize=8)
    right.set(yscale="log", ylabel="peak MB of live tensors", title="memory of a training step")
    right.set_ylim(min(values) / 3, max(values) * 3)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=140)


Gains = Mapping[str, Mapping[str, Spread]]


def paper_panels(
    here: Gains, paper: Gains, joined: Mapping[str, Mapping[int, float]], masked: tuple[str, float] | None, file: Path
) -> None:
    """Gains of each method over the head alone, here and in the paper, in points by dataset and method.

    `joined` is the accuracy in % without the mask, by label and number of tasks in the sequence; `masked` the label and
    accuracy of a line for the mask.
    """
    methods = [list(dict.fromkeys(method for gains in source.values() for method in gains)) for source in (here, paper)]
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    *gain_panels, collapse = panels = figure.subplots(1, 3, width_ratios=(max(3, len(methods[0])), 7, 4))
    titles = "here", "the paper (ViT-B/32)"
    for axis, source, columns, title in zip(gain_panels, (here, paper), methods, titles, strict=True):
        for i, (name, gains) in enumerate(source.items()):
            x = [columns.index(method) + 0.07 * (i - (len(source) - 1) / 2) for method in gains]
            means = [spread.mean for spread in gains.values()]
            deviations = [spread.deviation or 0.0 for spread in gains.values()]
            axis.errorbar(x, means, deviations, label=name, color=INKS[i % len(INKS)], marker="os"[source is paper],
                          linestyle="none", capsize=2, markersize=5)  # fmt: skip
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axis.axhline(0, color=FAINT, linewidth=1, zorder=0)
        axis.set_title(title)
    panels[0].set_ylabel("gain in test accuracy over the head alone, points")
    for i, (label, line) in enumerate(joined.items()):
        collapse.plot(list(line), list(line.values()), color=(FAINT, INKS[0])[i], marker="so"[i], label=label)
    if masked is not None:
        collapse.axhline(masked[1], color=INKS[0], linestyle=":", label=masked[0])
    collapse.set(title="as tasks join", xlabel="tasks in the sequence", ylabel="test accuracy, %", ylim=(0, 100))
    collapse.set_xticks(range(1, 1 + max(max(line) for line in joined.values())))
    for axis in panels:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
        axis.grid(axis="y", color="#eeeeee", zorder=-1)
    figure.savefig(file, dpi=140)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Positions of labels as near their values as possible: in the same order, `gap` apart, none below zero."""
    order, steps = np.argsort(values, kind="stable"), gap * np.arange(len(values))
    positions = np.empty(len(values))
    positions[order] = isotonic_regression(np.array(values)[order] - steps, y_min=0) + steps
    return list(positions)


def _short(name: str, longest: int = 16) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


@contextmanager
def _drawing(scheme: Scheme, inches: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """A new figure in a scheme's colours, without pyplot's global state."""
    paper, ink = SCHEMES[scheme]["paper"], SCHEMES[scheme]["ink"]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    with matplotlib.rc_context(
        {**colours, "figure.facecolor": paper, "axes.facecolor": paper, "font.size": 10, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=inches, dpi=CSS_DPI * SHARPNESS, layout="constrained")
        yield figure, figure.add_subplot()


def _picture(figure: Figure) -> Picture:
    full, png = BytesIO(), BytesIO()
    figure.savefig(full, format="png")
    # A palette reduces the size to a third; a page has two pictures per method and setting.
    Image.open(full).convert("RGB").quantize(256).save(png, "png", optimize=True)
    return Picture(png.getvalue(), round(figure.get_figwidth() * CSS_DPI))
