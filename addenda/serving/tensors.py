"""Requests and responses of the Open Inference Protocol: JSON, optionally followed by binary tensors."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from addenda.exceptions import DataError

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header with the length of the JSON in bytes, if binary tensors follow it."""
MAX_VALUES = 2**22
MAX_LISTS = 2**18
"""Limits on the values, and on the lists and objects, of one JSON document: Python objects need far more memory."""

Parameters = dict[str, Any]
Values = np.ndarray[Any, Any]
"""The values of a tensor: float32, or an object array of bytes (inputs) or strings (outputs)."""


class _Named(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    parameters: Parameters = {}


class _Input(_Named):
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=8), FailFast()]
    datatype: str
    data: Any = None


class _Request(BaseModel):
    model_config = ConfigDict(strict=True)
    inputs: Annotated[list[_Input], FailFast()]
    outputs: Annotated[list[_Named], FailFast()] = []
    parameters: Parameters = {}
    id: str = ""


@dataclass(frozen=True, eq=False)
class Request:
    """A parsed inference request."""

    id: str  # chosen by the client, repeated in the response
    tensors: dict[str, Values]  # inputs by name, each reshaped to its declared shape
    outputs: dict[str, bool]  # requested outputs in order, and whether each is binary; empty requests all
    binary: bool  # whether outputs are binary by default
    parameters: Parameters


@dataclass(frozen=True, eq=False)
class Output:
    """An output tensor of a response, its parameters, and whether to encode it in binary."""

    name: str
    values: Values
    parameters: Mapping[str, str | int | bool]
    binary: bool


def parse(body: bytes, header_length: str | None = None) -> Request:
    """Parses a request. BYTES values in JSON are base64, since JSON cannot hold bytes.

    Source: KServe, Open Inference Protocol v2; Triton, binary tensor data extension. Only FP32 and BYTES are supported.
    """
    size = _length(header_length, len(body))
    if body.count(b",", 0, size) > MAX_VALUES or body.count(b"[", 0, size) + body.count(b"{", 0, size) > MAX_LISTS:
        raise DataError(
            f"The request's JSON has more than {MAX_VALUES} values or {MAX_LISTS} lists. Send tensors in binary."
        )
    try:
        request = _Request.model_validate(from_json(body[:size]))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        at = ".".join(map(str, fault["loc"])) or "The request"
        raise DataError(f"{at}: {fault['msg']}; found {short(fault['input'])}.") from error
    except ValueError as error:
        raise DataError(f"The request is not valid JSON: {error}.") from error
    tensors: dict[str, Values] = {}
    remaining = memoryview(body)[size:]
    for declared in request.inputs:
        subject = f"Input {short(declared.name)}"
        if declared.name in tensors:
            raise DataError(f"{subject} is given twice.")
        _check_extensions(subject, declared.parameters)
        num_bytes = declared.parameters.get("binary_data_size")
        if num_bytes is None:
            tensors[declared.name] = _from_json(subject, declared)
            continue
        if type(num_bytes) is not int or not 0 <= num_bytes <= len(remaining):
            raise DataError(
                f"{subject} has binary_data_size {short(num_bytes)}, but {len(remaining)} bytes follow the JSON, whose "
                f"length is given by the header {HEADER_LENGTH}."
            )
        tensors[declared.name] = _from_binary(subject, declared, remaining[:num_bytes])
        remaining = remaining[num_bytes:]
    if remaining:
        raise DataError(f"The request has {len(remaining)} bytes beyond the binary_data_size of its inputs.")
    binary = _flag("The request", request.parameters, "binary_data_output", False)
    outputs: dict[str, bool] = {}
    for requested in request.outputs:
        subject = f"Output {short(requested.name)}"
        if requested.name in outputs:
            raise DataError(f"{subject} is requested twice.")
        _check_extensions(subject, requested.parameters)
        outputs[requested.name] = _flag(subject, requested.parameters, "binary_data", binary)
    return Request(request.id, tensors, outputs, binary, request.parameters)


def encode(response: Mapping[str, Any], outputs: Sequence[Output]) -> tuple[bytes, int | None]:
    """Encodes a response; also returns the length of its JSON if binary tensors follow it.

    JSON numbers are written so that they parse to the same float32 bits.
    """
    described, chunks = [], []
    for output in outputs:
        datatype = "FP32" if output.values.dtype == np.float32 else "BYTES"
        tensor = {
            "name": output.name,
            "datatype": datatype,
            "shape": output.values.shape,
            "parameters": output.parameters,
        }
        if output.binary:
            chunks.append(_to_binary(output.values))
            tensor["parameters"] = {**output.parameters, "binary_data_size": len(chunks[-1])}
        else:
            tensor["data"] = output.values.ravel().tolist()  # float64 of the same values, which JSON writes in full
        described.append(tensor)
    head = json.dumps({**response, "outputs": described}, allow_nan=False).encode()
    return b"".join([head, *chunks]), len(head) if chunks else None


def _to_binary(values: Values) -> bytes:
    if values.dtype == np.float32:
        return values.astype("<f4").tobytes()
    strings = [text.encode() for text in values.flat]
    return b"".join(len(text).to_bytes(4, "little") + text for text in strings)


def _length(header_length: str | None, available: int) -> int:
    """The length of the JSON at the start of a body, in bytes."""
    if header_length is None:
        return available
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
        raise DataError(f"{HEADER_LENGTH} is {short(header_length)}, not a number of bytes.")
    if int(header_length) > available:
        raise DataError(f"{HEADER_LENGTH} is {header_length}, but the body has {available} bytes.")
    return int(header_length)


def _flag(subject: str, parameters: Parameters, name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise DataError(f"{subject} has {name} {short(value)}; it must be true or false.")
    return value


def _check_extensions(subject: str, parameters: Parameters) -> None:
    """Rejects protocol extensions that are not supported and change the meaning of the response."""
    for name in ("shared_memory_region", "classification"):
        if name in parameters:
            raise DataError(f"{subject} uses {name}, which is not supported. Send or request the tensor itself.")


def _from_json(subject: str, declared: _Input) -> Values:
    """Reads a tensor from JSON data, flat or nested according to its shape."""
    values = declared.data
    if not isinstance(values, list):
        raise DataError(f"{subject} has neither a list as data nor a binary_data_size.")
    nested = bool(values) and isinstance(values[0], list)
    for size in declared.shape[1:] if nested else ():
        if any(type(row) is not list or len(row) != size for row in values):
            raise DataError(f"The data of {subject} is not nested according to its shape {declared.shape}.")
        values = [value for row in values for value in row]
    _check_count(subject, declared, len(values))
    kinds = set(map(type, values))
    try:
        if declared.datatype == "BYTES" and kinds <= {str}:
            return np.array([base64.b64decode(text, validate=True) for text in values], object).reshape(declared.shape)
        if declared.datatype == "FP32" and kinds <= {int, float}:
            with np.errstate(over="ignore"):  # gives infinity, which the caller rejects
                return np.array(values, np.float64).astype(np.float32).reshape(declared.shape)
    except (ValueError, OverflowError) as error:
        raise DataError(f"The data of {subject} cannot be read as {declared.datatype}: {error}.") from error
    types = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
    raise DataError(
        f"{subject} has datatype {short(declared.datatype)} and values of type {types}. Supported: FP32 with numbers, "
        "BYTES with base64 strings."
    )


def _from_binary(subject: str, declared: _Input, raw: memoryview) -> Values:
    """Reads a binary tensor: little-endian float32, or strings, each prefixed with its length in four bytes."""
    if declared.datatype == "FP32":
        _check_count(subject, declared, len(raw) / 4)
        return np.frombuffer(raw, "<f4").reshape(declared.shape)
    if declared.datatype != "BYTES":
        raise DataError(f"{subject} has datatype {short(declared.datatype)}. Supported: FP32 and BYTES.")
    strings: list[bytes] = []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        if len(raw) < 4 + size:
            raise DataError(
                f"String {len(strings)} of {subject} is longer than the {len(raw)} bytes left; prefix each string with "
                "its length (uint32, little-endian)."
            )
        strings.append(raw[4 : 4 + size].tobytes())
        raw = raw[4 + size :]
    _check_count(subject, declared, len(strings))
    return np.array(strings, object).reshape(declared.shape)


def _check_count(subject: str, declared: _Input, count: float) -> None:
    expected = math.prod(declared.shape)
    if count != expected:
        raise DataError(f"{subject} has shape {declared.shape}, which is {expected} values; its data has {count:g}.")
