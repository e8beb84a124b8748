"""Reads tensors of a model's files by their parameters' names, one at a time, and nothing else.

Of each file that holds one of them the header is read, and the tensors' own bytes. Where files and
modules go by different names, the library's own table says which is which. What this module does
not know: what a tensor is for, and where the files are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from unicuco.errors import ModelError
from unicuco.headers import TensorEntry, parse_header
from unicuco.models.weights import WeightFile, WeightSource, changed
from unicuco.tensors import type_of


class TensorReader:
    """The tensors of one model's files.

    Args:
        source: of the files.
        model: built from its configuration; its parameters need no memory.
    """

    def __init__(self, source: WeightSource, model: PreTrainedModel) -> None:
        self._source = source
        files = {name: file for file in source.files for name in file.tensors}
        # Parameter name -> stored name and file.
        self._places = {
            name: (stored, files[stored]) for stored, name in _parameters_of(model, files)
        }
        self._entries: dict[str, dict[str, TensorEntry]] = {}

    def holds(self, name: str) -> bool:
        """Say whether the files hold a parameter or buffer."""
        return name in self._places

    def read(self, names: Sequence[str], shape: Sequence[int]) -> Tensor:
        """Return one tensor in its stored type, as memory of the caller's own.

        Args:
            names: of the parameter in the loaded model; several where modules share it.
            shape: that it must have.

        Raises:
            ModelError: no file holds it, the file is there no more or another one, or the tensor is
                of another shape, or NaN or infinite.
        """
        place = next((self._places[name] for name in names if name in self._places), None)
        if place is None:
            raise ModelError(
                f"{self._source.place} holds no tensor for {names[0]}: it is missing, or the "
                "library makes it of several others while it loads a whole model; use one shard"
            )
        stored, file = place
        tensor = self._tensor(file, self._entry(file, stored))
        if tuple(tensor.shape) != tuple(shape):
            raise ModelError(
                f"{self._source.place}: the shape of {stored} does not fit config.json"
            )
        if tensor.numel() and tensor.is_floating_point():
            low, high = torch.aminmax(tensor)
            if not (math.isfinite(float(low)) and math.isfinite(float(high))):
                raise ModelError(
                    f"{self._source.place}: the tensor {stored} holds NaN or infinite weights; "
                    "repair the checkpoint"
                )
        return tensor

    def _entry(self, file: WeightFile, stored: str) -> TensorEntry:
        """Return where a tensor lies in its file, whose header is read once."""
        if file.name not in self._entries:
            self._source.check(file)
            header = bytearray(file.header_bytes)
            self._source.read_into(file, 0, memoryview(header))
            if hashlib.sha256(header).hexdigest() != file.header_digest:
                raise changed(self._source.place, file)
            self._entries[file.name] = {
                entry.name: entry for entry in parse_header(bytes(header), file.name)
            }
        return self._entries[file.name][stored]

    def _tensor(self, file: WeightFile, entry: TensorEntry) -> Tensor:
        try:
            dtype = type_of(entry)
        except ValueError as error:
            raise ModelError(f"{self._source.place}/{file.name} can't be read: {error}") from error
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        begin = file.header_bytes + entry.begin
        self._source.read_into(file, begin, data.numpy().data)
        return data.view(dtype).view(entry.shape)


def _parameters_of(model: PreTrainedModel, stored: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each stored tensor that is a parameter or buffer as it is, with that one's name."""
    state = model.state_dict()
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    for name in sorted(stored, key=dot_natural_key):
        found, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if found not in state and name in state:
            found, converter = name, None
        if found in state and converter is None:
            yield name, found
