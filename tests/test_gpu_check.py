"""The script of `make gpu-check` runs to its end on a CPU, with small models and numbers, and says what failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.scripts import script


@pytest.mark.slow
def test_every_part_runs_and_writes_its_file(tmp_path: Path) -> None:
    module = script("gpu_check")
    assert module.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    files = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert set(files) == {name for name, *_ in module.plan("cpu", True)}
    assert not [name for name, text in files.items() if "FAILED" in text or "Not run" in text]
    for precision in ("float32", "bfloat16"):
        table = files[f"2-cost-test_vit-{precision}"]
        assert all(f"| {what} | 2 | 8 |" in table for what in ("token tasks", "layer heads", "dense mask"))
    assert "| layer heads | 3 | 8 |" in files["3-cost-test_vit-float32-3"]


def test_a_part_that_fails_or_has_no_time_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("gpu_check")

    def fail() -> str:
        raise ValueError("no such kernel")

    parts = [("first", 1, fail), ("second", 1e9, fail), ("third", 1, lambda: "measured")]
    monkeypatch.setattr(module, "plan", lambda device, quick: parts)
    assert module.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "FAILED: ValueError: no such kernel" in (tmp_path / "first.md").read_text()
    assert "Not run: 1e+09 seconds" in (tmp_path / "second.md").read_text()
    assert (tmp_path / "third.md").read_text().endswith("measured\n")


def test_the_whole_run_measures_what_was_asked_within_ten_minutes() -> None:
    module = script("gpu_check")
    parts = module.plan("cuda", False)
    assert sum(seconds for _, seconds, _ in parts) <= module.LIMIT_S
    names = " ".join(name for name, *_ in parts)
    assert all(f"{name}-{precision}" in names for name in module.BACKBONES for precision in ("float32", "bfloat16"))
