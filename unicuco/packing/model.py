"""A model's matrices as 8-bit ones, and the loaded model set to what they decode to.

What it does not know: texts, and which step is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unicuco.errors import ModelError
from unicuco.export.names import match_sites, named_like
from unicuco.headers import FileHeader, TensorEntry
from unicuco.models import LoadedModel, weight_files
from unicuco.packing.int8 import FLOATS, Int8Matrix
from unicuco.packing.sensitivity import embedding_names, weight_name
from unicuco.packing.source import read_stored, read_weights_header


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix in a file and in the loaded model; ``transposed`` as `Site` says."""

    header: FileHeader
    entry: TensorEntry
    parameter: str
    transposed: bool

    def read(self) -> Tensor:
        """Return the file's weights, ``o x i`` float32."""
        data = torch.from_numpy(read_stored(self.header, self.entry).copy())
        weight = data.view(FLOATS[self.entry.dtype]).view(self.entry.shape).float()
        return weight.T if self.transposed else weight


class QuantisedModel:
    """Sets a loaded model's matrices to quantised ones; the model must be of its files' weights.

    Args:
        loaded: its parameters are overwritten by `apply`.

    Raises:
        ModelError: the files' tensors can't be matched to the model's matrices.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._parameters = dict(loaded.model.named_parameters())
        self.matrices = {matrix.entry.name: matrix for matrix in _matrices(loaded)}

    @torch.no_grad()
    def apply(
        self, quantise: Callable[[StoredMatrix, Tensor], Int8Matrix]
    ) -> dict[str, Int8Matrix]:
        """Quantise every matrix, set the model to what comes back, and return the matrices.

        Args:
            quantise: given a matrix and its ``o x i`` weights.

        Returns:
            Tensor name -> matrix, as its file stores it.
        """
        done: dict[str, Int8Matrix] = {}
        for name, matrix in self.matrices.items():
            result = quantise(matrix, matrix.read())
            weight = result.dequantise().to(FLOATS[matrix.entry.dtype]).float()
            done[name] = result.transposed() if matrix.transposed else result
            self._parameters[matrix.parameter].copy_(weight.T if matrix.transposed else weight)
        return done

    @torch.no_grad()
    def set(self, change: Callable[[StoredMatrix, Tensor], Tensor]) -> None:
        """Set every matrix to what ``change`` makes of its ``o x i`` weights, ``o x i``."""
        for matrix in self.matrices.values():
            weight = change(matrix, matrix.read())
            self._parameters[matrix.parameter].copy_(weight.T if matrix.transposed else weight)


def _matrices(loaded: LoadedModel) -> Iterator[StoredMatrix]:
    headers = [read_weights_header(path) for path in weight_files(loaded.folder)]
    entries = {entry.name: (header, entry) for header in headers for entry in header.entries}
    shapes = {name: entry.shape for name, (_, entry) in entries.items()}
    sites = match_sites(loaded.profile, shapes)
    if sites is None:
        raise ModelError(
            f"{loaded.folder}: its files' tensors can't be matched to the model's matrices, so it "
            "can't be quantised; pack it without --int8"
        )
    found = [(sites[s.path], weight_name(s), s.transposed) for s in loaded.profile.sites]
    for parameter in set(embedding_names(loaded.model).values()):
        shape = tuple(dict(loaded.model.named_parameters())[parameter].shape)
        named = named_like(parameter, shapes)
        found += [(name, parameter, False) for name in named if shapes[name] == shape]
    for name, parameter, transposed in found:
        header, entry = entries[name]
        if entry.dtype in FLOATS:
            yield StoredMatrix(header, entry, parameter, transposed)


def int8_bytes(folder: Path, matrices: Mapping[str, Int8Matrix]) -> int:
    """Return what the plain 8-bit form takes: a byte per weight, two per row, the rest as it is.

    Args:
        folder: the model.
        matrices: those that are quantised, by tensor name.

    Raises:
        ModelError: the folder's weights can't be read.
    """
    total = 0
    for path in weight_files(folder):
        for entry in read_weights_header(path).entries:
            matrix = matrices.get(entry.name)
            if matrix is None:
                total += entry.end - entry.begin
            else:
                total += matrix.codes.size + 2 * len(matrix.rows)
    return total
