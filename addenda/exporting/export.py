"""Exporting: traced, written beside, checked on golden probes, and only then put in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import addenda
from addenda.backbones import FrozenBackbone, plain
from addenda.combined import CombinedModel, forward_pass
from addenda.combined.golden import TOLERANCE
from addenda.combined.probe_inputs import probe_images
from addenda.exceptions import AddendaError, BackboneError, DataError, ExactnessError
from addenda.exporting.formats import FORMATS, INPUT, Run
from addenda.files import written
from addenda.registry import Golden, Registry, Task

OF_A_TASK = ("ref", "sha256", "labels", "objective", "temperature", "extends")
"""What a file says of each of its tasks."""


@dataclass(frozen=True)
class Exported:
    """A model that was exported and checked."""

    path: str
    format: str
    tasks: tuple[str, ...]  # references of the tasks that it answers
    size_bytes: int
    deviation: float  # the largest |difference| from a golden logit, as a share of the largest |logit| of its task
    tolerance: float  # what the deviation may be


def export_model(
    registry: Registry, backbone: FrozenBackbone, tasks: Sequence[Task], path: str | Path, format: str = "torch-export"
) -> Exported:
    """Writes the combined model of some tasks to one file that runs without Addenda, for any number of images.

    The file takes images as `backbone.transform` gives them and gives each task's logits by its name. Bits are promised
    by Addenda's own pass alone: before the file is put in place, its answers to the golden probes, all together and one
    alone, are compared with those that were recorded when the tasks were registered.

    Args:
        registry: holds the tasks and their golden probes.
        backbone: the backbone that they were learned on, on the CPU.
        tasks: those to answer, of different names; what they extend comes along.
        path: the file, which must not exist: NAME.pt2 for torch-export, NAME.onnx for onnx.
        format: one of FORMATS.

    Raises:
        AddendaError: the format is unknown, its packages are missing, it cannot hold these tasks, or the file exists.
        BackboneError: a task was learned on another backbone.
        DataError: there is no task.
        ExactnessError: the answers deviate by more than the tolerance; nothing was written.
        IntegrityError: what is stored of a task is not what was registered.
    """
    path = Path(path)
    _check_request(backbone, tasks, path, format)
    chosen, model = FORMATS[format], CombinedModel(backbone, tasks, exact=False)
    tasks, tolerance = list(model.tasks.values()), TOLERANCE[backbone.precision_name]
    chosen.check(list(model.tasks), backbone.precision_name)
    goldens = {task.name: registry.goldens(task.ref)[0] for task in tasks}
    metadata = json.dumps(_metadata(registry, backbone, tasks, tolerance), indent=2, ensure_ascii=False)
    try:
        with plain(backbone.device), written(path, registry.file_mode, replace=False) as unfinished:
            shapes = ({0: torch.export.Dim("batch", min=1)},)
            traced = TracedPass(model).eval(), (probe_images(backbone),)
            program = torch.export.export(*traced, dynamic_shapes=shapes, strict=False)
            chosen.write(program, list(model.tasks), metadata, unfinished)
            deviation = _deviation(chosen.load(unfinished), backbone, goldens)
            if not deviation <= tolerance:  # nor where it is no number
                raise ExactnessError(
                    f"{str(path)!r} was not written: its answers to the golden probes deviate by {deviation:.2g} of "
                    f"the largest logit, allowed {tolerance:g}. `addenda verify` compares the tasks themselves."
                )
    except FileExistsError as error:
        raise AddendaError(f"{str(path)!r} exists already: name another file, or remove it.") from error
    except OSError as error:
        raise AddendaError(f"{str(path)!r} was not written: {error.strerror or error}.") from error
    refs = tuple(task.ref for task in tasks)
    return Exported(str(path), format, refs, path.stat().st_size, deviation, tolerance)


def _check_request(backbone: FrozenBackbone, tasks: Sequence[Task], path: Path, format: str) -> None:
    """Raises an error that says what to do unless this can be tried."""
    if format not in FORMATS:
        raise AddendaError(f"There is no format {format!r}: {' or '.join(FORMATS)}.")
    if path.suffix != FORMATS[format].suffix:
        raise AddendaError(f"A file of the format {format} ends in {FORMATS[format].suffix}; {path.name!r} does not.")
    if path.exists():
        raise AddendaError(f"{str(path)!r} exists already: name another file, or remove it.")
    if not path.parent.is_dir():
        raise AddendaError(f"The folder {str(path.parent)!r} of the file does not exist.")
    if not tasks:
        raise DataError("There is no task to export. `addenda learn` adds one.")
    if backbone.device.type != "cpu":
        raise BackboneError(
            f"A model is exported from the CPU, not from {backbone.device}: load_backbone(..., device='cpu')."
        )


def _deviation(run: Run, backbone: FrozenBackbone, goldens: Mapping[str, Golden]) -> float:
    """The largest |difference| from recorded logits as a share of the task's largest; of all probes, and of one."""
    images, tiny = probe_images(backbone), torch.finfo(torch.float32).tiny
    shares = []
    for batch in (images, images[:1]):
        answers = run(batch)
        for name, golden in goldens.items():
            difference = (answers[name].float() - golden.logits[: len(batch)]).abs().max()
            shares.append(difference / golden.logits.abs().max().clamp(min=tiny))
    return torch.stack(shares).max().item()


def _metadata(registry: Registry, backbone: FrozenBackbone, tasks: Sequence[Task], tolerance: float) -> dict[str, Any]:
    """What the file says of itself: where its tasks come from, how images are prepared and logits are read."""
    return {
        "addenda": addenda.__version__,
        "torch": torch.__version__,
        "generation": registry.generation,
        "backbone": {key: backbone.record()[key] for key in ("name", "fingerprint", "precision")},
        "input": INPUT,
        "preprocessing": backbone.preprocessing,
        "tasks": {task.name: {key: getattr(task, key) for key in OF_A_TASK} for task in tasks},
        "tolerance": tolerance,
    }


class TracedPass(nn.Module):
    """The pass of an inexact combined model, which has no fixed shapes: no slot of its tiles is empty."""

    def __init__(self, model: CombinedModel) -> None:
        super().__init__()
        self._backbone = model.backbone.without_head()
        self.backbone = self._backbone.weights  # registered, so that they are named in the file
        self._contents = {name: task.sha256 for name, task in model.tasks.items()}
        self._layout = model.layout
        self._heads = dict(zip(self._contents.values(), model.heads, strict=True))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B C"]]:
        """Logits of each task by name, from images as the backbone's transform gives them."""
        answers = forward_pass(self._backbone, images, self._layout, self._heads).answers
        # Two names may have one content: each is an output of its own.
        return {name: answers[sha256].clone() for name, sha256 in self._contents.items()}
