"""What `addenda bench cost` has measured, as tables, JSON and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from addenda.benchmarks.report import tables
from addenda.benchmarks.report.tables import Table, markdown, write_json
from addenda.terminal import console, size

COLUMNS = ("way", "tasks", "images", "ms", "quartiles", "ratio", "limit", "G op/image", "G op/s", "tasks weigh")
NARROW = (0, 1, 3, 4, 5, 6, 8)
"""The columns that fit 80 characters; the files hold the rest."""


@dataclass(frozen=True)
class Row:
    """One way to answer, measured.

    Attributes:
        what: the way.
        num_tasks: tasks answered.
        num_images: images in the call.
        seconds: median time of a call.
        low: first quartile.
        high: third quartile.
        ratio: median over that of its reference.
        reference: what it is measured against.
        giga_operations: 1e9 multiply-adds counted for one image; None where they are not ours to count.
        limit: these operations without any filling, over the backbone's own: the ratio that arithmetic allows.
        task_bytes: what the tasks' keys, values, tokens and heads weigh on the device.
    """

    backbone: str
    what: str
    num_tasks: int
    num_images: int
    seconds: float
    low: float
    high: float
    ratio: float
    reference: str
    giga_operations: float | None = None
    limit: float | None = None
    task_bytes: int | None = None

    def cells(self) -> tuple[str, ...]:
        """The row of the table, as COLUMNS."""
        rate = None if self.giga_operations is None else self.giga_operations * self.num_images / self.seconds
        return (
            self.what,
            str(self.num_tasks),
            str(self.num_images),
            f"{1000 * self.seconds:.1f}",
            f"{1000 * self.low:.1f}–{1000 * self.high:.1f}",
            f"{self.ratio:.2f}",
            "" if self.limit is None else f"{self.limit:.2f}",
            "" if self.giga_operations is None else f"{self.giga_operations:.2f}",
            "" if rate is None else f"{rate:.0f}",
            "" if self.task_bytes is None else size(self.task_bytes),
        )


def show(where: str, rows: Sequence[Row]) -> None:
    """Prints a backbone's rows."""
    console.print(where)
    cells = [[row.cells()[place] for place in NARROW] for row in rows]
    title = "ratio: to stock timm (one image: of one image; vit-pytorch: to its own ViT)"
    tables.show(title, Table([COLUMNS[place] for place in NARROW], cells))


def write(rows: Sequence[Row], details: Mapping[str, Any], out: Path) -> None:
    """Writes cost.json, cost.md and cost.png."""
    from addenda.benchmarks.report.plots import cost_curves

    write_json(out / "cost.json", {**details, "rows": [asdict(row) for row in rows]})
    of = {name: [row for row in rows if row.backbone == name] for name in dict.fromkeys(row.backbone for row in rows)}
    parts = [f"**{name}**\n\n{markdown(Table(COLUMNS, [row.cells() for row in found]))}" for name, found in of.items()]
    (out / "cost.md").write_text("\n".join(parts))
    cost_curves({name: [asdict(row) for row in found] for name, found in of.items()}, out / "cost.png")
    console.print(f"Written to {out}: cost.json, cost.md, cost.png.")
