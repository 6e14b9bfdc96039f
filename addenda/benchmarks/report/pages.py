"""Reports of many pictures as one Markdown and one HTML page, by templates that escape whatever is put into them."""

from __future__ import annotations

import textwrap
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from addenda.benchmarks.report.tables import escaped, markdown


def write_pages(name: str, content: Mapping[str, Any], folder: Path) -> None:
    """Writes report.md and report.html, which show the same, by the templates of a name."""
    for kind in ("md", "html"):
        # Markdown is escaped by `finalize`, before HTML's own way, which leaves Markup alone.
        made = Environment(
            loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
            finalize=(lambda value: Markup(escaped(value))) if kind == "md" else None,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip
        made.filters |= {"base64": lambda data: b64encode(data).decode(), "block": _block, "markdown": markdown}
        text = made.get_template(f"{name}.{kind}.j2").render(content)
        (folder / f"report.{kind}").write_text(text, encoding="utf-8")


def _block(text: str) -> Markup:
    """A block of code by indentation, which no content can end."""
    return Markup(textwrap.indent(text, "    ", lambda line: True))
