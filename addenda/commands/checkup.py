"""What works on this machine and what does not: the findings of `addenda doctor`."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from packaging.requirements import Requirement

from addenda import FrozenBackbone, Registry, Task, __version__, load_backbone
from addenda.backbones import cached_weights
from addenda.combined import prove, recorded_backbone
from addenda.combined.probe_inputs import probe_task
from addenda.combined.shapes import SizeClass
from addenda.commands import options
from addenda.exceptions import AddendaError, RegistryError
from addenda.learner import ActivationCache
from addenda.terminal import plural, size


class Finding(NamedTuple):
    """One thing that was looked at: what was found, and what to do about it."""

    subject: str
    state: Literal["works", "absent", "BROKEN"]
    detail: str


def checkup(registry: str, device: str) -> Iterator[Finding]:
    """Looks at what Addenda stands on, and changes nothing but an older registry's schema, as opening it does."""
    yield Finding("python", "works", f"{platform.python_version()}, {platform.platform()}")
    yield from package_findings()
    yield from _devices()
    yield _cache()
    glyphs = load_backbone("glyphs", device=device)
    yield self_test(glyphs, [probe_task(glyphs, SizeClass(2, 8, rank)) for rank in (0, 8)])
    yield from _registry(registry, device)


def package_findings() -> Iterator[Finding]:
    """What Addenda itself and each of its extras require, beside what is installed."""
    try:
        known = metadata("addenda")
    except PackageNotFoundError:
        yield Finding("addenda", "works", f"{__version__}, run from its source: what is required was not looked at")
        return
    required = [Requirement(text) for text in known.get_all("Requires-Dist", [])]
    core = [one for one in required if _applies(one, "")]
    wrong = _unmet(core)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm"))
    yield Finding("addenda", "BROKEN" if wrong else "works", _advice(wrong, "addenda") or f"{__version__}, {versions}")
    for extra in sorted({*known.get_all("Provides-Extra", [])} - {"all", "dev"}):  # those are for who works on Addenda
        wrong = _unmet([one for one in required if _applies(one, extra) and one not in core])
        yield Finding(f"extra {extra}", "absent" if wrong else "works", _advice(wrong, f"addenda[{extra}]"))


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _unmet(required: Sequence[Requirement]) -> list[str]:
    """What is missing or of a wrong version, in words."""
    wrong = []
    for one in required:
        try:
            found = version(one.name)
        except PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        if not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} is {found}, wanted {one.specifier}")
    return wrong


def _advice(wrong: Sequence[str], what: str) -> str:
    return f"{', '.join(wrong)}: pip install '{what}'" if wrong else ""


def _devices() -> Iterator[Finding]:
    threads = plural(torch.get_num_threads(), "thread")
    yield Finding("cpu", "works", f"{os.cpu_count()} processors, {threads}")
    if not torch.cuda.is_available():
        built = "sees none" if torch.version.cuda else "was built without CUDA"
        yield Finding("cuda", "absent", f"torch {torch.__version__} {built}")
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield Finding(f"cuda:{number}", "works", f"{found.name}, {size(found.total_memory)}, CUDA {torch.version.cuda}")


def _cache() -> Finding:
    cache = ActivationCache()
    existing = next(path for path in (cache.folder, *cache.folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        advice = "ADDENDA_CACHE names another folder, `--cache-gb 0` does without"
        return Finding("activation cache", "BROKEN", f"{existing} is no folder to write to: {advice}")
    kept = size(sum(one.num_bytes for one in cache.sets()))
    return Finding("activation cache", "works", f"{kept} kept in {cache.folder}; room for {size(cache.budget_bytes)}")


def self_test(backbone: FrozenBackbone, tasks: Sequence[Task], more: str = "") -> Finding:
    """Whether a backbone and some tasks, of which more is said, keep their bits here, as an exact model tries first."""
    subject = f"exactness of {backbone.name}{more}"
    where = f"{backbone.device}, {str(backbone.precision).removeprefix('torch.')}"
    try:
        proven = prove(backbone, tasks)
    except AddendaError as error:
        return Finding(subject, "BROKEN", str(error))
    images, slots = (", ".join(map(str, sizes)) for sizes in (proven.images, proven.slots))
    shapes = f"batches of {images} images, tiles of {slots} tasks"
    return Finding(subject, "works", f"{where}: every bit as it should be, in {shapes}")


def _registry(location: str, device: str) -> Iterator[Finding]:
    """The registry, and of each of its backbones the weights and whether its tasks keep their bits."""
    if "://" not in location and not Path(location).expanduser().exists():
        advice = "`addenda learn` makes one, --registry names another"
        yield Finding("registry", "absent", f"none at {location!r}: {advice}")
        yield _weights({"name": options.DEFAULT_BACKBONE, "source": "hub"})
        return
    try:
        with Registry.open(location, create=False) as opened:
            tasks = plural(len(opened.tasks()), "active task")
            if faults := opened.schema_faults():
                yield Finding("registry", "BROKEN", f"{len(faults)} faults of its schema, see: addenda db check")
            else:
                yield Finding("registry", "works", f"{opened.location}: {tasks}, generation {opened.generation}")
            for record in opened.backbones():
                weights = _weights(record)
                yield weights
                if weights.state == "works":
                    yield _recorded(opened, record, device)
    except RegistryError as error:
        yield Finding("registry", "BROKEN", str(error))


def _weights(record: Mapping[str, Any]) -> Finding:
    """Whether a backbone's weights lie on this machine."""
    subject, source = f"weights of {record['name']}", record["source"]
    if source == "embedded":
        return Finding(subject, "works", "in the package")
    if source != "hub":
        if Path(source).exists():
            return Finding(subject, "works", source)
        return Finding(subject, "absent", f"no longer at {source!r}: say where with --weights FILE")
    found = cached_weights(record["name"])
    if found is None:
        return Finding(subject, "absent", "not here yet: timm fetches them when they are needed, or --weights FILE")
    return Finding(subject, "works", str(found))


def _recorded(registry: Registry, record: Mapping[str, Any], device: str) -> Finding:
    """Whether a backbone is still what it was, and its tasks keep their bits on this machine."""
    subject = f"weights of {record['name']}"
    try:
        backbone = recorded_backbone(registry, None, device, record["fingerprint"])
        subject = f"tasks on {record['name']}"
        tasks = registry.load(backbone)
    except AddendaError as error:
        return Finding(subject, "BROKEN", str(error))
    return self_test(backbone, tasks, " with the registry's tasks")
