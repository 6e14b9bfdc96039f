"""File formats of exported models: writing them, and loading them without Addenda."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.export import ExportedProgram

from addenda.exceptions import AddendaError

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
