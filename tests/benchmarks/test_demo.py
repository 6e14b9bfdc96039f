"""The demo proves that no earlier logit changes, and detects it when one does."""

from __future__ import annotations

import pytest

from tests.benchmarks.test_strategy import break_the_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche and what it imports warn while they load


@pytest.mark.slow
def test_the_demo_proves_that_no_earlier_logit_changes(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from addenda.benchmarks.demo import run_demo

    monkeypatch.setenv("COLUMNS", "200")
    assert run_demo()
    out = capsys.readouterr().out
    assert ["digits-89", *["100.0"] * 5, "4", "of", "4"] in [line.split() for line in out.splitlines()]
    assert "One more task costs" in out
    assert "Near-duplicates" not in caplog.text
    assert all(f"addenda {command} " in out for command in ("tasks list", "predict", "verify"))


@pytest.mark.slow
def test_the_demo_fails_when_a_mask_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from addenda.benchmarks import demo
    from addenda.benchmarks.demo import PAIRS

    break_the_mask(monkeypatch)
    monkeypatch.setattr(demo, "PAIRS", PAIRS[:2])
    assert not demo.run_demo()
    assert "NOT every earlier task" in capsys.readouterr().out
