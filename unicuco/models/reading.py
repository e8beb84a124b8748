"""Reads tensors of a model folder by their parameters' names, one at a time, and nothing else.

Opening reads the files' headers alone. Where files and modules go by different names, the library's
own table says which is which. What this module does not know: what a tensor is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from unicuco.models.folder import check_model_folder, weight_files


class TensorReader:
    """The tensors of one model folder.

    Args:
        folder: of the model.
        model: built from its configuration; its parameters need no memory.

    Raises:
        ModelError: no usable model is there.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        check_model_folder(folder)
        self.folder = folder
        files: dict[str, Path] = {}
        for path in weight_files(folder):
            with _opened(path) as file:
                files |= dict.fromkeys(file.keys(), path)
        # Parameter name -> stored name and file.
        self._places = {
            name: (stored, files[stored]) for stored, name in _parameters_of(model, files)
        }

    def holds(self, name: str) -> bool:
        """Say whether the files hold a parameter or buffer."""
        return name in self._places

    def read(self, names: Sequence[str], shape: Sequence[int]) -> Tensor:
        """Return one tensor in its stored type, as memory of the caller's own.

        Args:
            names: of the parameter in the loaded model; several where modules share it.
            shape: that it must have.

        Raises:
            ModelError: no file holds it, it is of another shape, or NaN or infinite.
        """
        place = next((self._places[name] for name in names if name in self._places), None)
        if place is None:
            raise ModelError(
                f"{self.folder} holds no tensor for {names[0]}: it is missing, or the library makes"
                " it of several others while it loads a whole model; use one shard"
            )
        stored, path = place
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(stored).clone()
        if tuple(tensor.shape) != tuple(shape):
            raise ModelError(f"{self.folder}: the shape of {stored} does not fit config.json")
        if tensor.numel() and tensor.is_floating_point():
            low, high = torch.aminmax(tensor)
            if not (math.isfinite(float(low)) and math.isfinite(float(high))):
                raise ModelError(
                    f"{self.folder}: the tensor {stored} holds NaN or infinite weights; repair the "
                    "checkpoint"
                )
        return tensor


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


# Any: the library's file has no types.
@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is cut off or damaged ({error}); fetch the model again"
        ) from error
