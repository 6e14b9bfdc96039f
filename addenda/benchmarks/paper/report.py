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
from markupsafe import Markup

from addenda.backbones import FrozenBackbone
from addenda.benchmarks.baselines.regimes import AS_SHIPPED
from addenda.benchmarks.report.tables import NOTHING, Spread, Table, markdown, shown
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

SHOWN = ("learning_rate", "epoch", "strength")
NO = Markup("**NO**")

Cells = Sequence[Mapping[str, Any]]


def write_report(cells: Cells, backbone: FrozenBackbone, data: Path, limit: int | None, out: Path) -> None:
    """Writes paper.md, paper.csv and paper.png, and prints the first."""
    plain = [cell for cell in cells if cell["regime"] not in (PAIRS, COLLAPSE)]
    compared = [cell for cell in plain if cell["regime"] not in AS_SHIPPED]
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
        (_accuracies, compared), (_shipped, [cell for cell in plain if cell["regime"] in AS_SHIPPED]),
        (_training, plain), (_pairs, _of(cells, regime=PAIRS)), (_collapse, _of(cells, regime=COLLAPSE)),
    ) if group)  # fmt: skip
    (out / "paper.md").write_text(text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    _write_csv(cells, out / "paper.csv")
    if compared:
        _plot(_of(cells, regime=COLLAPSE), compared, out / "paper.png")
    console.print(f"Written to {out}: paper.md, paper.csv{', paper.png' if compared else ''}.")


def accuracy_table(plain: Cells) -> Table:
    """Test accuracy of every regime on every set, with the paper's own rows below."""
    regimes, sets = _regimes(plain), _sets(plain)
    rows = [[name, *(_test(plain, name, regime) for regime in regimes)] for name in sets]
    if len(rows) > 1:
        means = {regime: _mean_of_sets(plain, regime) for regime in regimes}
        rows.append([Markup("**mean**"), *(_bold(mean) for mean in means.values())])
        full, head = means.get("full"), means.get("head")
        if full is not None and head is not None:
            way = (NOTHING if m is None else f"{100 * (m - head) / (full - head):.0f} %" for m in means.values())
            rows.append(["of the way from head to full", *way])
    rows += [
        [Markup(f"*{name}* (paper)"), *(f"{row[r]:.1f}" if r in row else "" for r in regimes)]
        for name, row in PAPER.items()
    ]
    return Table(("set", *regimes), rows)


def shipped_table(cells: Cells) -> Table:
    """What a user gets beside the regression of the same seed, and the standard error of their mean difference."""
    rows = []
    for name in _sets(cells):
        row = [name, _test(cells, name, "regression")]
        for regime in ("default", "default+adapters"):
            gains = _gains(cells, name, regime, "regression")
            error = f"{statistics.stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else NOTHING
            row += [_test(cells, name, regime), f"{statistics.mean(gains):+.1f}" if gains else NOTHING, error]
        adapted = _of(cells, set=name, regime="default+adapters")
        rows.append(
            [*row, f"{sum(cell.get('chosen', {}).get('adapter_rank', 0) > 0 for cell in adapted)} of {len(adapted)}"]
        )
    head = ("set", "regression", "default", "difference", "s.e.", "adapters auto", "difference", "s.e.", "taken")
    return Table(head, rows)


def _accuracies(plain: Cells) -> str:
    note = (
        "full, unmasked and lora move the frozen tokens: trained for comparison, never registrable as exact. "
        "Validation chooses their epoch and learning rate by accuracy, those of the others by loss. The paper's rows: "
        "ViT-B/32 of ImageNet-21k."
    )
    return _section("Test accuracy, %, mean ± standard deviation over seeds.", accuracy_table(plain), note)


def _shipped(cells: Cells) -> str:
    note = (
        "As a user gets them: learned from all the images, the validation part too. s.e.: of the mean difference, each "
        "seed's from its own regression on the same images; the test set is one, so what another would say is not in "
        "it."
    )
    return _section("What `addenda learn` gives, test accuracy in %.", shipped_table(cells), note)


def _training(plain: Cells) -> str:
    rows = []
    for regime in _regimes(plain):
        mine = _of(plain, regime=regime)
        chosen = [
            " ".join(f"{k.replace('_', ' ')} {v}" for k, v in cell["chosen"].items() if k in SHOWN) for cell in mine
        ]
        seconds = sum(cell["seconds"] for cell in mine)
        images = sum(cell["num_images"] for cell in mine)
        rows.append([
            regime, f"{100 * statistics.mean(cell['validation'] for cell in mine):.1f}", f"{seconds / len(mine):.0f}",
            f"{images / seconds:.0f}" if images else NOTHING,
            "; ".join(f"{text} ({chosen.count(text)})" for text in sorted(set(chosen), key=chosen.count)[:-4:-1]),
        ])  # fmt: skip
    head = ("regime", "validation, %", "seconds", "images/s", "most often chosen")
    note = "images/s: those that training passed, all learning rates together, by the whole time of a cell."
    return _section("How they were trained, means over sets and seeds.", Table(head, rows), note)


def _pairs(pairs: Cells) -> str:
    extension, concatenation = [], []
    for place in _sets(pairs):
        mine = _of(pairs, set=place)
        one, other = place.split("+")
        alone, together = ([*zip(*(cell[key] for cell in mine), strict=True)] for key in ("alone", "together"))
        extended = [cell["extended"] for cell in mine]
        gains = [with_it - without for with_it, without in zip(extended, alone[1], strict=True)]
        identical = "yes" if all(cell["identical"] for cell in mine) else NO
        extension.append([other, one, _spread(alone[1]), _spread(extended), _spread(gains, "+"), identical])
        for name, by, among in zip((one, other), alone, together, strict=True):
            same = "yes" if by == among else NO
            concatenation.append([place, name, _spread(by), _spread(among), same, identical])
    extended_head = ("set", "extends", "alone, %", "extending, %", "difference", "old logits keep their bits")
    joined_head = ("pair", "set", "alone, %", "together, %", "equal to the last digit", "all logits keep their bits")
    extension_title = "Extension: memory-5, with and without sight of an earlier task."
    joined_title = "Concatenation under the mask: both tasks and the extension in one pass."
    parts = (extension_title, Table(extended_head, extension)), (joined_title, Table(joined_head, concatenation))
    return "".join(_section(title, table) for title, table in parts)


def _collapse(joined: Cells) -> str:
    rows = []
    for place in sorted(_sets(joined), key=lambda place: place.count("+")):
        mine = _of(joined, set=place)
        for i, name in enumerate(place.split("+")):
            alone, together = ([cell[key][i] for cell in mine] for key in ("alone", "together"))
            change = [after - before for before, after in zip(alone, together, strict=True)]
            rows.append([place.replace("+", " + "), name, _spread(alone), _spread(together), _spread(change, "+")])
    rows += [["(paper)", Markup(f"*iNaturalist* and {i} more"), "50.0", f"{v:.1f}", f"{v - 50:+.1f}"]
             for i, v in enumerate(PAPER_COLLAPSE) if i]  # fmt: skip
    head = ("joined", "set", "alone, %", "joined, %", "difference")
    return _section("Concatenation WITHOUT the mask, of unmasked-5 trained apart.", Table(head, rows))


def _section(title: str, table: Table, note: str = "") -> str:
    return f"\n{title}\n\n{markdown(table)}" + f"\n{note}\n" * bool(note)


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


def _plot(joined: Cells, plain: Cells, file: Path) -> None:
    from addenda.benchmarks.report.plots import paper_panels

    here = {
        name: {
            regime: spread
            for regime in _regimes(plain)
            if (spread := Spread.of(_gains(plain, name, regime, "head"))) is not None
        }
        for name in _sets(plain)
    }
    paper = {name: {r: Spread(value - row["head"], None) for r, value in row.items()} for name, row in PAPER.items()}
    first = _sets(plain)[0]
    lines = {"iNaturalist, no mask (paper)": dict(enumerate(PAPER_COLLAPSE, 1))}
    mine = [cell for cell in joined if cell["set"].split("+")[0] == first]
    if mine:
        counts = sorted({len(cell["together"]) for cell in mine})
        after = {n: statistics.mean(c["together"][0] for c in mine if len(c["together"]) == n) for n in counts}
        alone = statistics.mean(cell["alone"][0] for cell in mine)
        lines[f"{first}, no mask"] = {n: 100 * value for n, value in {1: alone, **after}.items()}
    masked = Spread.of(cell["test"] for cell in _of(plain, set=first, regime="memory-5"))
    level = None if masked is None else (f"{first}, masked: bits do not move", 100 * masked.mean)
    paper_panels({name: gains for name, gains in here.items() if gains}, paper, lines, level, file)


def _of(cells: Cells, **key: str) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if cell.items() >= key.items()]


def _gains(cells: Cells, name: str, regime: str, over: str) -> list[float]:
    """Points of a regime above another of the same seed, on one set."""
    base = {cell["seed"]: cell["test"] for cell in _of(cells, set=name, regime=over)}
    mine = _of(cells, set=name, regime=regime)
    return [100 * (cell["test"] - base[cell["seed"]]) for cell in mine if cell["seed"] in base]


def _regimes(plain: Cells) -> list[str]:
    """In the paper's order, the smaller first."""

    def order(regime: str) -> tuple[int, int]:
        kind, _, size = regime.partition("-")
        return ORDER.index(kind), int(size or 0)

    return sorted({cell["regime"] for cell in plain}, key=order)


def _sets(cells: Cells) -> list[str]:
    return list(dict.fromkeys(cell["set"] for cell in cells))


def _test(plain: Cells, name: str, regime: str) -> str:
    return _spread([cell["test"] for cell in _of(plain, set=name, regime=regime)])


def _mean_of_sets(plain: Cells, regime: str) -> float | None:
    """Over all sets, in %; None where one has none."""
    found = [[cell["test"] for cell in _of(plain, set=name, regime=regime)] for name in _sets(plain)]
    return 100 * statistics.mean(map(statistics.mean, found)) if all(found) else None


def _spread(values: Sequence[float], sign: str = "") -> str:
    return shown(Spread.of(values), "%", sign)


def _bold(mean: float | None) -> str:
    return NOTHING if mean is None else Markup(f"**{mean:.1f}**")
