"""What `addenda bench paper` found, as Markdown, CSV and a plot, beside the paper's own figures."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from addenda.backbones import FrozenBackbone
from addenda.learner.regimes import AS_SHIPPED
from addenda.terminal import console

PAIRS, COLLAPSE = "pairs", "collapse"
"""The two that are no regimes of one set."""

ORDER = (
    "full", "head", "head+class", "memory", "adapters", "unmasked", "lora", "regression", "default", "default+adapters"
)  # fmt: skip
PAPER: Mapping[str, Mapping[str, float]] = {
    name: dict(zip(("full", "head", "head+class", "memory-1", "memory-5", "memory-10", "memory-20"), row, strict=True))
    for name, row in {
        "SUN-397": (76.9, 75.9, 76.4, 77.0, 76.8, 76.9, 76.9),
        "iNaturalist": (54.0, 46.3, 48.7, 49.4, 50.1, 50.0, 50.0),
        "CIFAR-100": (91.8, 85.8, 88.6, 90.9, 91.0, 91.1, 90.9),
        "Places-365": (55.9, 50.9, 52.4, 53.3, 53.8, 53.9, 54.1),
    }.items()
}
"""Top-1 %, ViT-B/32 of ImageNet-21k (Sandler et al., CVPR 2022, Table 2)."""

PAPER_COLLAPSE = (50.0, 28.1, 27.8, 17.3)
"""iNaturalist alone, then with one, two and three tasks more in the sequence and no mask."""

INK, SETS_INK, FAINT = "#0b6e4f", ("#0b6e4f", "#c1666b", "#4059ad", "#b8860b", "#8d3b72", "#555555"), "#bbbbbb"
SHOWN = ("learning_rate", "epoch", "strength")

Cells = Sequence[Mapping[str, Any]]


def write_report(cells: Cells, backbone: FrozenBackbone, data: Path, limit: int | None, out: Path) -> None:
    """Writes paper.md, paper.csv and paper.png, and prints the first.

    Args:
        cells: of one comparison.
        backbone: that they were made on.
        data: the folder of the sets.
        limit: training images of a set.
        out: the folder to write to.
    """
    plain = [cell for cell in cells if cell["regime"] not in (PAIRS, COLLAPSE)]
    sizes = "all training images of a set" if limit is None else f"{limit} training images of a set, drawn by the seed"
    seeds = len({cell["seed"] for cell in cells})
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    text = (
        f"`{command}`\n\nBackbone {backbone.name} ({backbone.fingerprint[:12]}); {sizes} from "
        f"{data.name}/, a fifth of them held out to choose learning rate and epoch by; {seeds} seed"
        f"{'' if seeds == 1 else 's'}; whole test sets. torch {torch.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads.\n"
    )
    text += "".join(part(group) for part, group in (
        (_accuracies, [cell for cell in plain if cell["regime"] not in AS_SHIPPED]),
        (_shipped, [cell for cell in plain if cell["regime"] in AS_SHIPPED]), (_training, plain),
        (_pairs, [cell for cell in cells if cell["regime"] == PAIRS]),
        (_collapse, [cell for cell in cells if cell["regime"] == COLLAPSE]),
    ) if group)  # fmt: skip
    (out / "paper.md").write_text(text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    _write_csv(cells, out / "paper.csv")
    compared = [cell for cell in plain if cell["regime"] not in AS_SHIPPED]
    if compared:
        _plot(cells, compared, out / "paper.png")
    console.print(f"Written to {out}: paper.md, paper.csv{', paper.png' if compared else ''}.")


def _accuracies(plain: Cells) -> str:
    regimes = _regimes(plain)
    rows = [[name, *(_mean_and_spread(plain, name, regime) for regime in regimes)] for name in _sets(plain)]
    if len(rows) > 1:
        means = [_mean_of_sets(plain, regime) for regime in regimes]
        rows.append(["**mean**", *("–" if mean is None else f"**{mean:.1f}**" for mean in means)])
        full, head = _mean_of_sets(plain, "full"), _mean_of_sets(plain, "head")
        if full is not None and head is not None:
            way = ["–" if mean is None else f"{100 * (mean - head) / (full - head):.0f} %" for mean in means]
            rows.append(["of the way from head to full", *way])
    rows += [
        [f"*{name}* (paper)", *(f"{row[r]:.1f}" if r in row else "" for r in regimes)] for name, row in PAPER.items()
    ]
    note = (
        "full, unmasked and lora move the frozen tokens: trained for comparison, never registrable as exact. "
        "Validation chooses their epoch and learning rate by accuracy, those of the others by loss. The paper's rows: "
        "ViT-B/32 of ImageNet-21k.\n"
    )
    return f"\nTest accuracy, %, mean ± standard deviation over seeds.\n\n{_table(('set', *regimes), rows)}\n{note}"


def _shipped(cells: Cells) -> str:
    """What a user gets beside the regression of the same seed, and the standard error of their mean difference."""
    rows = []
    for name in _sets(cells):
        rival = [cell["test"] for cell in cells if cell["set"] == name and cell["regime"] == "regression"]
        row = [name, _spread(rival)]
        for regime in ("default", "default+adapters"):
            ours = [cell["test"] for cell in cells if cell["set"] == name and cell["regime"] == regime]
            gains = _gains(cells, name, regime, "regression")
            error = f"{statistics.stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else "–"
            row += [_spread(ours), f"{statistics.mean(gains):+.1f}" if gains else "–", error]
        taken = [cell["chosen"].get("adapter_rank", 0) > 0 for cell in cells
                 if cell["set"] == name and cell["regime"] == "default+adapters"]  # fmt: skip
        rows.append([*row, f"{sum(taken)} of {len(taken)}"])
    head = ("set", "regression", "default", "difference", "s.e.", "adapters auto", "difference", "s.e.", "taken")
    note = (
        "As a user gets them: learned from all the images, the validation part too. s.e.: of the mean difference, each "
        "seed's from its own regression on the same images; the test set is one, so what another would say is not in "
        "it.\n"
    )
    return f"\nWhat `addenda learn` gives, test accuracy in %.\n\n{_table(head, rows)}\n{note}"


def _training(plain: Cells) -> str:
    rows = []
    for regime in _regimes(plain):
        mine = [cell for cell in plain if cell["regime"] == regime]
        chosen = [
            " ".join(f"{k.replace('_', ' ')} {v}" for k, v in cell["chosen"].items() if k in SHOWN) for cell in mine
        ]
        seconds = sum(cell["seconds"] for cell in mine)
        images = sum(cell["num_images"] for cell in mine)
        rows.append([
            regime, f"{100 * statistics.mean(cell['validation'] for cell in mine):.1f}", f"{seconds / len(mine):.0f}",
            f"{images / seconds:.0f}" if images else "–",
            "; ".join(f"{text} ({chosen.count(text)})" for text in sorted(set(chosen), key=chosen.count)[:-4:-1]),
        ])  # fmt: skip
    head = ("regime", "validation, %", "seconds", "images/s", "most often chosen")
    note = "images/s: those that training passed, all learning rates together, by the whole time of a cell.\n"
    return f"\nHow they were trained, means over sets and seeds.\n\n{_table(head, rows)}\n{note}"


def _pairs(pairs: Cells) -> str:
    extension, concatenation = [], []
    for place in _sets(pairs):
        mine = [cell for cell in pairs if cell["set"] == place]
        one, other = place.split("+")
        extended, alone = ([cell[key] for cell in mine] for key in ("extended", "alone"))
        gains = [with_it - without for with_it, (_, without) in zip(extended, alone, strict=True)]
        identical = "yes" if all(cell["identical"] for cell in mine) else "**NO**"
        extension.append(
            [other, one, _spread([b for _, b in alone]), _spread(extended), _spread(gains, "+"), identical]
        )
        for i, name in enumerate((one, other)):
            together = [cell["together"][i] for cell in mine]
            same = "yes" if all(cell["together"][i] == cell["alone"][i] for cell in mine) else "**NO**"
            concatenation.append([place, name, _spread([a[i] for a in alone]), _spread(together), same, identical])
    extended_head = ("set", "extends", "alone, %", "extending, %", "difference", "old logits keep their bits")
    joined_head = ("pair", "set", "alone, %", "together, %", "equal to the last digit", "all logits keep their bits")
    return (
        f"\nExtension: memory-5, with and without sight of an earlier task.\n\n{_table(extended_head, extension)}"
        f"\nConcatenation under the mask: both tasks and the extension in one pass.\n\n"
        f"{_table(joined_head, concatenation)}"
    )


def _collapse(joined: Cells) -> str:
    rows = []
    for place in sorted(_sets(joined), key=lambda place: place.count("+")):
        mine = [cell for cell in joined if cell["set"] == place]
        for i, name in enumerate(place.split("+")):
            alone, together = ([cell[key][i] for cell in mine] for key in ("alone", "together"))
            change = [after - before for before, after in zip(alone, together, strict=True)]
            rows.append([place.replace("+", " + "), name, _spread(alone), _spread(together), _spread(change, "+")])
    rows += [["(paper)", f"*iNaturalist* and {i} more", "50.0", f"{v:.1f}", f"{v - 50:+.1f}"]
             for i, v in enumerate(PAPER_COLLAPSE) if i]  # fmt: skip
    head = ("joined", "set", "alone, %", "joined, %", "difference")
    return f"\nConcatenation WITHOUT the mask, of unmasked-5 trained apart.\n\n{_table(head, rows)}"


def _write_csv(cells: Cells, file: Path) -> None:
    """A line for each accuracy of each cell."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("set", "seed", "regime", "what", "accuracy", "seconds"))
        for cell in cells:
            for what in ("validation", "test", "alone", "together", "extended"):
                values = cell.get(what, [])
                for value in values if isinstance(values, list) else [values]:
                    writer.writerow((cell["set"], cell["seed"], cell["regime"], what, value, f"{cell['seconds']:.1f}"))


def _plot(cells: Cells, plain: Cells, file: Path) -> None:
    """What each regime gains over the head alone, here and in the paper; and a task among others without the mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    joined = [cell for cell in cells if cell["regime"] == COLLAPSE]
    regimes, sets = _regimes(plain), _sets(plain)
    figure, axes = plt.subplots(
        1, 3, figsize=(15, 5.2), sharey=False, width_ratios=(max(3, len(regimes)), 7, 4), layout="constrained"
    )
    here, paper, collapse = axes
    for i, name in enumerate(sets):
        points = []
        for place, regime in enumerate(regimes):
            gains = _gains(plain, name, regime, "head")
            if gains:
                spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
                points.append((place + 0.07 * (i - (len(sets) - 1) / 2), statistics.mean(gains), spread))
        if points:
            x, y, error = zip(*points, strict=True)
            here.errorbar(x, y, error, label=name, color=SETS_INK[i % len(SETS_INK)], marker="o", linestyle="none",
                          capsize=2, markersize=5)  # fmt: skip
    columns = list(PAPER["CIFAR-100"])
    for i, (name, row) in enumerate(PAPER.items()):
        gains = [row[column] - row["head"] for column in columns]
        paper.plot(columns, gains, label=name, color=SETS_INK[i], marker="s", linestyle="none", markersize=5)
    here.set_xticks(range(len(regimes)), regimes, rotation=40, ha="right")
    paper.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    here.set(title="here", ylabel="test accuracy less that of the head alone, points")
    paper.set(title="the paper (ViT-B/32)")
    first = sets[0]
    lines = [cell for cell in joined if cell["set"].split("+")[0] == first]
    if lines:
        counts = sorted({len(cell["together"]) for cell in lines})
        ours = [statistics.mean(c["together"][0] for c in lines if len(c["together"]) == n) for n in counts]
        alone = statistics.mean(cell["alone"][0] for cell in lines)
        collapse.plot([1, *counts], [100 * alone, *(100 * v for v in ours)], color=INK, marker="o",
                      label=f"{first}, no mask")  # fmt: skip
    masked = [100 * c["test"] for c in plain if c["regime"] == "memory-5" and c["set"] == first]
    if masked:
        collapse.axhline(statistics.mean(masked), color=INK, linestyle=":", label=f"{first}, masked: bits do not move")
    collapse.plot(range(1, 5), PAPER_COLLAPSE, color=FAINT, marker="s", label="iNaturalist, no mask (paper)")
    collapse.set(title="as tasks join", xlabel="tasks in the sequence", ylabel="test accuracy, %", ylim=(0, 100))
    collapse.set_xticks(range(1, 1 + max(4, len(sets))))
    for axis in (here, paper):
        axis.axhline(0, color=FAINT, linewidth=1, zorder=0)
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
        axis.grid(axis="y", color="#eeeeee", zorder=-1)
    figure.savefig(file, dpi=140)
    plt.close(figure)


def _gains(cells: Cells, name: str, regime: str, over: str) -> list[float]:
    """Points of a regime above another of the same seed, on one set."""
    base = {cell["seed"]: cell["test"] for cell in cells if cell["set"] == name and cell["regime"] == over}
    mine = [cell for cell in cells if cell["set"] == name and cell["regime"] == regime and cell["seed"] in base]
    return [100 * (cell["test"] - base[cell["seed"]]) for cell in mine]


def _regimes(plain: Cells) -> list[str]:
    """In the paper's order, the smaller first."""

    def order(regime: str) -> tuple[int, int]:
        kind, _, size = regime.partition("-")
        return ORDER.index(kind), int(size or 0)

    return sorted({cell["regime"] for cell in plain}, key=order)


def _sets(cells: Cells) -> list[str]:
    return list(dict.fromkeys(cell["set"] for cell in cells))


def _mean_and_spread(plain: Cells, name: str, regime: str) -> str:
    return _spread([cell["test"] for cell in plain if cell["set"] == name and cell["regime"] == regime])


def _mean_of_sets(plain: Cells, regime: str) -> float | None:
    """Over all sets; None where one has none."""
    found = [
        [cell["test"] for cell in plain if cell["set"] == name and cell["regime"] == regime] for name in _sets(plain)
    ]
    return 100 * statistics.mean(map(statistics.mean, found)) if all(found) else None


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Fractions as percent: their mean, and their standard deviation where there are several."""
    if not values:
        return "–"
    mean = format(100 * statistics.mean(values), f"{sign}.1f")
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
