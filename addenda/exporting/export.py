"""Traces a combined model, writes it to a temporary file, checks it on golden probes, and moves it into place."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import ExportedProgram

import addenda
from addenda.backbones import FrozenBackbone, plain, traced
from addenda.combined import CombinedModel, forward_pass
from addenda.combined.golden import TOLERANCE
from addenda.combined.probe_inputs import probe_images
from addenda.exceptions import AddendaError, BackboneError, DataError, ExactnessError
from addenda.files import written
from addenda.registry import MEANINGS, Golden, Registry, Task

TASK_FIELDS = ("ref", "sha256", "labels", "objective", "temperature", "extends")
"""Metadata of each task in an exported file."""
METADATA = "addenda.json"
"""Name of the metadata: an extra file in a .pt2 archive, or a key of the ONNX metadata."""
INPUT = "images"
MAX_ONNX_BYTES = 1_600_000_000
"""Maximum weights of one ONNX file: the format is limited to 2 GiB, and torch writes a second file for more."""

Run = Callable[[Float[Tensor, "B 3 H W"]], Mapping[str, Tensor]]


class Format(NamedTuple):
    """A file format for traced programs."""

    suffix: str
    check: Callable[[Sequence[str], str], None]  # raises AddendaError for unsupported output names or precision
    write: Callable[[ExportedProgram, Sequence[str], str, Path], None]  # program, output names, metadata, file
    load: Callable[[Path], Run]


def _write_torch(program: ExportedProgram, names: Sequence[str], metadata: str, path: Path) -> None:
    program.example_inputs = None  # torch would pickle them
    constants = program.constants  # cloned, because slices of one storage would be written as one
    constants.update({name: value.clone() for name, value in constants.items() if isinstance(value, Tensor)})
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA: metadata})


def _load_torch(path: Path) -> Run:
    with path.open("rb") as file:
        run: Run = torch.export.load(file).module()
    return run


def _check_onnx(names: Sequence[str], precision: str) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise AddendaError(f"Export to ONNX requires {missing[0]}: pip install 'addenda[export]'.")
    if precision != "float32":
        raise AddendaError(
            f"The backbone computes in {precision}, which ONNX runtimes do not support. Use --format torch-export."
        )
    if INPUT in names:
        raise AddendaError(
            f"Task {INPUT!r} has the name of the model's input, which ONNX does not allow. Use --format torch-export."
        )


def _write_onnx(program: ExportedProgram, names: Sequence[str], metadata: str, path: Path) -> None:
    weights = (*program.state_dict.values(), *program.constants.values())
    num_bytes = sum(weight.nbytes for weight in weights if isinstance(weight, Tensor))
    if num_bytes > MAX_ONNX_BYTES:
        raise AddendaError(
            f"{num_bytes / 1e9:.1f} GB of weights do not fit into one ONNX file, which holds at most "
            f"{MAX_ONNX_BYTES / 1e9:.1f} GB. Use --format torch-export."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's internals
        exported = torch.onnx.export(program, input_names=[INPUT], dynamo=True, verbose=False)
    assert exported is not None
    graph: Any = exported.model.graph
    # Outputs are named after the tasks; inner values with these names are renamed.
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.name in {INPUT, *names}:
            value.name = f"{value.name}.inner"  # task names contain no dots
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    exported.model.metadata_props[METADATA] = metadata
    exported.save(path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Mapping[str, Tensor]:
        outputs = session.run(names, {INPUT: images.numpy()})
        return {name: torch.from_numpy(logits) for name, logits in zip(names, outputs, strict=True)}

    return run


FORMATS = {
    "torch-export": Format(".pt2", lambda names, precision: None, _write_torch, _load_torch),
    "onnx": Format(".onnx", _check_onnx, _write_onnx, _load_onnx),
}


@dataclass(frozen=True)
class Exported:
    """An exported and checked model."""

    path: str
    format: str
    tasks: tuple[str, ...]  # references of its tasks
    size_bytes: int
    deviation: float  # largest |difference| from a golden logit, relative to the largest |logit| of its task
    tolerance: float  # maximum deviation


def export_model(
    registry: Registry, backbone: FrozenBackbone, tasks: Sequence[Task], path: str | Path, format: str = "torch-export"
) -> Exported:
    """Writes the combined model of some tasks to one file that runs without Addenda, for any number of images.

    The model maps images from `backbone.transform` to each task's logits by name. Only Addenda's own forward pass is
    exact, so the logits for the golden probes (all together, and one alone) are compared with the recorded ones before
    the file is moved into place.

    Args:
        registry: contains the tasks and their golden probes.
        backbone: the backbone of the tasks, on the CPU.
        tasks: tasks with different names; the tasks that they extend are included.
        path: a new file: NAME.pt2 for torch-export, NAME.onnx for onnx.
        format: one of FORMATS.

    Raises:
        AddendaError: the format is unknown, lacks its packages or cannot store these tasks, or the file exists.
        BackboneError: a task was learned on another backbone.
        DataError: `tasks` is empty.
        ExactnessError: the logits deviate by more than the tolerance; no file was written.
        IntegrityError: the stored data of a task differ from what was registered.
    """
    path = Path(path)
    if format not in FORMATS:
        raise AddendaError(f"Unknown format {format!r}. Known: {', '.join(FORMATS)}.")
    target = FORMATS[format]
    if path.suffix != target.suffix:
        raise AddendaError(f"Format {format} requires a file name ending in {target.suffix}; got {path.name!r}.")
    if not path.parent.is_dir():
        raise AddendaError(f"Folder {str(path.parent)!r} does not exist; create it first.")
    if not tasks:
        raise DataError("There is no task to export. Add one with `addenda learn`.")
    if backbone.device.type != "cpu":
        raise BackboneError(
            f"Export requires a backbone on the CPU, not on {backbone.device}: load_backbone(..., device='cpu')."
        )
    try:
        if path.exists():
            raise FileExistsError
        model, tolerance = CombinedModel(backbone, tasks, exact=False), TOLERANCE[backbone.precision_name]
        tasks, names = list(model.tasks.values()), list(model.tasks)
        target.check(names, backbone.precision_name)
        goldens = {task.name: registry.goldens(task.ref)[0] for task in tasks}
        metadata = json.dumps(_metadata(registry, backbone, tasks, tolerance), indent=2, ensure_ascii=False)
        with plain(backbone.device), written(path, registry.file_mode, replace=False) as unfinished:
            shapes = ({0: torch.export.Dim("batch", min=1)},)
            module, example = ExportableModel(model).eval(), (probe_images(backbone),)
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            target.write(program, names, metadata, unfinished)
            deviation = _deviation(target.load(unfinished), backbone, goldens)
            if not deviation <= tolerance:  # also rejects NaN
                raise ExactnessError(
                    f"{str(path)!r} was not written: its logits for the golden probes deviate by {deviation:.2g} of "
                    f"the largest logit, allowed {tolerance:g}. Check the tasks with `addenda verify`."
                )
    except FileExistsError as error:
        raise AddendaError(f"{str(path)!r} already exists. Remove it, or choose another name.") from error
    except OSError as error:
        raise AddendaError(f"{str(path)!r} was not written: {error.strerror or error}.") from error
    refs = tuple(task.ref for task in tasks)
    return Exported(str(path), format, refs, path.stat().st_size, deviation, tolerance)


def _deviation(run: Run, backbone: FrozenBackbone, goldens: Mapping[str, Golden]) -> float:
    """Largest |difference| from recorded logits, relative to the task's largest, for all probes and for one."""
    images, tiny = probe_images(backbone), torch.finfo(torch.float32).tiny
    deviations = []
    for batch in (images, images[:1]):
        logits = run(batch)
        for name, golden in goldens.items():
            difference = (logits[name].float() - golden.logits[: len(batch)]).abs().max()
            deviations.append(difference / golden.logits.abs().max().clamp(min=tiny))
    return torch.stack(deviations).max().item()


def _metadata(registry: Registry, backbone: FrozenBackbone, tasks: Sequence[Task], tolerance: float) -> dict[str, Any]:
    """The file's metadata: origin of the tasks, preprocessing of images, interpretation of logits."""
    return {
        "addenda": addenda.__version__,
        "torch": torch.__version__,
        "generation": registry.generation,
        "backbone": {key: backbone.record()[key] for key in ("name", "fingerprint", "precision")},
        "input": INPUT,
        "preprocessing": backbone.preprocessing,
        "tasks": {
            task.name: {key: getattr(task, key) for key in TASK_FIELDS}
            | {"exclusive": MEANINGS[task.objective].exclusive}
            for task in tasks
        },
        "tolerance": tolerance,
    }


class ExportableModel(nn.Module):
    """The forward pass of an inexact combined model, which has no padding, as a module that can be traced."""

    def __init__(self, model: CombinedModel) -> None:
        super().__init__()
        self._backbone = model.backbone.without_head()
        self.backbone = self._backbone.weights  # a submodule, so that weights have names in the file
        self._sha256 = {name: task.sha256 for name, task in model.tasks.items()}
        self._layout = model.layout
        self._heads = dict(zip(self._sha256.values(), model.heads, strict=True))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B C"]]:
        """Logits of each task by name, for images from the backbone's transform."""
        with traced():
            outputs = forward_pass(self._backbone, images, self._layout, self._heads).answers
        # Cloned, because two names with the same content need separate outputs.
        return {name: outputs[sha256].clone() for name, sha256 in self._sha256.items()}
