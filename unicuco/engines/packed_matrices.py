"""Matrices that stay packed while a model runs, and the modules that multiply by them.

Every chunk is decoded into one buffer at the moment it is multiplied, and forgotten. What this
module does not know: containers, and which matrices stay decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from unicuco.errors import EngineError
from unicuco.packing import Entry, PackedEntry, Scheme
from unicuco.packing.coder import Bytes
from unicuco.packing.int8 import FLOATS
from unicuco.packing.layout import chunk_shapes


class Buffer:
    """Where every chunk is decoded: its stored bytes, and float32 weights made of them.

    While 8-bit weights are rounded to their file's type, there is a copy of the chunk in that type.
    """

    def __init__(self, matrices: list[PackedMatrix]) -> None:
        items = max((m.largest_chunk for m in matrices), default=0)
        widths = [m.item_bytes for m in matrices if not m.is_decoded]
        self.stored = np.empty(items * max(widths, default=0), np.uint8)
        self.weights = torch.empty(items)
        self._rounding_bytes = max((m.rounding_bytes for m in matrices), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes that the buffer takes."""
        return self.stored.nbytes + self.weights.nbytes + self._rounding_bytes


class PackedMatrix:
    """A stored matrix ``a x b``, packed or decoded to what its file type or 8 bits take."""

    def __init__(self, packed: PackedEntry) -> None:
        entry = packed.entry
        self.entry = entry
        self._packed: PackedEntry | None = packed
        self._scales = packed.scales() if entry.scheme is Scheme.INT8 else None
        self._decoded = np.empty(0, np.uint8)
        self.item_bytes = 1 if self._scales else entry.num_bytes // max(1, entry.num_items)
        self._heights = [shape[0] for shape in chunk_shapes(entry.shape)]
        if entry.scheme is Scheme.RAW:
            self.decode()

    @property
    def largest_chunk(self) -> int:
        """Items of the largest chunk."""
        return max(self._heights) * self.entry.shape[1]

    @property
    def rounding_bytes(self) -> int:
        """Bytes of the largest chunk in the file's type, where it has to be rounded to that."""
        width = FLOATS[self.entry.dtype].itemsize if self._scales is not None else 0
        return self.largest_chunk * width

    @property
    def is_decoded(self) -> bool:
        """Whether it is held decoded."""
        return self._packed is None

    @property
    def held_bytes(self) -> int:
        """Bytes of it in memory now."""
        scales = sum(self.entry.shape) if self._scales is not None else 0
        return scales + (len(self._packed.payload) if self._packed else self._decoded.nbytes)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of it in memory once decoded."""
        scales = sum(self.entry.shape) if self._scales is not None else 0
        return scales + self.entry.num_items * self.item_bytes

    def decode(self) -> None:
        """Hold it decoded from now on."""
        packed = self._packed
        if packed is None:
            return
        if self.entry.scheme is Scheme.RAW:
            self._decoded = np.frombuffer(packed.payload, np.uint8)
        else:
            self._decoded = np.empty(self.entry.num_items * self.item_bytes, np.uint8)
            start = 0
            for index, height in enumerate(self._heights):
                end = start + height * self.entry.shape[1] * self.item_bytes
                packed.decode_chunk(index, self._decoded[start:end])
                start = end
        self._packed = None

    def chunks(
        self, buffer: Buffer, wanted: Callable[[int, int], bool] = lambda start, end: True
    ) -> Iterator[tuple[int, Tensor]]:
        """Give first row and float32 weights ``rows x b`` of chunks, valid until the next.

        Args:
            buffer: where they are decoded.
            wanted: told the first row of a chunk and the one behind it; False: leave it out.
        """
        width = self.entry.shape[1]
        starts = accumulate(self._heights, initial=0)
        for index, (row, height) in enumerate(zip(starts, self._heights, strict=False)):
            if not wanted(row, row + height):
                continue
            start, size = (n * width * self.item_bytes for n in (row, height))
            if self._packed is None:
                stored = self._decoded[start : start + size]
            else:
                stored = buffer.stored[:size]
                self._packed.decode_chunk(index, stored)
            weights = buffer.weights[: height * width].view(height, width)
            if self._scales is not None:
                codes = stored.view(np.int8).reshape(height, width)
                self._scales.part(row, codes).dequantise(weights)
                # As the unpacked model has them: rounded to the type of its file.
                weights.copy_(weights.to(FLOATS[self.entry.dtype]))
            else:
                weights.copy_(as_floats(stored, self.entry).view(height, width))
            yield row, weights


class PackedLinear(nn.Module):
    """``Linear`` (or, ``transposed``, GPT-2's ``Conv1D``) over a packed matrix."""

    def __init__(
        self, matrix: PackedMatrix, buffer: Buffer, bias: Tensor | None, *, transposed: bool
    ) -> None:
        super().__init__()
        self._matrix, self._buffer, self._transposed = matrix, buffer, transposed
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, ``... x o``."""
        rows, columns = self._matrix.entry.shape
        out = x.new_zeros(*x.shape[:-1], columns if self._transposed else rows)
        for row, weights in self._matrix.chunks(self._buffer):
            part = slice(row, row + len(weights))
            if self._transposed:
                out += x[..., part] @ weights
            else:
                out[..., part] = x @ weights.T
        return out if self.bias is None else out + self.bias


class PackedEmbedding(nn.Module):
    """``Embedding`` over a packed matrix; chunks without a wanted row are not decoded."""

    def __init__(self, matrix: PackedMatrix, buffer: Buffer) -> None:
        super().__init__()
        self._matrix, self._buffer = matrix, buffer

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids, ``... x h``."""
        out = torch.zeros(*ids.shape, self._matrix.entry.shape[1])
        for row, weights in self._matrix.chunks(
            self._buffer, lambda start, end: bool(((ids >= start) & (ids < end)).any())
        ):
            here = (ids >= row) & (ids < row + len(weights))
            out[here] = weights[ids[here] - row]
        return out


def as_floats(data: Bytes, entry: Entry) -> Tensor:
    """View a float tensor's bytes as such, flat.

    Raises:
        EngineError: it is stored as something else.
    """
    if entry.dtype not in FLOATS:
        raise EngineError(f"{entry.name} is stored as {entry.dtype}, which can't run packed")
    return torch.from_numpy(data).view(FLOATS[entry.dtype])
