"""The options that several commands share, and the objects that they describe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Context, Option, echo

import addenda
from addenda.exceptions import BackboneError, DataError
from addenda.files import expanded

if TYPE_CHECKING:
    from addenda.distributed.cluster import Workplace

DEFAULT_REGISTRY = "addenda.db"
DEFAULT_BACKBONE = "vit_base_patch16_224.augreg_in21k"
TIMM_NAME = "timm model name, also hf-hub:ORG/NAME or local-dir:FOLDER; or 'glyphs', a small bundled ViT."
REPEAT = "Repeat to try several."
MAX_COUNT = 10**9
"""Maximum of a number of rows, which every database can hold."""
RAY = "'local' starts one on this machine, 'auto' joins the one on this node, HOST:PORT another."


def finite(value: float | None) -> float | None:
    """Rejects infinity and NaN as the value of an option."""
    if value is not None and not math.isfinite(value):
        raise BadParameter(f"{value} is not a finite number.")
    return value


Registry = Annotated[
    str,
    Option(
        "--registry",
        envvar="ADDENDA_REGISTRY",
        help="Registry: path of an SQLite file, or postgresql://USER@HOST/DATABASE.",
        show_default=True,
    ),
]
Backbone = Annotated[
    str | None,
    Option(
        "--backbone", help=f"{TIMM_NAME} Default: the registry's backbone; in an empty registry {DEFAULT_BACKBONE}."
    ),
]
RecordedBackbone = Annotated[
    str | None,
    Option(
        "--backbone",
        help="Backbone of the registry, by its name or its fingerprint. Default: that of the named tasks, or else the "
        "only one.",
    ),
]
Weights = Annotated[
    Path | None,
    Option(
        "--weights",
        help="Local weights file of the backbone, or its folder. Default: the path recorded in the registry, or "
        "timm's weights, downloaded, if none is recorded.",
    ),
]
TimmWeights = Annotated[
    Path | None,
    Option(
        "--weights",
        help="Local weights file of the backbone, or its folder. Default: timm's pretrained weights, downloaded.",
    ),
]
Mean = Annotated[
    str | None,
    Option("--mean", help="Mean for normalisation: one number, or three separated by commas. Default: the backbone's."),
]
Std = Annotated[
    str | None,
    Option(
        "--std",
        help="Standard deviation for normalisation: one number, or three separated by commas. Default: the backbone's.",
    ),
]
ImgSize = Annotated[
    int | None,
    Option(
        "--img-size",
        help="Input size of the backbone in pixels; its position embeddings are resampled to it. Default: the model's; "
        "a registered backbone keeps its own.",
    ),
]
Precision = Annotated[
    str | None,
    Option(
        "--precision",
        help="Precision of the backbone: float32 or bfloat16. Default: float32; a registered backbone keeps its own.",
    ),
]
Device = Annotated[
    str,
    Option("--device", help="Device: cpu, cuda, cuda:1, mps (Apple's GPU), or auto, which takes CUDA if available."),
]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
CacheGb = Annotated[
    float | None,
    Option(
        help="Disk budget of the activation cache in GB (10^9 bytes); 0 stores nothing. Default: half of the space "
        "that is free or holds cache entries."
    ),
]
NewVersion = Annotated[bool, Option("--new-version", help="Add a version if the name is taken, instead of failing.")]
SkipBad = Annotated[bool, Option("--skip-bad", help="Skip images that cannot be read, instead of failing.")]
Ref = Annotated[str, Argument(help="Task: NAME (its newest version), NAME:VERSION or NAME@ALIAS.")]


def open_registry(location: str, create: bool = False) -> addenda.Registry:
    """Opens a registry; unless `create`, it must exist."""
    return addenda.Registry.open(location, create=create)


def is_absent(location: str) -> bool:
    """Whether there is no registry file yet; a database server is not asked."""
    return "://" not in location and not expanded(location).exists()


def numbers(text: str | None) -> tuple[float, ...] | None:
    """Parses a mean or standard deviation: '0.5' -> (0.5, 0.5, 0.5); '0.1,0.2,0.3' -> (0.1, 0.2, 0.3)."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BackboneError(f"{text!r} must be one number, or three separated by commas.") from error
    return values * 3 if len(values) == 1 else values


def learn_settings(file: Path | None, options: dict[str, Any], augmentation: dict[str, Any]) -> addenda.LearnConfig:
    """Learning settings by precedence: defaults, then the YAML file, then the options that are not None."""
    from addenda.learner import merged, read_mapping

    given = {key: value for key, value in options.items() if value is not None}
    views = {key: value for key, value in augmentation.items() if value is not None}
    return addenda.LearnConfig.parse(
        merged({} if file is None else read_mapping(file), given | ({"augmentation": views} if views else {}))
    )


GROWS_WITH = (
    "name", "data", "test", "grow", "new_version", "skip_bad", "cache_gb", "registry", "weights", "device", "as_json",
)  # fmt: skip
"""The parameters of `learn` that a task which grows accepts."""


def check_growing(context: Context) -> None:
    """Raises an error if an option was given that a task which grows does not take."""
    given = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in GROWS_WITH and source is not None and source.name == "COMMANDLINE":
            given.append(parameter.opts[0])
    if given:
        raise DataError(
            f"--grow takes no {' or '.join(given)}: it fits a head in closed form, on the task's own backbone. Leave "
            "the option out, or learn the task again from all its images."
        )


def single(values: list[Any] | None) -> Any:
    """The value of a repeatable option that was given once; anything else unchanged."""
    return values[0] if values is not None and len(values) == 1 else values


def ranks(values: list[str] | None) -> Any:
    """Parses --adapter-rank: 'auto', or whole numbers."""
    if values is None or values == ["auto"]:
        return single(values)
    if not all(rank.isdecimal() for rank in values):
        raise DataError(f"--adapter-rank must be whole numbers or 'auto' alone, not {' '.join(values)!r}.")
    return single([int(rank) for rank in values])


def backbone_to_learn_on(
    registry: addenda.Registry,
    name: Backbone,
    weights: Weights,
    mean: Mean,
    std: Std,
    img_size: ImgSize,
    precision: Precision,
    device: Device,
) -> addenda.FrozenBackbone:
    """The backbone that the options describe; the registry's own where nothing, or only its name, is given."""
    from addenda.combined import recorded_backbone

    records = registry.backbones()
    given = {"--mean": mean, "--std": std, "--img-size": img_size, "--precision": precision}
    overrides = [option for option, value in given.items() if value is not None]
    if name is None and records:
        if overrides:
            raise BackboneError(
                f"{' and '.join(overrides)} would define a backbone other than the registry's. Name it with --backbone."
            )
        return recorded_backbone(registry, weights, device)
    if not overrides and weights is None and [b["name"] for b in records].count(name or "") == 1:
        return recorded_backbone(registry, None, device, name)
    return load_backbone(name or DEFAULT_BACKBONE, weights, mean, std, img_size, precision, device)


def load_backbone(
    name: str, weights: Weights, mean: Mean, std: Std, img_size: ImgSize, precision: Precision, device: Device
) -> addenda.FrozenBackbone:
    """Loads the backbone that the options describe, and prints on standard error how its weights were converted."""
    channels = numbers(mean), numbers(std)
    loaded = addenda.load_backbone(name, weights, *channels, precision or "float32", device, img_size)
    print_conversion(loaded)
    return loaded


def print_conversion(backbone: addenda.FrozenBackbone) -> None:
    """Prints on standard error how a backbone's weights were converted, if they were."""
    if backbone.conversion:
        echo(f"Weights of {backbone.name}: {backbone.conversion}.", err=True)


def workplace(
    location: str, opened: addenda.Registry, weights: Weights, device: Device, gpus: float | None, backbone: str | None
) -> Workplace:
    """What the workers of a cluster open, by absolute path; workers without a GPU share compute on the CPU."""
    from addenda.distributed.cluster import Workplace

    return Workplace(
        location if location.startswith("postgresql") else opened.location,
        backbone,
        None if weights is None else str(weights.absolute()),
        "cpu" if device == "auto" and not gpus else device,
    )
