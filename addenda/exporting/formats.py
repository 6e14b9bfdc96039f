"""The formats of an exported model: how each is written, and how it is run without Addenda."""

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
"""Under this name a file carries what it is: an extra file of the archive, or a key of ONNX's own metadata."""
INPUT = "images"
MAX_ONNX_BYTES = 1_600_000_000
"""Weights of one ONNX file, at most: the format ends at 2 GiB, and torch puts larger ones into a second file."""

Run = Callable[[Float[Tensor, "B 3 H W"]], Mapping[str, Tensor]]


class Format(NamedTuple):
    """A format that a traced program can be written in."""

    suffix: str
    check: Callable[[Sequence[str], str], None]  # raises AddendaError unless outputs' names and a precision can be had
    write: Callable[[ExportedProgram, Sequence[str], str, Path], None]  # a program, its outputs' names, its metadata
    load: Callable[[Path], Run]  # to be run on images without Addenda


def _write_torch(program: ExportedProgram, names: Sequence[str], metadata: str, path: Path) -> None:
    program.example_inputs = None  # the one part that torch would pickle
    constants = program.constants  # slices of one storage would be written as one
    constants.update({name: one.clone() for name, one in constants.items() if isinstance(one, Tensor)})
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA: metadata})


def _load_torch(path: Path) -> Run:
    with path.open("rb") as file:
        run: Run = torch.export.load(file).module()
    return run


def _check_onnx(names: Sequence[str], precision: str) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise AddendaError(f"Export to ONNX needs {missing[0]}: pip install 'addenda[export]'.")
    if precision != "float32":
        raise AddendaError(f"The backbone computes in {precision}, which ONNX runtimes do not: --format torch-export.")
    if INPUT in names:
        raise AddendaError(
            f"Task {INPUT!r} has the name of the model's input, which ONNX does not allow: --format torch-export does."
        )


def _write_onnx(program: ExportedProgram, names: Sequence[str], metadata: str, path: Path) -> None:
    weights = (*program.state_dict.values(), *program.constants.values())
    num_bytes = sum(one.nbytes for one in weights if isinstance(one, Tensor))
    if num_bytes > MAX_ONNX_BYTES:
        raise AddendaError(
            f"{num_bytes / 1e9:.1f} GB of weights do not fit into one ONNX file, which takes "
            f"{MAX_ONNX_BYTES / 1e9:.1f} GB: --format torch-export has no such limit."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says of its own insides
        made = torch.onnx.export(program, input_names=[INPUT], dynamo=True, verbose=False)
    assert made is not None
    graph: Any = made.model.graph
    # Outputs are named after the tasks; a value within the graph that is called like one is called otherwise.
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if value.name in {INPUT, *names}:
            value.name = f"{value.name}.inner"  # no task's name has a dot
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    made.model.metadata_props[METADATA] = metadata
    made.save(path)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Mapping[str, Tensor]:
        found = session.run(names, {INPUT: images.numpy()})
        return {name: torch.from_numpy(logits) for name, logits in zip(names, found, strict=True)}

    return run


FORMATS = {
    "torch-export": Format(".pt2", lambda names, precision: None, _write_torch, _load_torch),
    "onnx": Format(".onnx", _check_onnx, _write_onnx, _load_onnx),
}
