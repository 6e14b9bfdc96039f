"""The field's words: what docs/glossary.md and a reader of the field do not know fails here, with the word to use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places import ROOT

SAY = {
    r"\brivals?\b": "baseline",
    r"\bregimes?\b": "method",
    r"\buntold\b": "class-incremental",
    r"\b(being|is|was|are|when|once) told (the|which|what|whose) (task|class)": "task-incremental",
    r"\bthe regression\b": "the linear probe",
    r"\bnumerics? epochs?\b|\bepochs? of (the )?numerics\b": "numerics change",
    r"\bkept activations\b": "cached activations",
    r"\bactivations are kept\b": "are cached",
    r"\bmakes? room\b": "evicts",
    r"\bset free\b": "freed",
    r"\bcounts? no more\b": "revoked",
    r"\b(is|are) of no use\b": "is discarded",
    r"\bare told to come again\b": "get 503 with Retry-After",
    r"\bas it no longer is\b": "a precondition failed",
    r"\bfor ever\b": "permanently",
    r"\bwhatever the company\b": "in any batch",
    r"\bwho(ever)? needs a key\b": "authenticated requests",
    r"\bsilenced?\b": "a token weight of 0",
}
"""Words that the glossary of the project replaces, and what to write; whole phrases where a word has a plain use."""

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEMPLATES = sorted(path for path in (ROOT / "addenda").rglob("*") if path.suffix in (".j2", ".html", ".js"))
MODULES = sorted((ROOT / "addenda").rglob("*.py"))


def strings(module: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string of a module, docstrings among them, and of each comment."""
    source = module.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for number, line in enumerate(source.splitlines(), 1):
        code, hash_sign, comment = line.partition("  # ")
        if hash_sign or line.lstrip().startswith("# "):
            yield number, comment or code


def texts(path: Path) -> Iterator[tuple[int, str]]:
    if path.suffix == ".py":
        yield from strings(path)
    else:
        yield from enumerate(re.split(r"\n(?=\n)", path.read_text(encoding="utf-8")), 1)  # paragraph by paragraph


def misused(text: str) -> list[str]:
    plain = " ".join(text.split())
    return [
        f"{found[0]!r}: write {instead!r}" for word, instead in SAY.items()
        if (found := re.search(word, plain, re.IGNORECASE))
    ]  # fmt: skip


@pytest.mark.parametrize("files", [MODULES, PAGES, TEMPLATES], ids=["package", "pages", "templates"])
def test_what_a_person_reads_is_in_the_fields_words(files: list[Path]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{where}: {said}"
        for path in files for where, text in texts(path) for said in misused(text)
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_the_words_are_found_across_lines_and_in_any_case() -> None:
    assert misused("accuracy, Untold") == ["'Untold': write 'class-incremental'"]
    assert misused("the task being\n    told the task") == ["'being told the task': write 'task-incremental'"]
    assert misused("It tells which task an image is of.") == []
