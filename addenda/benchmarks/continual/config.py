"""Configuration of `addenda bench continual`, from a packaged YAML file, a user's, or a folder of class folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import ErrorDetails

from addenda.benchmarks.baselines.method import BaselineSettings
from addenda.benchmarks.continual.sources import Data, SourceOptions
from addenda.benchmarks.continual.stream import Stream, limited, slug
from addenda.exceptions import AddendaError, DataError
from addenda.learner import LearnConfig, read_mapping

STREAMS = Path(__file__).with_name("streams")

Channels = tuple[float, float, float]


class BackboneConfig(BaseModel):
    """Arguments of `load_backbone`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = "vit_base_patch16_224.augreg_in21k"  # timm name, or "glyphs"
    weights: Path | None = None  # local weights file; None: timm's pretrained weights
    mean: Channels | None = None  # for input normalisation; None: timm's
    std: Channels | None = None
    img_size: int | None = None  # input size in pixels; None: the model's
    crop_pct: float | None = None  # share of an image that the centre crop keeps; None: timm's


class StreamConfig(BaseModel):
    """A stream, the methods that learn it, and notes on a reference run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    about: str = ""
    command: str = ""
    hardware: str = ""
    expected: dict[str, float] = {}  # Addenda's metrics in %; emptied by `read_config` if other settings are given
    expected_with: dict[str, Any] = {}  # overrides under which `expected` was measured
    backbone: BackboneConfig = BackboneConfig()
    data: Data
    download: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None  # maximum training images per experience, balanced over classes
    test_limit: Annotated[int, Field(ge=1)] | None = None
    jobs: Annotated[int, Field(ge=1)] = 1  # parallel processes; they share the CPU cores
    seeds: Annotated[int, Field(ge=1)] = 3  # number of runs, with seeds 0, 1, 2, ...
    methods: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # None: Addenda and all baselines
    learn: dict[str, Any] = {}  # `LearnConfig` settings for Addenda's methods
    baselines: BaselineSettings = BaselineSettings()
    _folder: Path = PrivateAttr(default=Path())  # folder of the YAML file; a relative `root` is resolved against it

    @field_validator("learn")
    @classmethod
    def _learnable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            LearnConfig.parse(settings)
        except AddendaError as error:
            raise ValueError(str(error)) from error
        return settings


def stream_names() -> list[str]:
    """Names of the packaged streams."""
    return sorted(file.stem for file in STREAMS.glob("*.yaml"))


def read_config(stream: str | Path, overrides: Mapping[str, Any] | None = None) -> StreamConfig:
    """Read and validate a packaged stream by its name, a YAML file, or a folder of class folders.

    Settings in `overrides` replace those of the file, key by key; None values are ignored.
    """
    path, folder, overrides = Path(stream), Path(), overrides or {}
    if str(stream) in stream_names():
        values = read_mapping(STREAMS / f"{stream}.yaml")
    elif path.is_dir():
        name = slug(path.resolve().name)[:40]
        values = {"name": name, "data": {"source": "split", "root": str(path.resolve())}}
    elif path.suffix in (".yaml", ".yml"):
        values, folder = read_mapping(path), path.parent
    else:
        raise DataError(
            f"There is no stream {str(stream)!r}. Known: {', '.join(stream_names())}. For a stream of your own, give a "
            "YAML file, or a folder with one subfolder of images per class."
        )
    try:
        config = StreamConfig.model_validate(_merge(values, overrides))
    except ValidationError as error:
        problems = "\n  ".join(map(_problem, error.errors()))
        raise DataError(f"The configuration of stream {str(stream)!r} is invalid:\n  {problems}") from error
    if not _is_reference_run(config, overrides):
        config = config.model_copy(update={"expected": {}})
    config._folder = folder
    return config


def build_stream(config: StreamConfig, data_root: Path | None = None, seed: int = 0) -> Stream:
    """Build the stream of a configuration: list its images and assign them to experiences, without reading any."""
    stream = config.data.stream(config.name, SourceOptions(data_root or config._folder, seed, config.download))
    return limited(stream, config.limit, config.test_limit, seed)


def _is_reference_run(config: StreamConfig, overrides: Mapping[str, Any]) -> bool:
    """Whether Addenda's settings are those under which `expected` was measured."""
    changes = {key: value for key, value in _merge({}, overrides).items() if key not in ("download", "jobs")}
    if "addenda" in changes.get("methods", ()):
        del changes["methods"]
    if "--weights" in config.command:
        changes.get("backbone", {}).pop("weights", None)
    return {name: value for name, value in changes.items() if value != {}} == config.expected_with


def _merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            nested = merged.get(key)
            merged[key] = _merge(nested if isinstance(nested, Mapping) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged


def _problem(error: ErrorDetails) -> str:
    """Format a pydantic error as `setting: message`."""
    section, *location = error["loc"]
    if section == "data" and len(location) > 1:
        del location[0]  # pydantic's discriminator tag: the source
    context = error.get("ctx", {})
    messages = {
        "extra_forbidden": "unknown setting",
        "missing": "is missing",
        "string_pattern_mismatch": (
            "use at most 40 lower-case letters, digits, '-' and '_', and start with a letter or digit"
        ),
        "union_tag_not_found": "`source` is missing",
        "union_tag_invalid": f"`source` is {context.get('tag')!r}; it must be one of {context.get('expected_tags')}",
    }
    message = messages.get(error["type"], error["msg"].removeprefix("Value error, "))
    message = message.replace("Tuple", "List").replace("a valid tuple", "a valid list")
    return f"{'.'.join(map(str, (section, *location)))}: {message}"
