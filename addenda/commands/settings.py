"""The settings of `learn`, from its options and its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.exceptions import DataError

if TYPE_CHECKING:
    from addenda import LearnConfig


def learn_settings(file: Path | None, given: dict[str, Any], augmentation: dict[str, Any]) -> LearnConfig:
    """Settings by precedence: defaults, file, command line.

    Args:
        file: A YAML file of settings, or None.
        given: What the command line gave; None stands for an option that it did not.
        augmentation: The same of the random views.

    Returns:
        The settings, checked.

    Raises:
        DataError: The file cannot be read, or is no mapping.
        TrainingError: A setting is unknown or out of range.
    """
    from addenda import LearnConfig
    from addenda.learner import read_mapping

    values = {} if file is None else read_mapping(file)
    varied = {key: value for key, value in augmentation.items() if value is not None}
    own = values.get("augmentation") or {}
    if varied and isinstance(own, dict):
        values["augmentation"] = own | varied
    return LearnConfig.parse(values | {key: value for key, value in given.items() if value is not None})


def single(values: list[Any] | None) -> Any:
    """An option that may be given again, given once: its one value; anything else stays.

    Args:
        values: What was given, in order; None where it was not.

    Returns:
        The one value, the list of several, or None.
    """
    return values[0] if values is not None and len(values) == 1 else values


def ranks(given: list[str] | None) -> Any:
    """--adapter-rank as the configuration has it: the word auto, or whole numbers.

    Args:
        given: What was given, in order; None where it was not.

    Returns:
        'auto', one number, a list of several, or None.

    Raises:
        DataError: A rank is no whole number.
    """
    if given is None:
        return None
    if given == ["auto"]:
        return "auto"
    if not all(rank.isdecimal() for rank in given):
        raise DataError(f"--adapter-rank is {' '.join(given)!r}: give whole numbers, or the one word auto.")
    return single([int(rank) for rank in given])
