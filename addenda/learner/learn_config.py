"""How a task is learned: every setting, checked, with the defaults that the real sets chose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from addenda.exceptions import DataError, TrainingError
from addenda.learner.augmentation import Augmentation

T = TypeVar("T")
Positive = Annotated[float, Field(gt=0)]
OneOrMore: TypeAlias = T | tuple[T, ...]

AUTO_RANK = 8
"""The rank of adapters that `adapter_rank="auto"` tries."""


class Rates(NamedTuple):
    """One optimiser's learning rates, for token and memory, for adapters and for the head, and its weight decay."""

    token: tuple[float, ...]
    adapters: tuple[float, ...]
    head: float
    decay: float


DEFAULTS = {
    "adamw": Rates(token=(0.001, 0.003), adapters=(0.001, 0.002), head=0.001, decay=0.05),
    "sgd": Rates(token=(0.1, 0.3, 1.0), adapters=(0.1, 0.3), head=0.003, decay=0.0),
}


class Settings(NamedTuple):
    """What one candidate is trained with, of what a sweep can vary."""

    learning_rate: float
    weight_decay: float
    num_memory_tokens: int
    adapter_rank: int
    adapter_learning_rate: float
    seed: int


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LearnConfig:
    """Settings of one learning run; docs/results.md has the measurements that chose the defaults.

    Settings of type OneOrMore take one value or several. All combinations are trained side by side, and validation
    picks the best. Learning rates and weight decay have defaults for each optimiser; the paper publishes none.

    Attributes:
        optimizer: `"adamw"`, or `"sgd"` with momentum (the paper).
        num_memory_tokens: m, memory tokens of each layer; 0 leaves the class token alone.
        head_only: no token at all: the task is the better of linear and layer probe.
        layer_head: whether the head reads statistics of every block's output too, where they help.
        extends: references of registered tasks whose tokens and memory this one sees; `"auto"` tries those that look
            promising and takes those that validation says pay.
        adapter_rank: r of low-rank updates of the task's own stream; 0 has none, the paper's form. `"auto"` tries
            AUTO_RANK beside 0 and takes it where validation says that it pays.
        epochs: passes over the training part, at most.
        batch_size: images in an optimiser step.
        learning_rate: for the token and the memory, at its highest.
        adapter_learning_rate: for the adapters, at its highest.
        head_learning_rate: for the head, the same in all candidates.
        weight_decay: of token, memory and adapters; the head has the regression's own penalty instead.
        momentum: of SGD.
        label_smoothing: share of each target that all classes get alike.
        class_weights: `"balanced"` gives each class's images the same sum of weights.
        clip_norm: largest norm of a candidate's gradient.
        warmup_steps: steps of linear warm-up before the cosine.
        memory_std: standard deviation of the memory's first values (the paper: 0.02).
        patience: epochs without a lower validation loss after which a candidate stops. With fewer than 200 validation
            images, which choose an epoch badly, all stay until their last.
        augmentation: random views of the training images.
        validation_fraction: the share of the training images held out, class by class, to choose by.
        group_by: a regular expression that finds in an image file's name, or path within DATA, what it belongs to: the
            video of a frame, the patient of a scan. Images of one group are held out together or not at all.
        calibrate: whether a temperature for the probabilities is fitted on the validation part; candidates are then
            compared as calibrated.
        fall_back: whether a token is left out that does not pay beside the probe, by the loss on validation images.
            That of a task which names others to extend is kept in any case.
        refit: whether the winner is trained again on training and validation images together.
        seed: of the split, the memory's first values and the order of images; of several, the first decides split and
            order for all.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    num_memory_tokens: OneOrMore[Annotated[int, Field(ge=0, le=1024)]] = 5
    head_only: bool = False
    layer_head: bool = True
    adapter_rank: OneOrMore[Annotated[int, Field(ge=0, le=256)]] | Literal["auto"] = 0
    extends: tuple[str, ...] | Literal["auto"] = ()
    epochs: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=1)] = 64
    learning_rate: OneOrMore[Positive] = Field(default_factory=lambda given: DEFAULTS[given["optimizer"]].token)
    adapter_learning_rate: OneOrMore[Positive] = Field(
        default_factory=lambda given: DEFAULTS[given["optimizer"]].adapters
    )
    head_learning_rate: Positive = Field(default_factory=lambda given: DEFAULTS[given["optimizer"]].head)
    weight_decay: OneOrMore[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda given: DEFAULTS[given["optimizer"]].decay
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    clip_norm: Positive = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    memory_std: Annotated[float, Field(ge=0)] = 0.02
    patience: Annotated[int, Field(ge=1)] = 8
    augmentation: Augmentation = field(default_factory=Augmentation)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    group_by: str | None = None
    calibrate: bool = True
    fall_back: bool = True
    refit: bool = True
    seed: OneOrMore[Annotated[int, Field(ge=0, le=2**32 - 1)]] = 0

    @field_validator(*Settings._fields)
    @classmethod
    def _not_empty(cls, value: OneOrMore[Any]) -> OneOrMore[Any]:
        if value == ():
            raise ValueError("give one value at least")
        return value

    @field_validator("group_by")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error})") from error
        return value

    @property
    def candidates(self) -> tuple[Settings, ...]:
        """Every combination of the settings that have several values; without adapters their learning rate is one."""
        ranks = (0, AUTO_RANK) if self.adapter_rank == "auto" else _several(self.adapter_rank)
        rates = _several(self.adapter_learning_rate)
        swept: tuple[Any, ...] = self.learning_rate, self.weight_decay, self.num_memory_tokens, ranks, rates, self.seed
        combined = (Settings(*values) for values in product(*map(_several, swept)))
        return tuple(s for s in combined if s.adapter_rank or s.adapter_learning_rate == rates[0])

    @property
    def keeps_token(self) -> bool:
        """Whether the token is kept even where it does not pay."""
        return not self.fall_back or self.extends not in ((), "auto")

    @property
    def first_seed(self) -> int:
        """What split and order are drawn with."""
        return _several(self.seed)[0]

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> LearnConfig:
        """Builds a configuration from plain values and reports every mistake at once.

        Raises:
            TrainingError: unknown keys, or values out of range.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            found = [e for e in error.errors() if e["type"] != "default_factory_not_called"]  # those follow from others
            problems = "; ".join(filter(None, map(_problem, found)))
            raise TrainingError(f"The configuration is not valid: {problems}.") from error

    def to_json(self) -> dict[str, Any]:
        """Plain values, as stored with the task."""
        values: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return values


def _several(value: T | tuple[T, ...]) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,)


def _problem(error: ErrorDetails) -> str | None:
    """What is wrong with which setting; None where pydantic tried one value for several, or several for one."""
    name, *inside = error["loc"]
    several = isinstance(error["input"], list | tuple)
    if inside and (error["type"] == "tuple_type" or (several and error["type"].endswith("_type"))):
        return None
    unknown = error["type"] == "unexpected_keyword_argument"
    place = [part for part in inside if unknown or isinstance(part, int) or part in Augmentation.__dataclass_fields__]
    said = "there is no such setting" if unknown else error["msg"].replace("a valid tuple", "a valid list")
    if name == "extends" and error["type"] == "literal_error":
        said = "Input should be a list of tasks, or 'auto'"
    return f"{'.'.join(map(str, [name, *place]))}: {said}"


def read_mapping(file: Path) -> dict[str, Any]:
    """What a YAML file says; of an empty one, nothing.

    Raises:
        DataError: it cannot be read, or is no mapping.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The file {str(file)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"The file {str(file)!r} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise DataError(f"The file {str(file)!r} is not valid YAML{place}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"The file {str(file)!r} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "one value"
        raise DataError(f"The file {str(file)!r} holds {found}; it must be a mapping, of lines such as `epochs: 20`.")
    return values
