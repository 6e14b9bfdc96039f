"""A registry with tasks on two backbones: --backbone chooses one by name or fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest
import timm
from timm.models import save_for_hf

from addenda import Registry
from tests.support.commands import Run
from tests.support.images import colour_folder
from tests.support.servers import ServedProcess
from tests.support.tiny import shaken


@pytest.fixture
def colours(run: Run, tmp_path: Path) -> Path:
    """A folder of images that a task on each backbone, `on-glyphs` and `on-other`, was learned from."""
    folder = colour_folder(tmp_path / "colours", per_class=3)
    save_for_hf(shaken(timm.create_model("test_vit", num_classes=2)), tmp_path / "other", {"labels": ["a", "b"]})
    others = ("--backbone", f"local-dir:{tmp_path / 'other'}")
    for name, backbone in (("on-glyphs", ("--backbone", "glyphs")), ("on-other", others)):
        learned = run("learn", name, folder, *backbone, "--head-only", "--views", "0")
        assert learned.code == 0, learned.err
    return folder


def predicted(run: Run, image: Path, *options: str) -> list[str]:
    result = run("predict", image, "--json", *options)
    assert result.code == 0, result.err
    return list(json.loads(result.out)["images"][str(image)])


@pytest.mark.slow
def test_each_command_asks_which_backbone_and_takes_its_name_or_fingerprint(
    run: Run, colours: Path, tmp_path: Path
) -> None:
    image = colours / "red" / "0.png"
    with Registry.open(tmp_path / "tasks.db") as registry:
        fingerprints = {record["name"]: record["fingerprint"] for record in registry.backbones()}
    other = next(name for name in fingerprints if name != "glyphs")
    for words in (("predict", image), ("export-model", "--out", tmp_path / "a.pt2"), ("serve", "--port", "0")):
        unclear = run(*words)
        assert unclear.code == 2
        assert "several backbones: " in unclear.err
        assert f"glyphs ({fingerprints['glyphs'][:12]})" in unclear.err
        unknown = run(*words, "--backbone", "vit")
        assert (unknown.code, "no backbone 'vit': " in unknown.err) == (2, True)
        assert run(*words, "--backbone", fingerprints["glyphs"][:11]).code == 2
    assert predicted(run, image, "--backbone", "glyphs") == ["on-glyphs"]
    assert predicted(run, image, "--backbone", other) == ["on-other"]
    assert predicted(run, image, "--backbone", fingerprints[other]) == ["on-other"]
    assert predicted(run, image, "--backbone", fingerprints["glyphs"][:12]) == ["on-glyphs"]
    assert predicted(run, image, "--task", "on-other") == ["on-other"]
    exported = run("export-model", "--out", tmp_path / "a.pt2", "--backbone", "glyphs", "--json")
    assert json.loads(exported.out)["tasks"] == ["on-glyphs:1"], exported.err
    both = run("predict", image, "--task", "on-other", "--backbone", "glyphs")
    assert both.code == 2
    assert "Traceback" not in both.err


@pytest.mark.slow
def test_each_backbone_has_a_server_of_its_own(run: Run, colours: Path, tmp_path: Path) -> None:
    with ServedProcess(tmp_path / "tasks.db", tmp_path, "--backbone", "glyphs") as served:
        assert list(httpx2.get(f"{served.url}/api/v1/status").json()["tasks"]) == ["on-glyphs"]
