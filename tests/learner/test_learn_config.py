"""The settings of a run: their defaults, and every error in them reported once."""

from __future__ import annotations

import pytest

from addenda import LearnConfig
from addenda.exceptions import TrainingError
from addenda.learner.learn_config import DEFAULTS


def test_each_optimiser_has_learning_rates_of_its_own() -> None:
    for optimizer, rates in DEFAULTS.items():
        config = LearnConfig.parse({"optimizer": optimizer})
        assert {name: getattr(config, name) for name in rates} == rates
    assert LearnConfig(optimizer="sgd", learning_rate=0.2).learning_rate == 0.2
    with pytest.raises(TrainingError) as caught:
        LearnConfig.parse({"optimizer": "adam"})
    assert str(caught.value).count("optimizer") == 1
    assert "learning_rate" not in str(caught.value)  # its default depends on the optimiser: no second error


def test_the_configuration_reports_all_errors_at_once() -> None:
    with pytest.raises(TrainingError) as caught:
        LearnConfig.parse({"epochs": 0, "memory": 5, "learning_rate": [-1]})
    for name in ("epochs", "memory", "learning_rate"):
        assert name in str(caught.value)


def test_an_error_in_a_setting_of_one_value_or_several_is_reported_once() -> None:
    wrong = {
        "seed": -1,
        "learning_rate": [0.1, "x"],
        "extends": 5,
        "epoch": 1,
        "augmentation": {"views": -1, "view": 2},
    }
    with pytest.raises(TrainingError) as caught:
        LearnConfig.parse(wrong)
    errors = str(caught.value).removeprefix("The configuration is not valid: ").removesuffix(".").split("; ")
    assert sorted(errors) == [
        "augmentation.view: there is no such setting",
        "augmentation.views: Input should be greater than or equal to 0",
        "epoch: there is no such setting",
        "extends: Input should be a list of tasks, or 'auto'",
        "learning_rate.1: Input should be a valid number, unable to parse string as a number",
        "seed: Input should be greater than or equal to 0",
    ]
