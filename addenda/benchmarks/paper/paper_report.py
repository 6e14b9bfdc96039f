"""Report of `addenda bench paper` as Markdown, CSV and a plot, with the paper's results for comparison."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.paper_methods import AS_SHIPPED
from addenda.benchmarks.report.tables import NOTHING, Spread, Table, markdown, shown
from addenda.terminal import console, percent

PAIRS, COLLAPSE = "pairs", "collapse"
"""The two methods that combine several datasets."""

ORDER = (
    "full", "head", "head+class", "memory", "adapters", "unmasked", "lora", "attentive", "linear-probe", "layer-probe",
    "default", "default+adapters",
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
"""Top-1 accuracy in %, ViT-B/32 pretrained on ImageNet-21k (Sandler et al., CVPR 2022, Table 2)."""

PAPER_COLLAPSE = (50.0, 28.1, 27.8, 17.3)
"""iNaturalist alone, and with one, two and three more tasks in the sequence without a mask."""

SHOWN = ("rate", "learning_rate", "epoch", "strength")

STRONG = ("full", "lora", "attentive")
"""Kinds of baselines in the table of `addenda learn`."""

RESAMPLES = 2000
"""Number of bootstrap resamples."""

LAST = " (last)"
"""Suffix of a baseline's results after its last epoch."""

Cells = Sequence[Mapping[str, Any]]


def best_of_rates(cells: Cells) -> list[Mapping[str, Any]]:
    """Select one of the cells that differ only in their rate, by validation.

    Each selection gives two cells: the best at its best epoch, and the best after the last epoch.
    """
    selected: list[Mapping[str, Any]] = [cell for cell in cells if "rate" not in cell]
    groups: dict[object, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.get("test") is not None and "rate" in cell:
            groups.setdefault((cell["set"], cell["seed"], cell["method"]), []).append(cell)
    for group in groups.values():
        totals = {key: sum(cell[key] for cell in group) for key in ("seconds", "num_images")}
        selected.append({**min(group, key=lambda cell: (-cell["validation"], cell["validation_loss"])), **totals})
        last = max(group, key=lambda cell: cell["last_validation"])
        at_last = {
            "validation": last["last_validation"], "test": last["last_test"], "right": last["last_right"],
            "chosen": {"rate": last["rate"]},
        }  # fmt: skip
        selected.append({**last, **totals, **at_last, "method": last["method"] + LAST})
    return selected


def write_report(cells: Cells, backbone: FrozenBackbone, data: Path, limit: int | None, out: Path) -> None:
    """Write paper.md, paper.csv and paper.png, and print paper.md."""
    plain = [cell for cell in best_of_rates(cells) if cell["method"] not in (PAIRS, COLLAPSE)]
    compared = [cell for cell in plain if cell["method"] not in AS_SHIPPED]
    pairs, joined = _of(cells, method=PAIRS), _of(cells, method=COLLAPSE)
    sizes = "all training images" if limit is None else f"{limit} training images, drawn by the seed,"
    seeds = len({cell["seed"] for cell in cells})
    text = (
        f"`{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`\n\n"
        f"Backbone {backbone.name} ({backbone.fingerprint[:12]}); {sizes} of each dataset in {data.name}/, a fifth of "
        f"them held out for validation; {seeds} seed{'' if seeds == 1 else 's'}; full test splits. torch "
        f"{torch.__version__}, {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads.\n"
    )
    sections: Sequence[tuple[Cells, Callable[[Cells], Table], str, str]] = (
        (compared, accuracy_table, "Test accuracy in %, mean ± standard deviation over seeds.",
         "full, unmasked and lora change the frozen tokens; they are baselines for comparison and cannot be "
         "registered. Validation selects their epoch and learning rate by accuracy, those of the other methods by "
         "loss. The paper's rows are for ViT-B/32 pretrained on ImageNet-21k."),
        (plain, shipped_table, "`addenda learn` as shipped and the strongest baselines, test accuracy in %.",
         "`addenda learn` trains on all images, including the validation split. Differences are to the baseline with "
         "the best mean over datasets; ± is their standard error, from a paired bootstrap over the test images, shared "
         "by all seeds."),
        (plain, _training_table, "Training, means over datasets and seeds.",
         "images/s: images processed in training, over all learning rates, divided by the cell's total time."),
        (pairs, _extension_table, "Extension: memory-5, with and without access to an earlier task.", ""),
        (pairs, _concatenation_table,
         "Concatenation under the mask: both tasks and the extension in one forward pass.", ""),
        (joined, _collapse_table, "Concatenation WITHOUT the mask, of separately trained unmasked-5.", ""),
    )  # fmt: skip
    for group, table, title, note in sections:
        if group:
            text += f"\n{title}\n\n{markdown(table(group))}" + f"\n{note}\n" * bool(note)
    (out / "paper.md").write_text(text)
    console.print(text, soft_wrap=True)
    _write_csv(cells, out / "paper.csv")
    if compared:
        _plot(joined, compared, out / "paper.png")
    console.print(f"Written to {out}: paper.md, paper.csv{', paper.png' if compared else ''}.")


def accuracy_table(plain: Cells) -> Table:
    """Test accuracy of every method on every dataset, with the paper's rows below."""
    methods, sets = _methods(plain), _sets(plain)
    rows: list[list[str]] = [[name, *(_test(plain, name, method) for method in methods)] for name in sets]
    if len(rows) > 1:
        means = {method: _mean_of_sets(plain, method) for method in methods}
        bold = (NOTHING if mean is None else Markup(f"**{percent(mean)}**") for mean in means.values())
        rows.append([Markup("**mean**"), *bold])
        full, head = means.get("full"), means.get("head")
        if full is not None and head is not None:
            shares = (NOTHING if m is None else f"{100 * (m - head) / (full - head):.0f} %" for m in means.values())
            rows.append(["share of the gap from head to full", *shares])
    for name, row in PAPER.items():
        rows.append([Markup(f"*{name}* (paper)"), *(f"{row[m]:.1f}" if m in row else "" for m in methods)])
    return Table(("dataset", *methods), rows)


def shipped_table(plain: Cells) -> Table:
    """`addenda learn` as shipped next to strong baselines, with the paired difference to the best of these."""
    methods = _methods(plain)
    baselines = [method for method in methods if method.removesuffix(LAST).partition("-")[0] in STRONG]
    ours, sets = [method for method in methods if method in AS_SHIPPED], _sets(plain)
    complete = {method: mean for method in baselines if (mean := _mean_of_sets(plain, method)) is not None}
    best = max(complete, key=complete.__getitem__) if complete else None
    columns, compared = (*baselines, *ours), [(method, best) for method in ours if best is not None]
    rows = [[name, *(_test(plain, name, method) for method in columns)] for name in sets]
    if len(sets) > 1:
        rows.append([Markup("**mean**"), *(percent(_mean_of_sets(plain, method)) for method in columns)])
    for row, names in zip(rows, (*([name] for name in sets), sets), strict=False):
        gains = (paired_gain(plain, names, method, over) for method, over in compared)
        row += (NOTHING if gain is None else f"{gain[0]:+.1f} ± {gain[1]:.1f}" for gain in gains)
    return Table(("dataset", *columns, *(f"{method} minus {over}" for method, over in compared)), rows)


def paired_gain(cells: Cells, names: Sequence[str], method: str, over: str) -> tuple[float, float] | None:
    """Mean difference between two methods in points, over datasets and common seeds, and its standard error.

    None if a dataset has no seed with both methods.
    """
    random, resampled, means = np.random.default_rng(0), np.zeros(RESAMPLES), []
    for name in names:
        scored = [cell for cell in _of(cells, set=name) if cell.get("right")]
        ours, base = (
            {cell["seed"]: [*map(int, cell["right"])] for cell in _of(scored, method=m)} for m in (method, over)
        )
        differences = [np.subtract(ours[seed], base[seed]) for seed in ours if seed in base]
        if not differences:
            return None
        gains = 100 * np.mean(differences, axis=0)  # per test image, averaged over seeds
        means.append(gains.mean())
        resampled += gains[random.integers(len(gains), size=(RESAMPLES, len(gains)))].mean(1) / len(names)
    return float(np.mean(means)), float(resampled.std())


def _training_table(plain: Cells) -> Table:
    rows = []
    for method in _methods(plain):
        cells = _of(plain, method=method)
        chosen = Counter(
            " ".join(f"{key.replace('_', ' ')} {value}" for key, value in cell["chosen"].items() if key in SHOWN)
            for cell in cells
        )
        most_common = "; ".join(f"{text} ({count})" for text, count in chosen.most_common(3))
        seconds, images = (sum(cell[key] for cell in cells) for key in ("seconds", "num_images"))
        validation = percent(statistics.mean(cell["validation"] for cell in cells))
        rate = f"{images / seconds:.0f}" if images else NOTHING
        rows.append([method, validation, f"{seconds / len(cells):.0f}", rate, most_common])
    return Table(("method", "validation, %", "seconds", "images/s", "most frequent selection"), rows)


def _extension_table(pairs: Cells) -> Table:
    rows = []
    for pair in _sets(pairs):
        cells, (first, second) = _of(pairs, set=pair), pair.split("+")
        spreads = _difference([cell["alone"][1] for cell in cells], [cell["extended"] for cell in cells])
        rows.append([second, first, *spreads, _yes(cell["identical"] for cell in cells)])
    return Table(("dataset", "extends", "alone, %", "extending, %", "difference", "old logits identical"), rows)


def _concatenation_table(pairs: Cells) -> Table:
    rows = []
    for cells, pair, name, alone, together in _members(pairs):
        identical = _yes(cell["identical"] for cell in cells)
        rows.append([pair, name, *_difference(alone, together)[:2], _yes([alone == together]), identical])
    columns = ("pair", "dataset", "alone, %", "together, %", "same accuracy", "all logits identical")
    return Table(columns, rows)


def _collapse_table(joined: Cells) -> Table:
    rows = [
        [group.replace("+", " + "), name, *_difference(alone, together)]
        for _, group, name, alone, together in _members(joined)
    ]
    for i, value in enumerate(PAPER_COLLAPSE[1:], 1):
        name = Markup(f"*iNaturalist* and {i} more")
        rows.append(["(paper)", name, "50.0", f"{value:.1f}", f"{value - PAPER_COLLAPSE[0]:+.1f}"])
    return Table(("joined", "dataset", "alone, %", "joined, %", "difference"), rows)


def _members(cells: Cells) -> Iterator[tuple[Cells, str, str, list[float], list[float]]]:
    """The datasets of each group, smallest group first, with their accuracies alone and together."""
    for group in sorted(_sets(cells), key=lambda group: group.count("+")):
        of_group = _of(cells, set=group)
        for i, name in enumerate(group.split("+")):
            alone, together = ([cell[key][i] for cell in of_group] for key in ("alone", "together"))
            yield of_group, group, name, alone, together


def _write_csv(cells: Cells, file: Path) -> None:
    """Write one line per accuracy of each cell."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("set", "seed", "method", "what", "accuracy", "seconds"))
        for cell in cells:
            for key in ("validation", "test", "alone", "together", "extended"):
                values = cell.get(key, [])
                for value in values if isinstance(values, list) else [values]:
                    writer.writerow((cell["set"], cell["seed"], cell["method"], key, value, f"{cell['seconds']:.1f}"))


def _plot(joined: Cells, plain: Cells, file: Path) -> None:
    from addenda.benchmarks.report.plots import paper_panels

    gains = {}
    for name in _sets(plain):
        head = {cell["seed"]: cell["test"] for cell in _of(plain, set=name, method="head")}
        scored = [cell for cell in _of(plain, set=name) if cell["seed"] in head]
        spreads = {
            method: Spread.of(100 * (cell["test"] - head[cell["seed"]]) for cell in _of(scored, method=method))
            for method in _methods(plain)
        }
        if known := {method: spread for method, spread in spreads.items() if spread is not None}:
            gains[name] = known
    paper = {name: {m: Spread(value - row["head"], None) for m, value in row.items()} for name, row in PAPER.items()}
    first = _sets(plain)[0]
    lines = {"iNaturalist, no mask (paper)": dict(enumerate(PAPER_COLLAPSE, 1))}
    accuracies: dict[int, list[float]] = {}  # by number of joined tasks
    for cell in joined:
        if cell["set"].split("+")[0] == first:
            accuracies.setdefault(1, []).append(cell["alone"][0])
            accuracies.setdefault(len(cell["together"]), []).append(cell["together"][0])
    if accuracies:
        lines[f"{first}, no mask"] = {n: 100 * statistics.mean(accuracies[n]) for n in sorted(accuracies)}
    masked = Spread.of(cell["test"] for cell in _of(plain, set=first, method="memory-5"))
    level = None if masked is None else (f"{first}, masked: logits identical", 100 * masked.mean)
    paper_panels(gains, paper, lines, level, file)


def _of(cells: Cells, **key: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if cell.items() >= key.items()]


def _methods(plain: Cells) -> list[str]:
    """The methods in the paper's order, smaller sizes first."""

    def order(method: str) -> tuple[int, int, bool]:
        kind = method.removesuffix(LAST)
        kind, size = (kind, "0") if kind in ORDER else kind.split("-")
        return ORDER.index(kind), int(size), method.endswith(LAST)

    return sorted({cell["method"] for cell in plain}, key=order)


def _sets(cells: Cells) -> list[str]:
    return list(dict.fromkeys(cell["set"] for cell in cells))


def _test(plain: Cells, name: str, method: str) -> str:
    return shown(Spread.of(cell["test"] for cell in _of(plain, set=name, method=method)))


def _mean_of_sets(plain: Cells, method: str) -> float | None:
    """Mean accuracy over datasets; None if the method is missing for one."""
    accuracies = [[cell["test"] for cell in _of(plain, set=name, method=method)] for name in _sets(plain)]
    return statistics.mean(map(statistics.mean, accuracies)) if all(accuracies) else None


def _difference(before: Sequence[float], after: Sequence[float]) -> list[str]:
    """Mean ± standard deviation before, after and of the difference."""
    change = [new - old for old, new in zip(before, after, strict=True)]
    return [shown(Spread.of(before)), shown(Spread.of(after)), shown(Spread.of(change), sign="+")]


def _yes(values: Iterable[bool]) -> str:
    return "yes" if all(values) else Markup("**NO**")
