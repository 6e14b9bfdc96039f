"""Writes the figures of docs/results/*.json into the pages that quote them, between two HTML comments.

    python scripts/write_results.py                                     # updates the pages from the recorded results
    python scripts/write_results.py continual digits out/results.json   # records a run under a name first

A run is the JSON file that a benchmark wrote to `--out`; for `paper` it is cells.jsonl.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from addenda.benchmarks.continual.columns import CLASS_ACCURACY, SHORT, method_rows
from addenda.benchmarks.continual.results import Results
from addenda.benchmarks.cost import COLUMNS, CostRow
from addenda.benchmarks.paper.paper_report import COLLAPSE, PAIRS, accuracy_table, best_of_rates, shipped_table
from addenda.benchmarks.report.tables import Figure, Table, markdown, table_of

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECORDS = DOCS / "results"
REGION = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
DIGITS = 9


def main() -> None:
    """Records a run if one is given, then writes every page."""
    if len(sys.argv) > 1:
        kind, name, file = sys.argv[1:]
        recorded, text = record(kind), Path(file).read_text(encoding="utf-8")
        if kind == "paper":
            cells = map(json.loads, text.splitlines())
            run = {"rows": [{key: value for key, value in cell.items() if key != "settings"} for cell in cells]}
        else:
            run = json.loads(text)
        (RECORDS / f"{kind}.json").write_text(compact({**recorded, name: run}), encoding="utf-8")
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def record(kind: str) -> dict[str, Any]:
    """All recorded runs of a benchmark, by name."""
    runs: dict[str, Any] = json.loads((RECORDS / f"{kind}.json").read_text(encoding="utf-8"))
    return runs


def pages() -> dict[Path, str]:
    """The text of each page that quotes results."""
    updated = {}
    for path in [*DOCS.glob("*.md"), *RECORDS.glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        new_text = REGION.sub(lambda match: f"{match[1]}\n{REGIONS[match[2]]()}\n{match[4]}", text)
        if REGION.search(text):
            updated[path] = new_text
    return updated


def compact(value: Any, depth: int = 0) -> str:
    """JSON with one line per row of a list of rows, and numbers with nine digits."""
    if isinstance(value, dict) and depth < 2:
        parts = [f"{json.dumps(key)}: {compact(below, depth + 1).strip()}" for key, below in value.items()]
        return "{\n" + ",\n".join(parts) + "\n}" + "\n" * (depth == 0)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(_rounded(row), ensure_ascii=False) for row in value) + "\n]"
    return json.dumps(_rounded(value), ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_rounded(below) for below in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def stream(name: str) -> Results:
    """The recorded run of `addenda bench continual` on a stream."""
    return Results.from_json(json.dumps(record("continual")[name]), f"continual.json, {name},")


def stream_table(name: str) -> str:
    """All methods on a stream."""
    results = stream(name)
    settings = ("with task labels", "without") if name in DOMAINS else ("task-incremental", "class-incremental")
    columns = ("method", *settings, "forgetting", "old logits", "stored per task", "training, s", "forward passes")
    return markdown(Table(columns, method_rows(results, SHORT)))


def streams_table() -> str:
    """Accuracy without task labels of the methods on a frozen backbone that were run on every stream."""
    names = ("addenda", "ranpac", "ranpac-adapted", "fecam", "gaussian-replay", "nearest-mean", "slda")
    rows = [[name, *(CLASS_ACCURACY.text(stream(name).of(method)) for method in names)] for name in STREAMS]
    labels = {note.name: note.label for note in stream(STREAMS[0]).methods}
    return markdown(Table(["without task labels, %", *(labels[name] for name in names)], rows))


def routers_table() -> str:
    """Accuracy without task labels of each router, and the AUROC for unknown tasks."""
    routers = ("max softmax", "energy", "nearest mean", "mahalanobis", "ridge", "layers", "the router")
    rows = []
    for name in STREAMS:
        extras = [cell.extra for cell in stream(name).of("addenda")]
        means = (statistics.mean(extra["routers"][router] for extra in extras) for router in routers)
        auroc = statistics.mean(extra["auroc"] for extra in extras)
        rows.append([name, *(f"{100 * mean:.1f}" for mean in means), f"{auroc:.3f}"])
    return markdown(
        Table(["stream", *routers[:3], "Mahalanobis", "ridge", "layers", "all three (default)", "AUROC"], rows)
    )


def measured(kind: str, name: str) -> list[Figure]:
    """The figures of a recorded run."""
    rows = record(kind)[name]["figures"]
    return [Figure(**{key: value for key, value in row.items() if key != "met"}) for row in rows]


def figures_table(kind: str, *names: str) -> str:
    """Complete runs, with a table for each group of figures."""
    parts = []
    for name in names:
        parts.append(f"`{record(kind)[name]['command']}`\n")
        figures = measured(kind, name)
        for group in dict.fromkeys(figure.group for figure in figures):
            table = table_of([figure for figure in figures if figure.group == group])
            parts.append(f"**{group}**\n\n{markdown(table)}")
    return "\n".join(parts)


def cost_rows() -> list[CostRow]:
    """The rows of the run on two CPU cores."""
    return [CostRow(**row) for row in record("cost")["cpu"]["rows"]]


def whole_cost_table() -> str:
    """Every method on every backbone."""
    rows = cost_rows()
    names = dict.fromkeys(row.backbone for row in rows)
    return "\n".join(
        f"**{name}**\n\n{markdown(Table(COLUMNS, [row.cells() for row in rows if row.backbone == name]))}"
        for name in names
    )


def cost_table() -> str:
    """Cost ratios and their targets."""
    ratio = {(row.backbone, row.what, row.num_tasks): row.ratio for row in cost_rows()}
    names = list(dict.fromkeys(row.backbone for row in cost_rows()))

    def over(what: str) -> list[str]:
        return [f"{ratio[name, what, 256] / ratio[name, 'combined, exact', 256]:.1f}" for name in names]

    def ratios(what: str, count: int) -> list[str]:
        return [f"{ratio[name, what, count]:.2f}" for name in names]

    rows = [
        ["10 tasks", "1.10 (Ti 1.27)", *ratios("combined, exact", 10)],
        ["100 tasks", "1.70 (Ti 1.96)", *ratios("combined, exact", 100)],
        ["1,000 tasks", "7.5 (Ti 8.6)", *ratios("combined, exact", 1000)],
        ["one image, 10 tasks, against one image", "1.5", *ratios("one image, exact", 10)],
        ["256 tasks: the dense mask over ours", "2", *over("dense mask")],
        ["256 tasks: the dense mask with precomputed memory over ours", "2", *over("dense mask, precomputed")],
    ]
    columns = ("against stock timm, 8 images (medians)", "target", "ViT-Ti", "ViT-S", "ViT-B")
    return markdown(Table(columns, rows))


def serving_table() -> str:
    """Throughput and the latency of one image relative to the bare model; the first without and with a worker."""
    rows, figures = [], measured("serving", "one-process")
    for group in dict.fromkeys(figure.group for figure in figures):
        by_name = {figure.what: figure for figure in figures if figure.group == group}
        if "stock timm alone" in by_name:
            rates = ("stock timm alone", "the combined model alone", "served, 24 clients", "served with 1 worker")
            shares = [by_name[what] for what in ("served / the combined model", "with 1 worker / the combined model")]
            ranges = [f"{share.measured:.2f} ({share.low:.2f}–{share.high:.2f})" for share in shares]
            ranges.append(f"{by_name['that / the combined model'].measured:.2f}")
            rows.append([f"{int(group.split()[0]):,}", *(f"{by_name[rate].measured:.1f}" for rate in rates), *ranges])
    columns = (
        "tasks", "stock timm alone, images/s", "combined model alone", "served, 24 clients", "with a worker",
        "share of the combined model alone", "that share with a worker",
        "p50 of one image, one client, relative to the model alone",
    )  # fmt: skip
    return markdown(Table(columns, rows))


def registry_table() -> str:
    """Registry timings: registration, reading, listing and change notification."""
    figures = measured("registry", "two-databases")
    groups = list(dict.fromkeys(figure.group for figure in figures))

    def of(what: str, group: str) -> Figure:
        return next(figure for figure in figures if (figure.what, figure.group) == (what, group))

    def cells(what: str, unit: str = "") -> list[str]:
        row = [of(what, group) for group in groups]
        return [f"{figure.measured:.{0 if figure.measured >= 20 else 1 if figure.measured >= 2 else 2}f}{unit}"
                for figure in row]  # fmt: skip

    slowest = [max(f.measured for f in figures if f.group == group and f.what.startswith("page")) for group in groups]
    rows = [
        ["registering, without routing statistics", "≥ 100 per s", *cells("registered without statistics")],
        ["registering, with routing statistics", "≥ 100 per s", *cells("registered with statistics")],
        ["reading and hashing 1,000 tasks", "≤ 2 s", *cells("1,000 tasks read and hashed")],
        ["listing a page of 100 from 100,000 tasks", "≤ 50 ms", *cells("page: first")],
        ["the same with the slowest filter", "≤ 50 ms", *(f"{value:.0f}" for value in slowest)],
        [Markup("change noticed by `wait`"), "", *cells("a change noticed by wait()", " ms")],
    ]
    return markdown(Table(["", "target", *(group.split()[0] for group in groups)], rows))


def learn_table() -> str:
    """`addenda learn` as shipped, next to the probes and, where there are any, baselines."""
    return markdown(shipped_table(best_of_rates(record("paper")["learn"]["rows"])))


def paper_table() -> str:
    """The paper's methods on our own datasets."""
    rows = record("paper")["table"]["rows"]
    return markdown(accuracy_table([row for row in rows if row["method"] not in (PAIRS, COLLAPSE)]))


STREAMS: Sequence[str] = ("digits", "mixed", "split-cifar10", "pacs")
DOMAINS = ("pacs",)
"""Domain-incremental streams."""


def backbones_table() -> str:
    """How many of timm's models carry layer heads and tokens, and why the others do not."""
    found = json.loads((RECORDS / "backbones.json").read_text(encoding="utf-8"))
    models, vits, tokens = found["models"], found["vits"], found["tokens"]
    rows = [
        [f"all models, in {found['classes']} classes", f"{models:,}", ""],
        ["carry layer heads", f"{found['layer_heads']:,}", f"{100 * found['layer_heads'] / models:.1f} % of all"],
        ["VisionTransformer and Eva", f"{vits:,}", ""],
        ["carry tokens", f"{tokens:,}", f"{100 * tokens / vits:.1f} % of these"],
    ]
    for reason, count in found["vits_without_tokens"].items():
        rows.append([f"no tokens: {reason}", f"{count:,}", ""])
    for reason, names in found["without_layer_heads"].items():
        *_, error = reason.partition("eval mode: ")
        rows.append([f"no layer heads: {error or reason}", f"{len(names):,}", f"{names[0]}" + " …" * (len(names) > 1)])
    return markdown(Table([f"timm {found['timm']}", "models", ""], rows))


REGIONS: Mapping[str, Callable[[], str]] = {
    "learn": learn_table,
    "paper": paper_table,
    "streams": streams_table,
    **{f"stream-{name}": lambda name=name: stream_table(name) for name in STREAMS},
    "routers": routers_table,
    "registry": registry_table,
    "cost": cost_table,
    "cost-whole": whole_cost_table,
    "serving": serving_table,
    "serving-whole": lambda: figures_table("serving", "one-process", "replicas", "2000-tasks"),
    "training": lambda: markdown(table_of(measured("training", "cpu"))),
    "backbones": backbones_table,
}

if __name__ == "__main__":
    main()
