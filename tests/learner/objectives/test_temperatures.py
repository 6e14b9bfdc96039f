"""Temperature scaling: the optimum is found, and the temperature is 1 if none improves the likelihood."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from addenda.learner.objectives import OBJECTIVES
from addenda.learner.objectives.objective import TEMPERATURES as BOUNDS


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor, objective: str) -> float:
    return OBJECTIVES[objective].fit_temperature(logits, targets)


def loss(logits: torch.Tensor, targets: torch.Tensor, objective: str) -> torch.Tensor:
    return OBJECTIVES[objective].loss(logits, targets)


def drawn(objective: str, temperature: float, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits multiplied by a temperature, with targets drawn from the calibrated probabilities."""
    random = torch.Generator().manual_seed(0)
    calibrated = 2 * torch.randn(count, 4, generator=random)
    if objective == "single-label":
        targets = torch.multinomial(calibrated.softmax(-1), 1, generator=random).flatten()
    else:
        targets = torch.rand(count, 4, generator=random) < calibrated.sigmoid()
    return calibrated * temperature, targets


OBJECTIVE = pytest.mark.parametrize("objective", ["single-label", "multi-label"])


@OBJECTIVE
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_true_temperature_is_found(objective: str, temperature: float) -> None:
    logits, targets = drawn(objective, temperature)
    fitted = fit_temperature(logits, targets, objective)
    assert fitted == pytest.approx(temperature, rel=0.05)
    assert loss(logits / fitted, targets, objective) <= loss(logits, targets, objective)
    for other in (0.99 * fitted, 1.01 * fitted):
        assert loss(logits.double() / fitted, targets, objective) < loss(logits.double() / other, targets, objective)


@OBJECTIVE
def test_scaling_improves_the_calibration_error_and_changes_no_other_score(objective: str) -> None:
    logits, targets = drawn(objective, 4.0)
    labels = ("a", "b", "c", "d")
    before = OBJECTIVES[objective].score(logits, targets, labels)
    after = OBJECTIVES[objective].score(logits / fit_temperature(logits, targets, objective), targets, labels)
    assert after.pop("calibration_error") < 0.2 * before.pop("calibration_error")
    assert after == before


@pytest.mark.parametrize("count", [4, 12, 400])
def test_a_few_correct_predictions_do_not_make_all_others_certain(count: int) -> None:
    targets = torch.arange(count) % 2
    logits = 2.0 * torch.nn.functional.one_hot(targets, 2)
    temperature = fit_temperature(logits, targets, "single-label")
    share = (logits / temperature).softmax(1).amax(1)[0].item()
    assert 0.88 < share < 1 - 1 / (10 * count)  # at the lower bound of the temperature: 0.99995


@OBJECTIVE
def test_the_temperature_is_bounded(objective: str) -> None:
    targets = drawn(objective, 1.0)[1]
    correct = torch.nn.functional.one_hot(targets, 4) if targets.ndim == 1 else targets
    assert fit_temperature((2.0 * correct - 1) * 0.3, targets, objective) == pytest.approx(BOUNDS[0], abs=2e-3)
    assert fit_temperature(-(2.0 * correct - 1) * 3, targets, objective) == pytest.approx(BOUNDS[1], abs=2e-3)


@OBJECTIVE
def test_without_images_or_improvement_the_temperature_is_1(objective: str) -> None:
    logits, targets = drawn(objective, 1.0)
    assert fit_temperature(logits[:0], targets[:0], objective) == 1.0
    assert fit_temperature(torch.zeros(9, 4), targets[:9], objective) == 1.0


@settings(deadline=None, max_examples=30, database=None)
@given(seed=st.integers(0, 1000), multi=st.booleans(), scale=st.floats(0.01, 50))
def test_scaling_never_increases_the_loss_and_is_deterministic(seed: int, multi: bool, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(12, 3, generator=random)
    targets = torch.rand(12, 3, generator=random) < 0.5 if multi else torch.randint(3, (12,), generator=random)
    objective = "multi-label" if multi else "single-label"
    fitted = fit_temperature(logits, targets, objective)
    assert BOUNDS[0] <= fitted <= BOUNDS[1]
    assert loss(logits.double() / fitted, targets, objective) <= loss(logits.double(), targets, objective)
    assert fit_temperature(logits, targets, objective) == fitted
