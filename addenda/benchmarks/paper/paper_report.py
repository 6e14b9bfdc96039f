"""What `addenda bench paper` found, as Markdown, CSV and a plot, beside the paper's own figures."""

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
from addenda.terminal import console

PAIRS, COLLAPSE = "pairs", "collapse"
"""The two that are no regimes of one set."""

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
"""Top-1 %, ViT-B/32 of ImageNet-21k (Sandler et al., CVPR 2022, Table 2)."""

PAPER_COLLAPSE = (50.0, 28.1, 27.8, 17.3)
"""iNaturalist alone, then with one, two and three tasks more in the sequence and no mask."""

SHOWN = ("rate", "learning_rate", "epoch", "strength")

STRONG = ("full", "lora", "attentive")
"""Kinds of rivals that ours are measured against."""

RESAMPLES = 2000
"""Of the bootstrap."""

LAST = " (last)"
"""After a rival's regime, where it stands after its last epoch."""

Cells = Sequence[Mapping[str, Any]]


def best_of_rates(cells: Cells) -> list[Mapping[str, Any]]:
    """Of the cells of a set, seed and regime that differ by their rate, the one that validation chooses.

    It is there twice: at its best epoch, and the best of all after their last.
    """
    found: list[Mapping[str, Any]] = [cell for cell in cells if "rate" not in cell]
    places: dict[object, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.get("test") is not None and "rate" in cell:
            places.setdefault((cell["set"], cell["seed"], cell["method"]), []).append(cell)
    for some in places.values():
        whole = {key: sum(cell[key] for cell in some) for key in ("seconds", "num_images")}
        found.append({**min(some, key=lambda cell: (-cell["validation"], cell["validation_loss"])), **whole})
        last = max(some, key=lambda cell: cell["last_validation"])
        at_last = {
            "validation": last["last_validation"], "test": last["last_test"], "right": last["last_right"],
            "chosen": {"rate": last["rate"]},
        }  # fmt: skip
        found.append({**last, **whole, **at_last, "method": last["method"] + LAST})
    return found


def write_report(cells: Cells, backbone: FrozenBackbone, data: Path, limit: int | None, out: Path) -> None:
    """Writes paper.md, paper.csv and paper.png, and prints the first."""
    plain = [cell for cell in best_of_rates(cells) if cell["method"] not in (PAIRS, COLLAPSE)]
    compared = [cell for cell in plain if cell["method"] not in AS_SHIPPED]
    pairs, joined = _of(cells, method=PAIRS), _of(cells, method=COLLAPSE)
    sizes = "all training images of a set" if limit is None else f"{limit} training images of a set, drawn by the seed"
    seeds = len({cell["seed"] for cell in cells})
    text = (
        f"`{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`\n\n"
        f"Backbone {backbone.name} ({backbone.fingerprint[:12]}); {sizes} from "
        f"{data.name}/, a fifth of them held out to choose learning rate and epoch by; {seeds} seed"
        f"{'' if seeds == 1 else 's'}; whole test sets. torch {torch.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads.\n"
    )
    parts: Sequence[tuple[Cells, Callable[[Cells], Table], str, str]] = (
        (compared, accuracy_table, "Test accuracy, %, mean ± standard deviation over seeds.",
         "full, unmasked and lora move the frozen tokens: trained for comparison, never registrable as exact. "
         "Validation chooses their epoch and learning rate by accuracy, those of the others by loss. The paper's rows: "
         "ViT-B/32 of ImageNet-21k."),
        (plain, shipped_table, "What `addenda learn` gives, test accuracy in %, beside the strongest rivals.",
         "Ours as a user gets them: learned from all the images, the validation part too. Differences are from the "
         "rival that is best in the mean over the sets; ± is their standard error, by a bootstrap over the test "
         "images, the same for both and for all seeds."),
        (plain, _training_table, "How they were trained, means over sets and seeds.",
         "images/s: those that training passed, all learning rates together, by the whole time of a cell."),
        (pairs, _extension_table, "Extension: memory-5, with and without sight of an earlier task.", ""),
        (pairs, _concatenation_table, "Concatenation under the mask: both tasks and the extension in one pass.", ""),
        (joined, _collapse_table, "Concatenation WITHOUT the mask, of unmasked-5 trained apart.", ""),
    )  # fmt: skip
    for group, table, title, note in parts:
        if group:
            text += f"\n{title}\n\n{markdown(table(group))}" + f"\n{note}\n" * bool(note)
    (out / "paper.md").write_text(text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    _write_csv(cells, out / "paper.csv")
    if compared:
        _plot(joined, compared, out / "paper.png")
    console.print(f"Written to {out}: paper.md, paper.csv{', paper.png' if compared else ''}.")


def accuracy_table(plain: Cells) -> Table:
    """Test accuracy of every regime on every set, with the paper's own rows below."""
    methods, sets = _methods(plain), _sets(plain)
    rows: list[list[str]] = [[name, *(_test(plain, name, method) for method in methods)] for name in sets]
    if len(rows) > 1:
        means = {method: _mean_of_sets(plain, method) for method in methods}
        bold = (NOTHING if mean is None else Markup(f"**{mean:.1f}**") for mean in means.values())
        rows.append([Markup("**mean**"), *bold])
        full, head = means.get("full"), means.get("head")
        if full is not None and head is not None:
            way = (NOTHING if m is None else f"{100 * (m - head) / (full - head):.0f} %" for m in means.values())
            rows.append(["of the way from head to full", *way])
    for name, row in PAPER.items():
        rows.append([Markup(f"*{name}* (paper)"), *(f"{row[r]:.1f}" if r in row else "" for r in methods)])
    return Table(("set", *methods), rows)


def shipped_table(plain: Cells) -> Table:
    """What a user gets beside the rivals that were not kept from being strong, and how far above the best of them."""
    known = _methods(plain)
    baselines = [method for method in known if method.removesuffix(LAST).partition("-")[0] in STRONG]
    ours, sets = [method for method in known if method in AS_SHIPPED], _sets(plain)
    means = {method: _mean_of_sets(plain, method) for method in baselines}
    whole = {method: mean for method, mean in means.items() if mean is not None}
    best = max(whole, key=whole.__getitem__) if whole else None
    rows = []
    for names in (*([name] for name in sets), *([sets] if len(sets) > 1 else [])):
        shown_name = names[0] if len(names) == 1 else Markup("**mean**")
        row: list[str] = [shown_name]
        for method in (*baselines, *ours):
            mean = _mean_of_sets([cell for cell in plain if cell["set"] in names], method)
            row.append(
                _test(plain, names[0], method) if len(names) == 1 else NOTHING if mean is None else f"{mean:.1f}"
            )
        for method in ours if best else ():
            gain = paired_gain(plain, names, method, best or "")
            row.append(NOTHING if gain is None else f"{gain[0]:+.1f} ± {gain[1]:.1f}")
        rows.append(row)
    above = [f"{method} above {best}" for method in ours] if best else []
    return Table(("set", *baselines, *ours, *above), rows)


def paired_gain(cells: Cells, names: Sequence[str], method: str, over: str) -> tuple[float, float] | None:
    """Points of one regime above another, in the mean over some sets and the seeds that both have; and its error.

    None where a set has no seed of both.
    """
    random, drawn, found = np.random.default_rng(0), np.zeros(RESAMPLES), []
    for name in names:
        one, other = ({cell["seed"]: cell for cell in _of(cells, set=name, method=what)} for what in (method, over))
        seeds = [seed for seed in one if seed in other and one[seed].get("right") and other[seed].get("right")]
        if not seeds:
            return None
        right, base = (np.array([list(map(int, some[seed]["right"])) for seed in seeds]) for some in (one, other))
        gains = 100 * (right - base).mean(0)  # of each test image, over the seeds
        found.append(gains.mean())
        drawn += gains[random.integers(len(gains), size=(RESAMPLES, len(gains)))].mean(1) / len(names)
    return float(np.mean(found)), float(drawn.std())


def _training_table(plain: Cells) -> Table:
    rows = []
    for method in _methods(plain):
        mine = _of(plain, method=method)
        chosen = Counter(
            " ".join(f"{key.replace('_', ' ')} {value}" for key, value in cell["chosen"].items() if key in SHOWN)
            for cell in mine
        )
        often = "; ".join(f"{text} ({count})" for text, count in chosen.most_common(3))
        seconds, images = (sum(cell[key] for cell in mine) for key in ("seconds", "num_images"))
        validation = f"{100 * statistics.mean(cell['validation'] for cell in mine):.1f}"
        rate = f"{images / seconds:.0f}" if images else NOTHING
        rows.append([method, validation, f"{seconds / len(mine):.0f}", rate, often])
    return Table(("method", "validation, %", "seconds", "images/s", "most often chosen"), rows)


def _extension_table(pairs: Cells) -> Table:
    rows = []
    for place in _sets(pairs):
        mine, (one, other) = _of(pairs, set=place), place.split("+")
        beside = _beside([cell["alone"][1] for cell in mine], [cell["extended"] for cell in mine])
        rows.append([other, one, *beside, _yes(cell["identical"] for cell in mine)])
    return Table(("set", "extends", "alone, %", "extending, %", "difference", "old logits keep their bits"), rows)


def _concatenation_table(pairs: Cells) -> Table:
    rows = []
    for mine, place, name, alone, together in _members(pairs):
        kept = _yes(cell["identical"] for cell in mine)
        rows.append([place, name, *_beside(alone, together)[:2], _yes([alone == together]), kept])
    head = ("pair", "set", "alone, %", "together, %", "equal to the last digit", "all logits keep their bits")
    return Table(head, rows)


def _collapse_table(joined: Cells) -> Table:
    rows = [
        [place.replace("+", " + "), name, *_beside(alone, together)]
        for _, place, name, alone, together in _members(joined)
    ]
    for i, value in enumerate(PAPER_COLLAPSE[1:], 1):
        name = Markup(f"*iNaturalist* and {i} more")
        rows.append(["(paper)", name, "50.0", f"{value:.1f}", f"{value - PAPER_COLLAPSE[0]:+.1f}"])
    return Table(("joined", "set", "alone, %", "joined, %", "difference"), rows)


def _members(cells: Cells) -> Iterator[tuple[Cells, str, str, list[float], list[float]]]:
    """Of sets that were answered together, the smallest company first: each with its accuracies alone and in it."""
    for place in sorted(_sets(cells), key=lambda place: place.count("+")):
        mine = _of(cells, set=place)
        for i, name in enumerate(place.split("+")):
            alone, together = ([cell[key][i] for cell in mine] for key in ("alone", "together"))
            yield mine, place, name, alone, together


def _write_csv(cells: Cells, file: Path) -> None:
    """A line for each accuracy of each cell."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("set", "seed", "method", "what", "accuracy", "seconds"))
        for cell in cells:
            for what in ("validation", "test", "alone", "together", "extended"):
                values = cell.get(what, [])
                for value in values if isinstance(values, list) else [values]:
                    writer.writerow((cell["set"], cell["seed"], cell["method"], what, value, f"{cell['seconds']:.1f}"))


def _plot(joined: Cells, plain: Cells, file: Path) -> None:
    from addenda.benchmarks.report.plots import paper_panels

    here = {}
    for name in _sets(plain):
        spreads = {method: Spread.of(_gains(plain, name, method, "head")) for method in _methods(plain)}
        if known := {method: spread for method, spread in spreads.items() if spread is not None}:
            here[name] = known
    paper = {name: {r: Spread(value - row["head"], None) for r, value in row.items()} for name, row in PAPER.items()}
    first = _sets(plain)[0]
    lines = {"iNaturalist, no mask (paper)": dict(enumerate(PAPER_COLLAPSE, 1))}
    reached: dict[int, list[float]] = {}
    for cell in joined:
        if cell["set"].split("+")[0] == first:
            reached.setdefault(1, []).append(cell["alone"][0])
            reached.setdefault(len(cell["together"]), []).append(cell["together"][0])
    if reached:
        lines[f"{first}, no mask"] = {n: 100 * statistics.mean(reached[n]) for n in sorted(reached)}
    masked = Spread.of(cell["test"] for cell in _of(plain, set=first, method="memory-5"))
    level = None if masked is None else (f"{first}, masked: bits do not move", 100 * masked.mean)
    paper_panels(here, paper, lines, level, file)


def _of(cells: Cells, **key: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if cell.items() >= key.items()]


def _gains(cells: Cells, name: str, method: str, over: str) -> list[float]:
    """Points of a regime above another of the same seed, on one set."""
    base = {cell["seed"]: cell["test"] for cell in _of(cells, set=name, method=over)}
    mine = _of(cells, set=name, method=method)
    return [100 * (cell["test"] - base[cell["seed"]]) for cell in mine if cell["seed"] in base]


def _methods(plain: Cells) -> list[str]:
    """In the paper's order, the smaller first."""

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
    """Over all sets, in %; None where one has none."""
    found = [[cell["test"] for cell in _of(plain, set=name, method=method)] for name in _sets(plain)]
    return 100 * statistics.mean(map(statistics.mean, found)) if all(found) else None


def _beside(before: Sequence[float], after: Sequence[float]) -> list[str]:
    """The spreads of two, and of their difference."""
    change = [new - old for old, new in zip(before, after, strict=True)]
    return [shown(Spread.of(before)), shown(Spread.of(after)), shown(Spread.of(change), sign="+")]


def _yes(found: Iterable[bool]) -> str:
    return "yes" if all(found) else Markup("**NO**")
