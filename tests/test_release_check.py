"""The checks of `make release-check` on generated archives and metadata; a release runs the script itself."""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest

from addenda import FrozenBackbone, Registry
from addenda.benchmarks.demo import digits
from addenda.combined import golden
from tests.support.places import ROOT
from tests.support.processes import Forked
from tests.support.scripts import script
from tests.support.tasks import random_task


@pytest.fixture(scope="module", name="script")
def release_check() -> ModuleType:
    return script("release_check")


def archived(folder: Path, name: str, files: dict[str, int]) -> Path:
    """Creates an archive with files of the given sizes."""
    path = folder / name
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for file, size in files.items():
                wheel.writestr(file, b"x" * size)
        return path
    with tarfile.open(path, "w:gz") as sdist:
        for file, size in files.items():
            entry = tarfile.TarInfo(f"{name.removesuffix('.tar.gz')}/{file}")
            entry.size = size
            sdist.addfile(entry, io.BytesIO(b"x" * size))
    return path


@pytest.mark.slow
def test_what_is_built_is_all_of_the_package_and_nothing_else(script: ModuleType, tmp_path: Path) -> None:
    for archive, wanted in zip(script.build(tmp_path), script.wanted_files(), strict=True):
        assert script.faults(script.contents(archive), wanted) == []


def test_what_belongs_into_a_release_is_said_of_its_archives(script: ModuleType) -> None:
    wheel, sdist = script.wanted_files()
    for part in (
        "addenda/py.typed",
        "addenda/serving/templates/home.html",
        "addenda/serving/static/page.css",
        "addenda/registry/migrations/versions/0001_first_schema.py",
        "addenda/benchmarks/continual/streams/digits.yaml",
        "addenda/backbones/glyphs.safetensors",
    ):
        assert part in wheel & sdist, part
    assert f"{script.NAME}.dist-info/licenses/LICENSE" in wheel
    assert not [name for name in wheel | sdist if name.startswith(("tests/", "docs/", "examples/"))]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_missing_and_what_does_not_belong_is_named(script: ModuleType, tmp_path: Path, kind: str) -> None:
    name = f"{script.NAME}-py3-none-any.whl" if kind == "wheel" else f"{script.NAME}.tar.gz"
    wanted = script.wanted_files()[0 if kind == "wheel" else 1]
    files = dict.fromkeys(wanted, 10) | {script.DATA: 2_000_000}
    assert script.faults(script.contents(archived(tmp_path, name, files)), wanted) == []
    del files["addenda/serving/templates/home.html"]
    files |= {"tests/test_api.py": 10, "addenda/learner/photos.py": 300_000}
    assert script.faults(script.contents(archived(tmp_path, name, files)), wanted) == [
        "addenda/serving/templates/home.html is missing",
        "addenda/learner/photos.py does not belong there",
        "tests/test_api.py does not belong there",
        "addenda/learner/photos.py has 300000 bytes: is it data?",
    ]


def test_every_extra_is_tried_by_what_it_is_for(script: ModuleType) -> None:
    extras = script.PROJECT["optional-dependencies"].keys() - {"all", "dev", "docs"}
    assert script.EXTRAS.keys() == PACKAGES.keys() == extras


PACKAGES = {
    "bench": ("avalanche", "matplotlib", "peft", "vit_pytorch"),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "heic": ("pi_heif",),
    "postgres": ("psycopg",),
    "parquet": ("pyarrow",),
    "ray": ("ray",),
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", PACKAGES)
def test_without_its_packages_an_extra_is_asked_for_by_name(
    script: ModuleType, tmp_path: Path, glyphs: FrozenBackbone, extra: str
) -> None:
    with Registry.open(tmp_path / "demo.db") as registry:
        registry.add_backbone(glyphs.record())
        task = random_task(glyphs, "digits")
        registry.register(task, golden(glyphs, task))
    digits((0, 1), test=True, limit=2).save(tmp_path / "digits")
    (tmp_path / "listing.parquet").touch()
    log, environment = tmp_path / "log", {**os.environ, "WITHOUT": " ".join(PACKAGES[extra])}
    command = tuple(script.EXTRAS[extra].command)
    assert Forked(command, log, tmp_path, environment, module="tests.support.without").wait(120) == 2
    assert re.fullmatch(rf"Error: .*pip install 'addenda\[{extra}\]'.*\n", log.read_text())


def test_the_pythons_named_are_those_that_were_tried_and_the_others_are_said_to_be_untried(script: ModuleType) -> None:
    said = " ".join(script.PROJECT["classifiers"])
    assert re.findall(r"Python :: (3\.\d+)", said) == [*script.TRIED]
    assert script.PROJECT["requires-python"] == ">=3.11"
    page = (ROOT / "docs" / "dependencies.md").read_text()
    assert f"Not run on {', '.join(script.UNTRIED)}" in page


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"License-Expression": "MIT", "License": "other"}, "MIT"),
        ({"Classifier": "License :: OSI Approved :: BSD License", "License": "long text"}, "BSD License"),
        ({"Classifier": "License :: OSI Approved", "License": "Apache 2.0\n\nmore"}, "Apache 2.0"),
        ({"Classifier": "Programming Language :: Python"}, "not stated"),
    ],
)
def test_a_licence_is_told_as_the_metadata_tells_it(script: ModuleType, headers: dict[str, str], said: str) -> None:
    metadata = Message()
    for name, value in headers.items():
        metadata[name] = value
    assert script.licence(metadata) == said


def test_the_page_of_licences_has_a_table_for_the_core_and_one_for_each_extra(script: ModuleType) -> None:
    page = script.licence_page({"core": {"torch": ("2.6", "BSD")}, "ray": {"ray": ("2.60", "Apache-2.0")}})
    assert re.findall(r"^## .*", page, re.MULTILINE) == ["## core", "## `addenda[ray]`, in addition to the core"]
    assert "| torch | 2.6 | BSD |" in page
    assert "| ray | 2.60 | Apache-2.0 |" in page
