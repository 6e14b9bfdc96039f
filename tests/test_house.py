"""The house: what only one place may do is done nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "addenda"

ONLY = {
    # The method or attribute, as it is written, and the only modules and folders that have it.
    "backbone.model": ("backbones",),
    "backbone.stream": ("combined/forward.py",),
    "family.last": ("backbones",),
    "torch.autocast": ("backbones/arithmetic.py", "benchmarks/baselines"),
    "torch.inference_mode": ("backbones/arithmetic.py",),
}
"""timm's own module; the frozen stream; its lean last block; autocast, which baselines may use on what is theirs."""


def written(tree: ast.AST) -> Iterator[str]:
    """Each attribute with the name that it is asked of: `a._backbone.model` gives "backbone.model"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = getattr(node.value, "attr", getattr(node.value, "id", ""))
            yield f"{of.lstrip('_')}.{node.attr}"


@pytest.mark.parametrize("name", ONLY)
def test_it_is_done_in_one_place(name: str) -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if name in written(ast.parse(path.read_text()))
    }
    assert found, f"{name} is nowhere"
    assert {path for path in found if not path.startswith(ONLY[name])} == set()
