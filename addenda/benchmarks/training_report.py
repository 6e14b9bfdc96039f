"""What `addenda bench training` has measured, as a table, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from addenda.benchmarks.measured import Figure
from addenda.terminal import console, size, table

COLUMNS = ("what", "measured", "quartiles", "target", "by operations")


def write(figures: Sequence[Figure], details: Mapping[str, Any], out: Path | None) -> None:
    """Prints the table; with a folder, writes all three there."""
    cells = [_cells(figure) for figure in figures]
    console.print(table(_title(details), COLUMNS, cells, right=COLUMNS[1:]))
    said = _said(details)
    console.print(said, highlight=False)
    if out is None:
        return
    report = {"figures": [asdict(figure) | {"met": figure.met} for figure in figures], **details}
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ("---", *["---:"] * 4), *cells)]
    (out / "training.md").write_text(
        f"`{details['command']}`\n\n{_title(details)}\n\n" + "\n".join(lines) + f"\n\n{said}\n"
    )
    _plot(details, out / "training.png")


def _cells(figure: Figure) -> tuple[str, ...]:
    def shown(value: float | None) -> str:
        if value is None:
            return ""
        digits = 1 if value < 10 or figure.unit == "%" else 0
        digits = 2 if figure.unit in ("%", "points") or value < 4 else digits
        return f"{value:.{digits}f}"

    target = "" if figure.target is None else f"{'≥' if figure.more else '≤'} {figure.target:g} {figure.unit}"
    between = "" if figure.low is None else f"{shown(figure.low)}–{shown(figure.high)}"
    return figure.what, f"{shown(figure.measured)} {figure.unit}", between, target, shown(figure.limit)


def _title(details: Mapping[str, Any]) -> str:
    numerics = details["numerics"]
    return (
        f"{details['backbone']}, {details['train_images']} images, {numerics['device']}, "
        f"{numerics['threads']} threads, {numerics['precision']}"
    )


def _said(details: Mapping[str, Any]) -> str:
    accuracy, memory = details["accuracy"], details["peak_bytes"]
    num, few, kept = details["epochs"], details["dense_epochs"], size(details["cache_bytes"])
    beside = "side by side" if details["side_by_side"] else "one by one, since their bits differ side by side"
    return (
        f"An epoch of one candidate takes {details['epoch_s']:.2f} s, of eight {details['sweep_epoch_s']:.2f} s "
        f"({beside}); stock timm passes the images in {details['pass_s']:.1f} s. Cached, filling takes "
        f"{details['fill_s']:.1f} s and {num} epochs {details['train_s']:.1f} s; the dense mask takes "
        f"{details['dense_epoch_s']:.1f} s an epoch, {num} of them extrapolated from steps. On "
        f"{details['test_images']} held-out images, epochs: {few}: cached {100 * accuracy['cached']:.1f} %, dense "
        f"{100 * accuracy['dense']:.1f} % (at the start {100 * accuracy['start']:.1f} %; cached after {num} epochs "
        f"{100 * accuracy['learned']:.1f} %). Live tensors at most: one candidate {size(memory['one'])}, eight "
        f"{size(memory['eight'])}, full fine-tuning {size(memory['full'])}; the cache is {kept}."
    )


def _plot(details: Mapping[str, Any], path: Path) -> None:
    """Left, time against epochs; right, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2), width_ratios=(3, 2))
    num, few, green, red = details["epochs"], details["dense_epochs"], "#0b6e4f", "#8d3b72"
    epochs = range(1, num + 1)
    dense = [details["dense_epoch_s"] * epoch for epoch in epochs]
    left.plot(epochs, dense, color=red, linestyle="--", label="dense mask, extrapolated")
    left.plot(epochs[:few], dense[:few], "o", color=red, label="dense mask, trained")
    cached = [details["fill_s"] + details["train_s"] / num * epoch for epoch in epochs]
    left.plot(epochs, cached, color=green, linewidth=2, label="cached, filling included")
    left.axhline(details["pass_s"], color="#999999", linestyle=":", label="stock timm, one pass")
    left.set(xscale="log", yscale="log", xlabel="epochs", ylabel="seconds", title="learning a task")
    left.set_xticks([1, 10, 100], ["1", "10", "100"])
    left.legend(frameon=False, fontsize=8)
    names = {"one": "one\ncandidate", "eight": "eight\ncandidates", "full": "full\nfine-tuning"}
    values = [details["peak_bytes"][name] / 1e6 for name in names]
    bars = right.bar(list(names.values()), values, color=[green, green, red])
    right.bar_label(bars, [size(1e6 * value) for value in values], fontsize=8)
    right.set(yscale="log", ylabel="MB of live tensors at most", title="memory of a step")
    right.set_ylim(min(values) / 3, max(values) * 3)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)
