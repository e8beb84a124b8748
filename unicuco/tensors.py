"""Tensors of safetensors files, mapped where they lie; named tensors, by their names' beginnings.

The format's own library maps a file for writing, though nobody ever writes. The whole file then
counts as this process' private memory: against its limits, and where the system promises no more
memory than it has. Here a file is mapped for reading only.

What this module does not know: which tensors a model has.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from unicuco.headers import FileHeader, TensorEntry, read_header

# The format's words.
TYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Those that sites may be stored in and models are computed in.
FLOATS: Final = {word: TYPES[word] for word in ("F64", "F32", "F16", "BF16")}


def type_of(entry: TensorEntry) -> torch.dtype:
    """Return the type of a tensor's values.

    Raises:
        ValueError: it is unknown, or the tensor's bytes are not those of its shape.
    """
    kind = TYPES.get(entry.dtype)
    if kind is None:
        raise ValueError(f"{entry.name} is of the unknown type {entry.dtype}")
    if math.prod(entry.shape) * kind.itemsize != entry.end - entry.begin:
        raise ValueError(f"the bytes of {entry.name} do not fit its shape")
    return kind


def map_tensors(path: Path) -> tuple[FileHeader, dict[str, Tensor]]:
    """Return a file's header and all its tensors, whose values are read where they are looked at.

    Nothing may write to them. The file may be removed meanwhile, not changed.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no safetensors file, or a tensor's bytes are not those of its shape.
    """
    header = read_header(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        # That nobody writes is said above; torch only can't know.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return header, {entry.name: _view(mapped, header, entry) for entry in header.entries}


def _view(mapped: mmap.mmap, header: FileHeader, entry: TensorEntry) -> Tensor:
    kind, count = type_of(entry), math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=kind)
    offset = header.data_offset + entry.begin
    return torch.frombuffer(mapped, dtype=kind, count=count, offset=offset).view(entry.shape)


def named_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
