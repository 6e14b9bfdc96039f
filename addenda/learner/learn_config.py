"""Settings of a learning run: validated, with defaults chosen on real datasets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from addenda.exceptions import DataError, TrainingError
from addenda.learner.augmentation import Augmentation

T = TypeVar("T")
Positive = Annotated[float, Field(gt=0)]
OneOrMore: TypeAlias = T | tuple[T, ...]

AUTO_RANK = 8
"""Adapter rank that `adapter_rank="auto"` tries."""


DEFAULTS = {
    "adamw": {
        "learning_rate": (0.001, 0.003), "adapter_learning_rate": (0.001, 0.002), "head_learning_rate": 0.001,
        "weight_decay": 0.05,
    },
    "sgd": {
        "learning_rate": (0.1, 0.3, 1.0), "adapter_learning_rate": (0.1, 0.3), "head_learning_rate": 0.003,
        "weight_decay": 0.0,
    },
}  # fmt: skip
"""Default learning rates and weight decay for each optimiser."""


def _default(setting: str) -> Any:
    return Field(default_factory=lambda given: DEFAULTS[given["optimizer"]][setting])


class Settings(NamedTuple):
    """Hyperparameters of one candidate that a sweep can vary."""

    learning_rate: float
    weight_decay: float
    num_memory_tokens: int
    adapter_rank: int
    adapter_learning_rate: float
    seed: int


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LearnConfig:
    """Settings of one learning run; docs/results.md has the measurements behind the defaults.

    Settings of type OneOrMore take one value or several. All combinations are trained side by side, and the validation
    split selects the best. Learning rates and weight decay have defaults for each optimiser; the paper publishes none.

    Attributes:
        optimizer: `"adamw"`, or `"sgd"` with momentum as in the paper.
        num_memory_tokens: m, the number of memory tokens per layer; 0 trains the class token without memory.
        head_only: train no token; the task is the layer probe, or without `layer_head` the linear probe.
        layer_head: whether the head may also read layer features, statistics of the output of every block but the last.
        extends: references of registered tasks whose class and memory tokens this task attends to. `"auto"` tries the
            most promising tasks and extends those that lower the validation loss by more than one standard error.
        adapter_rank: rank of the low-rank adapters in the task's own stream; 0 trains none, as in the paper. `"auto"`
            also tries AUTO_RANK and uses it if it lowers the validation loss by more than one standard error.
        epochs: maximum number of epochs.
        batch_size: number of images in an optimiser step.
        learning_rate: peak learning rate of class token and memory tokens.
        adapter_learning_rate: peak learning rate of the adapters.
        head_learning_rate: peak learning rate of the head, the same for all candidates.
        weight_decay: weight decay of tokens and adapters; the head has the linear probe's L2 penalty instead.
        momentum: momentum of SGD.
        label_smoothing: share of each target that is spread evenly over all classes, in the training of tokens.
        class_weights: `"balanced"` weights classes inversely to their frequency, in probes and in the training of
            tokens; a linear discriminant has equal priors in any case.
        clip_norm: maximum norm of a candidate's gradient.
        warmup_steps: number of linear warm-up steps before cosine decay.
        memory_std: standard deviation of the initial memory tokens (the paper: 0.02).
        patience: early stopping after this many epochs without a lower validation loss. With fewer than 200 validation
            images, too few to choose an epoch, every candidate trains for all epochs.
        augmentation: random views of the training images.
        validation_fraction: share of each class's training images in the validation split, which has at least one image
            or group of a class with two, and so may be larger.
        group_by: regular expression that extracts an image's group from its file name or path within DATA, such as the
            video of a frame or the patient of a scan. A group is never divided between training and validation.
        calibrate: whether to fit a temperature on the validation split; candidates are then compared after temperature
            scaling.
        fall_back: whether to drop a token that does not lower the probe's validation loss by more than two standard
            errors. The token of a task that extends named tasks is never dropped.
        refit: whether to train the selected candidate again on training and validation images together.
        seed: seed of the split, the initial memory tokens and the order of images; the first of several determines
            split and order for all.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    num_memory_tokens: OneOrMore[Annotated[int, Field(ge=0, le=1024)]] = 5
    head_only: bool = False
    layer_head: bool = True
    adapter_rank: OneOrMore[Annotated[int, Field(ge=0, le=256)]] | Literal["auto"] = 0
    extends: tuple[str, ...] | Literal["auto"] = ()
    epochs: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=1)] = 64
    learning_rate: OneOrMore[Positive] = _default("learning_rate")
    adapter_learning_rate: OneOrMore[Positive] = _default("adapter_learning_rate")
    head_learning_rate: Positive = _default("head_learning_rate")
    weight_decay: OneOrMore[Annotated[float, Field(ge=0)]] = _default("weight_decay")
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
            raise ValueError("give at least one value")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Rejects `yes` for a number and "off" for a switch, which pydantic would convert."""
        is_switch = isinstance(cls.__dataclass_fields__[str(info.field_name)].default, bool)
        if is_switch and not isinstance(value, bool):
            raise ValueError("give true or false")
        if not is_switch and any(
            isinstance(each, bool) for each in (value if isinstance(value, list | tuple) else [value])
        ):
            raise ValueError("true and false are no values of this setting")
        return value

    @field_validator("group_by")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is not a valid regular expression ({error})") from error
        return value

    @property
    def candidates(self) -> tuple[Settings, ...]:
        """Every combination of the swept settings; rank 0 is combined with one adapter learning rate only."""
        ranks = (0, AUTO_RANK) if self.adapter_rank == "auto" else _several(self.adapter_rank)
        rates = _several(self.adapter_learning_rate)
        swept: tuple[Any, ...] = self.learning_rate, self.weight_decay, self.num_memory_tokens, ranks, rates, self.seed
        combined = (Settings(*values) for values in product(*map(_several, swept)))
        return tuple(s for s in combined if s.adapter_rank or s.adapter_learning_rate == rates[0])

    @property
    def keeps_token(self) -> bool:
        """Whether the token is kept even if it does not lower the validation loss."""
        return not self.fall_back or self.extends not in ((), "auto")

    @property
    def settings_of_tokens(self) -> list[str]:
        """The settings whose values ask for task tokens, unlike the defaults, which only allow them."""
        default = LearnConfig()
        names = ("num_memory_tokens", "adapter_rank", "extends", "fall_back", "label_smoothing")
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    @property
    def first_seed(self) -> int:
        """Seed of the split and of the order of images."""
        return _several(self.seed)[0]

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> LearnConfig:
        """Builds a configuration from plain values and reports all errors at once.

        Raises:
            TrainingError: a key is unknown, or a value is out of range.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            # default_factory_not_called only follows from another error.
            errors = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
            problems = "; ".join(filter(None, map(_describe, errors)))
            raise TrainingError(f"The configuration is not valid: {problems}.") from error

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, as stored with the task."""
        values: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode="json")
        return values


def merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings with others above them; those of `augmentation` are merged one by one."""
    both = [values["augmentation"] for values in (shared, own) if isinstance(values.get("augmentation"), Mapping)]
    return {**shared, **own, **({"augmentation": {**both[0], **both[1]}} if len(both) == 2 else {})}


def _several(value: T | tuple[T, ...]) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,)


def _describe(error: ErrorDetails) -> str | None:
    """Describes an error; returns None for the branch of a OneOrMore union that the value was not meant for."""
    name, *inside = error["loc"]
    several = isinstance(error["input"], list | tuple)
    if inside and (error["type"] == "tuple_type" or (several and error["type"].endswith("_type"))):
        return None
    unknown = error["type"] == "unexpected_keyword_argument"
    path = [part for part in inside if unknown or isinstance(part, int) or part in Augmentation.__dataclass_fields__]
    message = "there is no such setting" if unknown else error["msg"].replace("a valid tuple", "a valid list")
    if name == "extends" and error["type"] == "literal_error":
        message = "Input should be a list of tasks, or 'auto'"
    return f"{'.'.join(map(str, [name, *path]))}: {message}"


class _Loader(yaml.SafeLoader):
    """Rejects a repeated key, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and (first := lines.setdefault((key.tag, key.value), line)) != line:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is on line {first} too", key.start_mark)
        return node


def read_mapping(file: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping; an empty file gives an empty mapping.

    Raises:
        DataError: the file cannot be read or holds no mapping.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise DataError(f"The file {str(file)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"The file {str(file)!r} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise DataError(f"The file {str(file)!r} is not valid YAML{line}: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"The file {str(file)!r} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise DataError(f"The file {str(file)!r} holds {kind}; it must hold a mapping, such as `epochs: 20`.")
    return values
