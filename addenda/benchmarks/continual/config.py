"""What a run of the benchmark is: a YAML file of the package, one of the user's, or a folder of class folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_core import ErrorDetails

from addenda.benchmarks.baselines.method import BaselineSettings
from addenda.benchmarks.continual.sources import Data, Place
from addenda.benchmarks.continual.stream import Stream, limited, slug
from addenda.exceptions import AddendaError, DataError
from addenda.learner import LearnConfig, read_mapping

STREAMS = Path(__file__).with_name("streams")

Channels = tuple[float, float, float]


class BackboneConfig(BaseModel):
    """The arguments of `load_backbone`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = "vit_base_patch16_224.augreg_in21k"  # timm's, or "glyphs"
    weights: Path | None = None  # a local file; None takes timm's pretrained weights
    mean: Channels | None = None  # of the normalisation; None takes timm's
    std: Channels | None = None


class StreamConfig(BaseModel):
    """A stream, what learns it, and what its file says of a run of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    about: str = ""
    command: str = ""
    hardware: str = ""
    minutes: Annotated[float, Field(gt=0)] | None = None
    expected: dict[str, float] = {}  # of Addenda, a metric and its value in %; empty where the stream is run otherwise
    expected_with: dict[str, Any] = {}  # settings that were given for this, beside the file's own
    backbone: BackboneConfig = BackboneConfig()
    data: Data
    download: bool = False
    limit: Annotated[int, Field(ge=1)] | None = None  # training images of an experience at most, drawn class by class
    test_limit: Annotated[int, Field(ge=1)] | None = None
    jobs: Annotated[int, Field(ge=1)] = 1  # processes that share the methods and seeds among them, and the cores
    seeds: Annotated[int, Field(ge=1)] = 3  # runs, with the seeds 0, 1, 2 and so on
    methods: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # None is Addenda and every baseline
    learn: dict[str, Any] = {}  # settings of `LearnConfig` for Addenda's own method
    baselines: BaselineSettings = BaselineSettings()
    _folder: Path = PrivateAttr(default=Path())  # of the YAML file: there a relative `root` is looked for

    @field_validator("learn")
    @classmethod
    def _learnable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        try:
            LearnConfig.parse(settings)
        except AddendaError as error:
            raise ValueError(str(error)) from error
        return settings


def stream_names() -> list[str]:
    """The streams that the package carries."""
    return sorted(file.stem for file in STREAMS.glob("*.yaml"))


def read_config(stream: str | Path, overrides: Mapping[str, Any] | None = None) -> StreamConfig:
    """The checked configuration of a stream: its name, a YAML file or a folder; settings given win, each by itself."""
    place = Path(stream)
    if str(stream) in stream_names():
        file = STREAMS / f"{stream}.yaml"
        values, folder = read_mapping(file), Path()
    elif place.is_dir():
        name = slug(place.resolve().name)[:40]
        values, folder = {"name": name, "data": {"source": "split", "root": str(place.resolve())}}, Path()
    elif place.suffix in (".yaml", ".yml"):
        values, folder = read_mapping(place), place.parent
    else:
        raise DataError(
            f"There is no stream {str(stream)!r}. Known: {', '.join(stream_names())}. A stream of your own is a YAML "
            "file, or a folder with one folder of images for each class."
        )
    try:
        config = StreamConfig.model_validate(_merge(values, overrides or {}))
    except ValidationError as error:
        problems = "\n  ".join(map(_problem, error.errors()))
        raise DataError(f"The stream {str(stream)!r} has mistakes:\n  {problems}") from error
    if not _as_expected(config, overrides or {}):
        config = config.model_copy(update={"expected": {}})
    config._folder = folder
    return config


def build_stream(config: StreamConfig, data_root: Path | None = None, seed: int = 0) -> Stream:
    """The stream that a configuration means: images are found and dealt out by the seed's draws, and none is read."""
    whole = config.data.stream(config.name, Place(data_root or config._folder, seed, config.download))
    return limited(whole, config.limit, config.test_limit, seed)


def _as_expected(config: StreamConfig, overrides: Mapping[str, Any]) -> bool:
    """Whether the file's own run is asked for: nothing else is given that could change Addenda's figures."""
    given = _merge({}, overrides)
    for name in ("download", "jobs"):
        given.pop(name, None)
    if "addenda" in given.get("methods", ()):
        del given["methods"]
    if "--weights" in config.command:
        given.get("backbone", {}).pop("weights", None)
    return {name: value for name, value in given.items() if value != {}} == config.expected_with


def _merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, Mapping) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged


def _problem(error: ErrorDetails) -> str:
    """What is wrong with which setting."""
    place = list(error["loc"])
    if place[0] == "data" and len(place) > 2:
        del place[1]  # pydantic's tag: the source
    context = error.get("ctx", {})
    own = {
        "extra_forbidden": "there is no such setting",
        "missing": "is missing",
        "string_pattern_mismatch": "use lower-case letters, digits, '-' and '_', first a letter or digit, 40 at most",
        "union_tag_not_found": "`source` is missing",
        "union_tag_invalid": f"`source` is {context.get('tag')!r}; it must be one of {context.get('expected_tags')}",
    }
    said = own.get(error["type"], error["msg"].removeprefix("Value error, "))
    said = said.replace("Tuple", "List").replace("a valid tuple", "a valid list")
    return f"{'.'.join(map(str, place))}: {said}"
