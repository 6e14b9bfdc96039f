"""The activation cache: what the frozen stream offers for each image, computed once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from addenda.backbones import FrozenBackbone, KeyValue
from addenda.combined import CombinedModel
from addenda.exceptions import DataError, TrainingError
from addenda.learner.data import LabelledImages
from addenda.registry import Task

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


@dataclass(frozen=True)
class Activations:
    """Constants of some images: all that a task's stream reads of them.

    Attributes:
        key_values: keys and values of each layer, in half precision; the frozen tokens', then those of the tokens of
            the tasks to extend.
        pooled: the backbone's own pooled feature.
        targets: class of each image.
        skipped: images that could not be read.
    """

    key_values: Float[Tensor, "N L 2 H P d"]
    pooled: Float[Tensor, "N D"]
    targets: Int[Tensor, " N"]
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)


def compute_activations(
    backbone: FrozenBackbone,
    images: LabelledImages,
    parents: Sequence[Task] = (),
    skip_bad: bool = False,
    report: Report | None = None,
) -> Activations:
    """Runs the frozen stream, and those of the tasks to extend, over every image once.

    Args:
        backbone: the frozen backbone.
        images: what to read.
        parents: every task whose tokens will be seen.
        skip_bad: leave out images that cannot be read, rather than refuse.
        report: told of the progress.

    Raises:
        DataError: images that cannot be read, all named together.
        TrainingError: neither memory nor disk holds the activations.
    """
    # Named by content: among ancestors there may be two versions of one name.
    model = CombinedModel(backbone, [replace(parent, name=parent.sha256) for parent in parents])
    num_tokens = backbone.num_tokens + len(parents)
    head_dim = backbone.embed_dim // backbone.num_heads
    store = _allocate(len(images), (backbone.depth, 2, backbone.num_heads, num_tokens, head_dim))
    pooled = torch.empty(len(images), backbone.embed_dim)
    kept: list[int] = []

    def flush(batch: list[tuple[int, Tensor]]) -> None:
        start, rows = len(kept), len(batch)

        def observe(layer: int, frozen: KeyValue, tokens: KeyValue) -> None:
            for which in (0, 1):
                joined = torch.cat([frozen[which], tokens[which]], dim=2)[:rows]
                store[start : start + rows, layer, which].copy_(joined)

        pooled[start : start + rows] = model.observe(torch.stack([image for _, image in batch]), parents, observe)
        kept.extend(index for index, _ in batch)

    bad = read_in_batches(images, backbone, model.micro_batch, flush, skip_bad, "reading images", report)
    targets = images.targets[torch.tensor(kept, dtype=torch.long)]
    return Activations(store[: len(kept)], pooled[: len(kept)], targets, tuple(bad))


def read_in_batches(
    images: LabelledImages,
    backbone: FrozenBackbone,
    size: int,
    take: Callable[[list[tuple[int, Tensor]]], None],
    skip_bad: bool,
    what: str,
    report: Report | None,
) -> list[str]:
    """Reads every image and hands them on in batches of (index, image); the last may be smaller.

    Returns:
        What was wrong with each image left out.

    Raises:
        DataError: images that cannot be read, all named together, unless skip_bad.
    """
    batch: list[tuple[int, Tensor]] = []
    bad: list[str] = []
    for index, result in enumerate(_read_ahead(images, backbone)):
        if isinstance(result, DataError):
            bad.append(str(result))
        elif not bad or skip_bad:  # once a run is lost, the rest is only read, to name every bad image
            batch.append((index, result))
        if len(batch) == size:
            take(batch)
            batch = []
        if report is not None:
            report(what, index + 1, len(images))
    if (bad and not skip_bad) or len(bad) == len(images):
        named = "\n  ".join(bad[:10]) + (f"\n  … and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise DataError(
            f"{len(bad)} of {len(images)} images in {images.where} cannot be read:\n  {named}\n"
            "Mend them, or leave them out with --skip-bad (in Python: skip_bad=True)."
        )
    if batch:
        take(batch)
    return bad


def _read_ahead(images: LabelledImages, backbone: FrozenBackbone) -> Iterator[Tensor | DataError]:
    """Reads images in order, a few ahead of the model, on another thread."""

    def read(index: int) -> Tensor | DataError:
        try:
            return images.read(index, backbone)
        except DataError as error:
            return error

    window = 16
    with ThreadPoolExecutor(max_workers=1) as pool:
        futures = [pool.submit(read, index) for index in range(min(window, len(images)))]
        for index in range(len(images)):
            yield futures.pop(0).result()
            if index + window < len(images):
                futures.append(pool.submit(read, index + window))


def _allocate(num_images: int, shape: tuple[int, ...]) -> Tensor:
    """Memory for the activations: RAM where half of what is free holds them, else a vanishing file."""
    total = num_images * torch.Size(shape).numel()
    if total * 2 <= 0.5 * _free_ram_bytes():
        return torch.empty(num_images, *shape, dtype=torch.float16)
    try:
        with tempfile.NamedTemporaryFile(prefix="addenda-activations-") as file:
            os.posix_fallocate(file.fileno(), 0, total * 2)
            return torch.from_file(file.name, shared=True, size=total, dtype=torch.float16).view(num_images, *shape)
    except OSError as error:
        raise TrainingError(
            f"The activations of {num_images} images take {total * 2 / 1e9:.1f} GB: more than half of the free memory, "
            f"and {tempfile.gettempdir()} cannot hold them ({error.strerror}). Free some space, or set TMPDIR to a "
            "larger disk."
        ) from error


def _free_ram_bytes() -> int:
    """Memory that can be taken without swapping."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
