"""The checks of `addenda doctor`: what works on this machine, what is absent and what is broken."""

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
from addenda.combined.probe_inputs import probe_tasks
from addenda.combined.shapes import SizeClass
from addenda.commands import options
from addenda.exceptions import AddendaError, RegistryError
from addenda.learner import ActivationCache
from addenda.terminal import size
from addenda.text import plural


class Finding(NamedTuple):
    """The result of one check, with what was found or what to do."""

    subject: str
    state: Literal["works", "absent", "BROKEN"]
    detail: str


def checkup(registry: str, device: str) -> Iterator[Finding]:
    """Runs all checks. Nothing is changed, except that opening an older registry migrates its schema."""
    yield Finding("python", "works", f"{platform.python_version()}, {platform.platform()}")
    yield from package_findings()
    yield from _devices()
    yield _cache()
    glyphs = load_backbone("glyphs", device=device)
    yield self_test(glyphs, [probe_tasks(glyphs, SizeClass(2, 8, rank))[0] for rank in (0, 8)])
    yield from _registry(registry, device)


def package_findings() -> Iterator[Finding]:
    """Compares the requirements of Addenda and of each extra with the installed packages."""
    try:
        package = metadata("addenda")
    except PackageNotFoundError:
        yield Finding("addenda", "works", f"{__version__}, run from source; requirements were not checked")
        return
    required = [Requirement(text) for text in package.get_all("Requires-Dist", [])]
    core = [requirement for requirement in required if _applies(requirement, "")]
    unmet = _unmet(core)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm"))
    yield Finding("addenda", "BROKEN" if unmet else "works", _advice(unmet, "addenda") or f"{__version__}, {versions}")
    for extra in sorted({*package.get_all("Provides-Extra", [])} - {"all", "dev"}):  # dev is for contributors
        unmet = _unmet([added for added in required if _applies(added, extra) and added not in core])
        yield Finding(f"extra {extra}", "absent" if unmet else "works", _advice(unmet, f"addenda[{extra}]"))


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _unmet(required: Sequence[Requirement]) -> list[str]:
    """Messages about requirements that are missing or installed in another version."""
    unmet = []
    for requirement in required:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            unmet.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(f"{requirement.name} is {installed}, required {requirement.specifier}")
    return unmet


def _advice(unmet: Sequence[str], package: str) -> str:
    return f"{', '.join(unmet)}: pip install '{package}'" if unmet else ""


def _devices() -> Iterator[Finding]:
    threads = plural(torch.get_num_threads(), "thread")
    yield Finding("cpu", "works", f"{os.cpu_count()} processors, {threads}")
    if not torch.cuda.is_available():
        reason = "finds no CUDA device" if torch.version.cuda else "was built without CUDA"
        yield Finding("cuda", "absent", f"torch {torch.__version__} {reason}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "works", "Apple's GPU; without --device mps it is not used")
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield Finding(f"cuda:{number}", "works", f"{gpu.name}, {size(gpu.total_memory)}, CUDA {torch.version.cuda}")


def _cache() -> Finding:
    cache = ActivationCache()
    existing = next(path for path in (cache.folder, *cache.folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        advice = "set ADDENDA_CACHE to another folder, or pass --cache-gb 0"
        return Finding("activation cache", "BROKEN", f"{existing} is not a writable folder: {advice}")
    used = size(sum(entry.num_bytes for entry in cache.sets()))
    return Finding("activation cache", "works", f"{used} in {cache.folder}; budget {size(cache.budget_bytes)}")


def self_test(backbone: FrozenBackbone, tasks: Sequence[Task], suffix: str = "") -> Finding:
    """Runs the exactness self-test of an exact model on a backbone and some tasks."""
    subject = f"exactness of {backbone.name}{suffix}"
    where = f"{backbone.device}, {str(backbone.precision).removeprefix('torch.')}"
    try:
        proven = prove(backbone, tasks)
    except AddendaError as error:
        return Finding(subject, "BROKEN", str(error))
    images, slots = (", ".join(map(str, sizes)) for sizes in (proven.images, proven.slots))
    shapes = f"batches of {images} images, tiles of {slots} tasks"
    return Finding(subject, "works", f"{where}: bitwise identical in {shapes}")


def _registry(location: str, device: str) -> Iterator[Finding]:
    """Checks the registry, and the weights and the tasks of each of its backbones."""
    if options.is_absent(location):
        advice = "`addenda learn` creates one, --registry selects another"
        yield Finding("registry", "absent", f"not found at {location!r}: {advice}")
        yield _weights({"name": options.DEFAULT_BACKBONE, "source": "hub"})
        return
    try:
        with Registry.open(location, create=False) as opened:
            tasks = plural(len(opened.tasks()), "active task")
            if faults := opened.schema_faults():
                yield Finding("registry", "BROKEN", f"{plural(len(faults), 'schema fault')}, see: addenda db check")
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
    """Checks that a backbone's weights are on this machine."""
    subject, source = f"weights of {record['name']}", record["source"]
    if source == "embedded":
        return Finding(subject, "works", "bundled with the package")
    if source != "hub":
        if Path(source).exists():
            return Finding(subject, "works", source)
        return Finding(subject, "absent", f"not found at {source!r}: pass --weights FILE")
    cached = cached_weights(record["name"])
    if cached is None:
        return Finding(subject, "absent", "not downloaded yet: timm does so on first use, or pass --weights FILE")
    return Finding(subject, "works", str(cached))


def _recorded(registry: Registry, record: Mapping[str, Any], device: str) -> Finding:
    """Checks a backbone against its recorded fingerprint, and runs the self-test on its tasks."""
    subject = f"weights of {record['name']}"
    try:
        backbone = recorded_backbone(registry, None, device, record["fingerprint"])
        subject = f"tasks on {record['name']}"
        tasks = registry.load(backbone)
    except AddendaError as error:
        return Finding(subject, "BROKEN", str(error))
    return self_test(backbone, tasks, " with the registry's tasks")
