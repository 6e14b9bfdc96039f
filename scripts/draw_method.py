"""Draws docs/images: the mask, the shared-prefix pass, a task's way, and the README's picture of kept results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parents[1] / "docs"
IMAGES = DOCS / "images"

# Each drawing has a card of its own under it, so that it reads on any page; its colours follow the reader's system.
STYLE = """
text { font: 15px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2530; }
.small { font-size: 13px; fill: #596274; }
.bold { font-weight: 600; }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.card { fill: #ffffff; stroke: #d5dae2; }
.box { fill: #f1f3f7; stroke: #8a93a5; }
.frozen { fill: #cfdcf0; stroke: #5b7bb0; }
.one { fill: #f6c9a3; stroke: #b5682a; }
.two { fill: #bfe3cd; stroke: #3b8a5c; }
.three { fill: #e0cdf0; stroke: #8456ab; }
.none { fill: none; stroke: #d5dae2; }
.line { fill: none; stroke: #8a93a5; stroke-width: 1.5; }
.tip { fill: #8a93a5; }
@media (prefers-color-scheme: dark) {
text { fill: #e6e9ef; }
.small { fill: #a6afbf; }
.card { fill: #1d212a; stroke: #3a414e; }
.box { fill: #2a303b; }
.frozen { fill: #2f4365; }
.one { fill: #74441d; }
.two { fill: #23553a; }
.three { fill: #523468; }
.none { stroke: #3a414e; }
}
"""


def main() -> None:
    """Writes the drawings into docs/images."""
    IMAGES.mkdir(exist_ok=True)
    for name, drawing in drawings().items():
        (IMAGES / name).write_text(drawing, encoding="utf-8")


def drawings() -> dict[str, str]:
    """Each file's name and text."""
    return {"mask.svg": mask(), "pass.svg": shared_pass(), "way.svg": way(), "stages.svg": stages()}


def mask() -> str:
    """Who attends to whom: the rows ask, the columns are seen."""
    columns = ("frozen tokens", "token 1", "memory 1", "token 2", "memory 2")
    rows = (
        ("frozen tokens", "frozen", "10000"),
        ("token of task 1", "one", "11100"),
        ("token of task 2, on its own", "two", "10011"),
        ("token of task 2, extending 1", "three", "11111"),
    )
    left, top, width, height = 280, 78, 112, 46
    parts = [text(left - 16, 58, "asks  \\  is seen", "small end")]
    parts += [text(left + (i + 0.5) * width, 58, name, "bold middle") for i, name in enumerate(columns)]
    for row, (name, colour, seen) in enumerate(rows):
        y = top + row * height
        parts.append(text(left - 16, y + height / 2 + 2, name, "bold end"))
        for column, sees in enumerate(seen):
            x = left + column * width
            parts.append(rectangle(x + 3, y, width - 6, height - 6, colour if sees == "1" else "none"))
            parts.append(text(x + width / 2, y + height / 2 + 2, "sees" if sees == "1" else "–", "middle small"))
    parts.append(
        text(
            32,
            290,
            "Memory never asks. No row but a task's own, and those that extend it, sees what is a task's.",
            "small",
        )
    )
    return svg(862, 316, "The attention mask: frozen tokens see frozen tokens only", parts)


def shared_pass() -> str:
    """The frozen stream above, tasks' streams below: arrows go down only."""
    layers = ((190, "block 1"), (350, "block 2"), (560, "block L"))
    parts = [
        rectangle(24, 58, 104, 52, "box"),
        text(76, 80, "image", "bold middle"),
        text(76, 99, "patches", "small middle"),
        arrow(128, 84, 190, 84),
        text(150, 36, "frozen stream: stock timm, computed once, sees no task", "small"),
        text(504, 89, "…", "middle"),
        arrow(310, 84, 350, 84),
        arrow(516, 84, 560, 84),
    ]
    for x, name in layers:
        parts += [
            rectangle(x, 58, 120, 52, "frozen"),
            text(x + 60, 89, name, "bold middle"),
            arrow(x + 60, 110, x + 60, 158),
        ]
        parts.append(text(x + 68, 136, "keys, values", "small"))
    for lane, (name, colour, labels) in enumerate(
        (("task 1", "one", "3 labels"), ("task 2", "two", "40 labels"), ("task 3", "three", "2 labels"))
    ):
        y = 186 + lane * 62
        parts += [text(32, y + 5, name, "bold"), f'<circle cx="142" cy="{y}" r="13" class="{colour}"/>']
        ends = [155]
        for x, _ in layers:
            parts.append(rectangle(x, y - 22, 120, 44, "box"))
            parts += [rectangle(x + 48 + 13 * i, y - 7, 10, 14, colour) for i in range(5)]
            parts += [f'<circle cx="{x + 22}" cy="{y}" r="11" class="{colour}"/>', arrow(ends[-1], y, x, y)]
            ends.append(x + 120)
        parts.append(rectangle(730, y - 17, 52, 34, colour))
        parts += [
            arrow(680, y, 730, y),
            text(756, y + 5, "head", "middle"),
            arrow(782, y, 816, y),
            text(824, y + 5, labels),
        ]
    parts.append(text(32, 376, "● a task's token    ▮ its memory in that layer, discarded after it.", "small"))
    parts.append(
        text(
            32,
            398,
            "All tasks' tokens pass a block's own weights together, in tiles of a fixed shape; nothing points upward.",
            "small",
        )
    )
    return svg(920, 422, "The shared-prefix pass: one frozen stream, one token a task beside it", parts)


def way() -> str:
    """From a folder of images to a served answer."""
    steps = (
        ("folder", "a folder for each class,", "every image by its sha256", "box"),
        ("keep", "what the frozen stream", "offers, once an image", "frozen"),
        ("probes", "linear, and of every", "layer, in closed form", "box"),
        ("sweep", "tokens side by side, added", "to the probe if they pay", "one"),
        ("refit", "what was chosen, on all", "images; then calibrated", "one"),
        ("register", "artifact, golden probe,", "event: all or nothing", "two"),
        ("prove", "self-test; the probe again,", "as it will be served", "two"),
        ("serve", "every task from one pass;", "old bits as they were", "three"),
    )
    parts = []
    width, height, gap = 204, 92, 32
    for number, (name, first, second, colour) in enumerate(steps):
        row, column = divmod(number, 4)
        column = column if row == 0 else 3 - column
        x, y = 24 + column * (width + gap), 24 + row * (height + 50)
        parts += [rectangle(x, y, width, height, colour), text(x + 14, y + 29, f"{number + 1}  {name}", "bold")]
        parts += [text(x + 14, y + 55, first, "small"), text(x + 14, y + 74, second, "small")]
        if number == 3:
            parts.append(arrow(x + width / 2, y + height, x + width / 2, y + height + 50))
        elif row == 0:
            parts.append(arrow(x + width, y + height / 2, x + width + gap, y + height / 2))
        elif number < 7:
            parts.append(arrow(x, y + height / 2, x - gap, y + height / 2))
    return svg(960, 282, "A task's way from a folder of images to a served answer", parts)


def stages() -> str:
    """Accuracy on each pair of digits after each was learned, by four methods, from the results that the docs keep."""
    results = json.loads((DOCS / "results" / "continual.json").read_text(encoding="utf-8"))["digits"]
    names = [experience["name"].removeprefix("digits-") for experience in results["experiences"]]
    cell, step, left, top = 39, 222, 74, 92
    parts = [text(left - 10, top + (i + 0.5) * cell + 4, f"after {n}", "small end") for i, n in enumerate(names)]
    for panel, (method, title) in enumerate(
        (("addenda", "Addenda"), ("replay", "experience replay"), ("ewc", "EWC"), ("naive", "fine-tuning"))
    ):
        seeds = [one for one in results["cells"] if one["method"] == method]
        moved = max(one["max_difference"] for one in seeds)
        kept = all(one["identical"] for one in seeds)
        x = left + panel * step
        parts += [text(x, 32, title, "bold")]
        parts += [text(x, 53, "old logits: " + ("identical" if kept else f"move by {moved:.2g}"), "small")]
        parts += [text(x + (j + 0.5) * cell, 80, name, "small middle") for j, name in enumerate(names)]
        for i in range(len(names)):
            for j in range(i + 1):
                accuracy = sum(one["task_incremental"][i][j] for one in seeds) / len(seeds)
                at_x, at_y = x + j * cell, top + i * cell
                strength = f' fill-opacity="{max(0.0, 2 * accuracy - 1):.2f}"'
                parts.append(rectangle(at_x, at_y, cell - 3, cell - 3, "two", strength))
                parts.append(text(at_x + cell / 2 - 1, at_y + cell / 2 + 4, f"{100 * accuracy:.0f}", "middle"))
    return svg(left + 4 * step, top + 5 * cell + 16, "Accuracy after each of five tasks, by four methods", parts)


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A drawing of width x height units on a card of its own."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" width="{width}">'
    card = f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10" class="card"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", card, *parts, "</svg>", ""])


def rectangle(x: float, y: float, width: float, height: float, colour: str, more: str = "") -> str:
    """A rectangle with its upper left corner at x, y."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{colour}"{more}/>'


def text(x: float, y: float, words: str, looks: str = "") -> str:
    """Words on the baseline y, from x on unless they are `middle` or `end`."""
    return f'<text x="{x:g}" y="{y:g}" class="{looks}">{escape(words)}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A horizontal or vertical arrow."""
    dx, dy = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
    back_x, back_y = to_x - 8 * dx, to_y - 8 * dy
    tip = f"{to_x:g},{to_y:g} {back_x + 4 * dy:g},{back_y + 4 * dx:g} {back_x - 4 * dy:g},{back_y - 4 * dx:g}"
    return f'<path d="M{x:g} {y:g}L{back_x:g} {back_y:g}" class="line"/><polygon points="{tip}" class="tip"/>'


if __name__ == "__main__":
    main()
