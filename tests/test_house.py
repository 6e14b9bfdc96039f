"""House rules: some operations are allowed in one place only, and each tensor that is made names dtype and device."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "addenda"

ONLY = {
    # The attribute as written in the source, and the only modules and folders that may use it.
    "backbone.model": ("backbones",),
    "backbone.stream": ("combined/forward.py",),
    "family.last": ("backbones",),
    "torch.autocast": ("backbones/arithmetic.py", "benchmarks/baselines"),
    "torch.inference_mode": ("backbones/arithmetic.py",),
}
"""timm's module; the frozen stream; its reduced last block; autocast, which baselines may use on their own models."""


def written(tree: ast.AST) -> Iterator[str]:
    """Each attribute with the name before it: `a._backbone.model` yields "backbone.model"."""
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


def test_no_two_modules_and_no_two_classes_share_a_name() -> None:
    modules = Counter(path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    classes = Counter(
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in (modules + classes).items() if count > 1] == []


def test_what_starts_ray_is_in_the_folder_that_make_test_ray_runs() -> None:
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark." + "ray" in path.read_text()]
    assert {path.parent.name for path in tests} == {"distributed"}


FACTORIES = {
    "zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "logspace", "eye",
    "tensor", "scalar_tensor", "empty_strided", "triu_indices", "tril_indices", "normal",
}  # fmt: skip


def test_every_tensor_that_the_package_makes_names_its_dtype_and_device() -> None:
    """The caller may change torch's defaults."""
    missing_names, num_calls = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if getattr(node.func.value, "id", "") == "torch" and node.func.attr in FACTORIES:
                num_calls += 1
                missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
                missing_names += [f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}" for name in sorted(missing)]
    assert num_calls > 50
    assert missing_names == []
