"""Draws docs/images: mask, forward pass, layer features, fixed shapes, the steps of learning, recorded results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

import numpy

DOCS = Path(__file__).resolve().parents[1] / "docs"
IMAGES = DOCS / "images"

# A card behind each drawing makes it readable on any page; its colours follow the system's light or dark mode.
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
    """The text of each SVG file, by name."""
    return {
        "mask.svg": mask(),
        "pass.svg": shared_pass(),
        "layers.svg": layer_features(),
        "shapes.svg": fixed_shapes(),
        "way.svg": steps(),
        "stages.svg": stages(),
    }


def mask() -> str:
    """The attention mask: rows are queries, columns are keys."""
    columns = ("frozen tokens", "class 1", "memory 1", "class 2", "memory 2")
    rows = (
        ("frozen tokens", "frozen", "10000"),
        ("class token 1", "one", "11100"),
        ("class token 2", "two", "10011"),
        ("class token 2, extending 1", "three", "11111"),
    )
    left, top, width, height = 280, 78, 112, 46
    parts = [text(left - 16, 58, "query  \\  key", "small end")]
    parts += [text(left + (i + 0.5) * width, 58, name, "bold middle") for i, name in enumerate(columns)]
    for row, (name, colour, mask_row) in enumerate(rows):
        y = top + row * height
        parts.append(text(left - 16, y + height / 2 + 2, name, "bold end"))
        for column, attends in enumerate(mask_row):
            x = left + column * width
            parts.append(rectangle(x + 3, y, width - 6, height - 6, colour if attends == "1" else "none"))
            parts.append(text(x + width / 2, y + height / 2 + 2, "attends" if attends == "1" else "–", "middle small"))
    parts.append(
        text(
            32,
            290,
            "Memory tokens are keys only. A task's tokens are visible to its class token and to those extending it.",
            "small",
        )
    )
    return svg(862, 316, "The attention mask: frozen tokens attend to frozen tokens only", parts)


def shared_pass() -> str:
    """The frozen stream above, the task streams below; arrows only point down."""
    layers = ((190, "block 1"), (350, "block 2"), (560, "block L"))
    parts = [
        rectangle(24, 58, 104, 52, "box"),
        text(76, 80, "image", "bold middle"),
        text(76, 99, "patches", "small middle"),
        arrow(128, 84, 190, 84),
        text(150, 36, "frozen stream: stock timm, computed once, attends to no task", "small"),
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
    parts.append(
        text(32, 376, "● class token of a task    ▮ its memory tokens in that layer, discarded after it.", "small")
    )
    parts.append(
        text(
            32,
            398,
            "All tasks' tokens go through a block's frozen weights together, in fixed-shape tiles; no arrow points up.",
            "small",
        )
    )
    return svg(920, 422, "The shared-prefix forward pass: one frozen stream, and one class token per task", parts)


def layer_features() -> str:
    """Every block of the frozen network feeds all tasks: statistics of its output, then one linear layer per task."""
    parts = [rectangle(24, 66, 96, 52, "box"), text(72, 97, "image", "bold middle"), arrow(120, 92, 160, 92)]
    parts.append(text(160, 40, "frozen stream: stock timm, computed once", "small"))
    for x, name in ((160, "block 1"), (310, "block 2"), (510, "block L-1"), (660, "block L")):
        parts += [rectangle(x, 66, 110, 52, "frozen"), text(x + 55, 97, name, "bold middle")]
        parts.append(arrow(x + 55, 118, x + 55, 150))
        names = ("class token",) if name == "block L" else ("class token", "mean of patches", "std of patches")
        parts += [text(x + 55, 170 + 18 * i, words, "small middle") for i, words in enumerate(names)]
        parts.append(arrow(x + 55, 158 + 18 * len(names), x + 55, 232))
    parts += [arrow(270, 92, 310, 92), arrow(420, 92, 452, 92), text(466, 95, "…", "middle"), arrow(480, 92, 510, 92)]
    parts += [arrow(620, 92, 660, 92), rectangle(160, 232, 610, 40, "frozen")]
    parts.append(text(465, 257, "layer features of the image, computed once for all tasks", "middle"))
    for x, name, colour, labels in ((190, "task 1", "one", 3), (400, "task 2", "two", 40), (610, "task 3", "three", 2)):
        parts += [arrow(x + 65, 272, x + 65, 308), rectangle(x, 308, 130, 50, colour)]
        parts += [text(x + 65, 329, name, "bold middle"), text(x + 65, 348, f"head, {labels} labels", "small middle")]
        parts.append(arrow(x + 65, 358, x + 65, 388))
        parts.append(text(x + 65, 406, "logits", "middle"))
    parts.append(text(32, 440, "A task with a token adds the logits of its token's head. No arrow points up.", "small"))
    return svg(796, 462, "Every block of the frozen network feeds every task's layer head", parts)


def fixed_shapes() -> str:
    """One sum in the two orders that two shapes get, and one in a fixed shape."""
    tiny, one = numpy.float32(2**-24), numpy.float32(1)
    sequence, lanes = (tiny + one) + tiny, (tiny + tiny) + one
    parts = [
        text(32, 38, "A mask alone: the shape grows, the order of additions changes", "bold"),
        text(32, 64, "task 1 alone: three keys, added one after another", "small"),
        *cells(32, 76, ("2⁻²⁴", "1", "2⁻²⁴")),
        text(460, 98, "(2⁻²⁴ + 1) + 2⁻²⁴"),
        text(640, 98, f"= {sequence:.8f}", "bold"),
        text(32, 142, "task 2 joined: three more keys, masked to exactly 0, added in two lanes (colours)", "small"),
        *cells(32, 154, ("2⁻²⁴", "1", "2⁻²⁴", "0", "0", "0"), ("one", "three", "one", "three", "one", "three")),
        text(460, 176, "(2⁻²⁴ + 2⁻²⁴) + 1"),
        text(640, 176, f"= {lanes:.8f}", "bold"),
        text(32, 240, "Fixed shapes: a task's shape never changes, so neither does the order", "bold"),
        text(32, 266, "task 1 alone: one slot of a tile is filled, the others are zero", "small"),
        *cells(32, 278, ("task 1", *["0"] * 5), ("one", *["box"] * 5)),
        text(460, 300, "same order"),
        text(640, 300, "logits of task 1", "bold"),
        text(32, 344, "tasks 2 and 3 joined: two more slots are filled", "small"),
        *cells(32, 356, ("task 1", "task 2", "task 3", "0", "0", "0"), ("one", "two", "three", *["box"] * 3)),
        text(460, 378, "same order"),
        text(640, 378, "the same bits", "bold"),
        text(32, 424, "Each addition rounds to float32. A library chooses the lanes, and so the order, by", "small"),
        text(32, 444, "the shape and the number of threads. A real tile has 16 slots.", "small"),
    ]
    return svg(800, 466, "Why a mask alone changes bits, and what fixed shapes do", parts)


def cells(x: float, y: float, words: tuple[str, ...], colours: tuple[str, ...] = ()) -> list[str]:
    """A row of boxes with a word in each."""
    parts = []
    for i, (word, colour) in enumerate(zip(words, colours or ["one"] * len(words), strict=True)):
        parts += [rectangle(x + 68 * i, y, 64, 34, colour), text(x + 68 * i + 32, y + 22, word, "middle")]
    return parts


def steps() -> str:
    """The steps from a folder of images to served predictions."""
    boxes = (
        ("folder", "one folder per class;", "images identified by sha256", "box"),
        ("cache", "frozen activations, once", "per image and view", "frozen"),
        ("probes", "linear probe, layer probe:", "convex or in closed form", "box"),
        ("sweep", "candidates in parallel; a", "token if validation improves", "one"),
        ("refit", "on training and validation", "images; then calibration", "one"),
        ("register", "artifact, golden probe and", "event in one transaction", "two"),
        ("verify", "self-test; golden probe on", "the model as served", "two"),
        ("serve", "all tasks in one forward", "pass; old logits unchanged", "three"),
    )
    parts = []
    width, height, gap = 204, 92, 32
    for number, (name, first, second, colour) in enumerate(boxes):
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
    return svg(960, 282, "The steps from a folder of images to served predictions", parts)


def stages() -> str:
    """Accuracy on each pair of digits after each task, for four methods, from docs/results."""
    results = json.loads((DOCS / "results" / "continual.json").read_text(encoding="utf-8"))["digits"]
    names = [experience["name"].removeprefix("digits-") for experience in results["experiences"]]
    cell, step, left, top = 39, 222, 74, 92
    parts = [text(left - 10, top + (i + 0.5) * cell + 4, f"after {n}", "small end") for i, n in enumerate(names)]
    for panel, (method, title) in enumerate(
        (("addenda", "Addenda"), ("replay", "experience replay"), ("ewc", "EWC"), ("naive", "fine-tuning"))
    ):
        cells = [entry for entry in results["cells"] if entry["method"] == method]  # one for each seed
        difference = max(entry["max_difference"] for entry in cells)
        identical = all(entry["identical"] for entry in cells)
        x = left + panel * step
        parts += [text(x, 32, title, "bold")]
        parts += [text(x, 53, "old logits: " + ("identical" if identical else f"change by {difference:.2g}"), "small")]
        parts += [text(x + (j + 0.5) * cell, 80, name, "small middle") for j, name in enumerate(names)]
        for i in range(len(names)):
            for j in range(i + 1):
                accuracy = sum(entry["task_incremental"][i][j] for entry in cells) / len(cells)
                at_x, at_y = x + j * cell, top + i * cell
                strength = f' fill-opacity="{max(0.0, 2 * accuracy - 1):.2f}"'
                parts.append(rectangle(at_x, at_y, cell - 3, cell - 3, "two", strength))
                parts.append(text(at_x + cell / 2 - 1, at_y + cell / 2 + 4, f"{100 * accuracy:.0f}", "middle"))
    return svg(left + 4 * step, top + 5 * cell + 16, "Accuracy after each of five tasks, by four methods", parts)


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """An SVG of width x height units on a card."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" width="{width}">'
    card = f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10" class="card"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", card, *parts, "</svg>", ""])


def rectangle(x: float, y: float, width: float, height: float, colour: str, attributes: str = "") -> str:
    """A rectangle with its upper left corner at x, y."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{colour}"{attributes}/>'


def text(x: float, y: float, words: str, classes: str = "") -> str:
    """Text on the baseline y, starting at x; the classes `middle` and `end` align it otherwise."""
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{escape(words)}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """A horizontal or vertical arrow."""
    dx, dy = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
    back_x, back_y = to_x - 8 * dx, to_y - 8 * dy
    tip = f"{to_x:g},{to_y:g} {back_x + 4 * dy:g},{back_y + 4 * dx:g} {back_x - 4 * dy:g},{back_y - 4 * dx:g}"
    return f'<path d="M{x:g} {y:g}L{back_x:g} {back_y:g}" class="line"/><polygon points="{tip}" class="tip"/>'


if __name__ == "__main__":
    main()
