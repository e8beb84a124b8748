"""Writes a safetensors file tensor by tensor: its header first, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from unicuco.export.staging import HashedFile
from unicuco.tensors import TYPES

_ALIGNMENT: Final = 8  # the format's headers end at multiples of it


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor to be written: ``dtype`` is the format's word; ``make`` gives its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * TYPES[self.dtype].itemsize


def write_tensors(target: Path, tensors: Sequence[StoredTensor]) -> tuple[str, int]:
    """Write one file.

    Returns:
        Its sha256, and the bytes of all tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with HashedFile(target) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data = tensor.make().contiguous().flatten().view(torch.uint8).numpy().data
            assert len(data) == tensor.num_bytes, f"{tensor.name} is not of its stated size"
            out.write(data)
    return out.sha256(), position
