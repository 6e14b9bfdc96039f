"""The settings of a run: their defaults, and every error in them reported once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from addenda import LearnConfig
from addenda.exceptions import DataError, TrainingError
from addenda.learner.learn_config import DEFAULTS, read_mapping


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


@pytest.mark.parametrize("values", [{"epochs": True}, {"learning_rate": [0.1, True]}, {"num_memory_tokens": False}])
def test_a_switch_is_no_number(values: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="true and false are no values of this setting"):
        LearnConfig.parse(values)


@pytest.mark.parametrize("value", ["off", 0, 1.0])
def test_a_switch_is_true_or_false(value: object) -> None:
    with pytest.raises(TrainingError, match=r"head_only: .*give true or false"):
        LearnConfig.parse({"head_only": value})


def test_a_repeated_key_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 3\nseed: 1\nepochs: 7\n")
    with pytest.raises(DataError, match=r"not valid YAML, line 3: the key 'epochs' is on line 1 too\.$"):
        read_mapping(file)
    file.write_text("shared: &shared {epochs: 3, seed: 1}\nown: {<<: *shared, epochs: 7}\n")
    assert read_mapping(file)["own"] == {"epochs": 7, "seed": 1}


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
