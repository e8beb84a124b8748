"""Tensors as named arrays that processes of a node can share, and models made of them again.

What it does not know: how arrays travel.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicuco.evaluate.device import move
from unicuco.importance.units import UnitStore
from unicuco.models import build_skeleton
from unicuco.objectives import DenseReference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Arrays = Mapping[str, NDArray[np.generic]]

_BFLOAT16: Final = (
    "bfloat16/"  # numpy has no bfloat16: such tensors travel as int16 under this prefix
)

_BEYOND_BFLOAT16: Final = 0xFFFF  # bits of a float32
_ROWS: Final = 256  # that are looked at at a time


def narrowest(tensor: Tensor) -> Tensor:
    """Return a float32 matrix in bfloat16 where that changes no value; all else as it is.

    Most checkpoints are in bfloat16: evaluators on other nodes then hold half as much, and all have
    less to read at every cut.
    """
    if tensor.dim() < 2 or tensor.dtype is not torch.float32:
        return tensor
    for rows in tensor.detach().view(torch.int32).split(_ROWS):
        if bool((rows & _BEYOND_BFLOAT16).any()):
            return tensor
    return tensor.detach().bfloat16()


def pack_model(
    state: Mapping[str, Tensor],
    ranks: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    units: UnitStore | None = None,
    factors: Mapping[str, Tensor] | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Name a model's tensors, drop orders, Fisher sums, units and GPTQ's factors as arrays."""
    named = {f"state/{name}": tensor for name, tensor in state.items()}
    named |= {f"rank/{path}": tensor for path, tensor in ranks.items()}
    named |= {f"fisher/{path}": tensor for path, tensor in fisher.items()}
    if units is not None:
        named |= units.tensors()
    named |= {f"factor/{path}": tensor for path, tensor in (factors or {}).items()}
    return dict(map(_as_array, named.items()))


def pack_text(ids: Tensor, reference: DenseReference) -> dict[str, NDArray[np.generic]]:
    """Name a text and its dense predictions as the arrays of an evaluator."""
    named = {
        "text/ids": ids,
        "text/probabilities": reference.probabilities,
        "text/negative_entropy": reference.negative_entropy,
    }
    if reference.indices is not None:
        named["text/indices"] = reference.indices
    return dict(map(_as_array, named.items()))


def unpack(arrays: Arrays, device: str = "cpu") -> dict[str, Tensor]:
    """Return arrays as tensors by their plain names; on the CPU in place."""
    tensors = {name: _as_tensor(name, array).to(device) for name, array in arrays.items()}
    return {name.removeprefix(_BFLOAT16): tensor for name, tensor in tensors.items()}


def reference_of(tensors: Mapping[str, Tensor]) -> DenseReference:
    """Return the dense predictions of a text among unpacked arrays."""
    return DenseReference(
        probabilities=tensors["text/probabilities"],
        indices=tensors.get("text/indices"),
        negative_entropy=tensors["text/negative_entropy"],
    )


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of unpacked arrays that are the model's, by the model's names."""
    return {
        name.removeprefix("state/"): t for name, t in tensors.items() if name.startswith("state/")
    }


def working_copy(
    model_config: str,
    state: Mapping[str, Tensor],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Build a model of one's own of its configuration as JSON and its tensors."""
    model = build_skeleton(json.loads(model_config))
    model.float().eval().requires_grad_(False)
    move(model, device, dtype)
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    tensors = model.state_dict(keep_vars=True)
    loaded = {tensors[name].data_ptr() for name in state if name in tensors}
    absent = [
        name for name in missing if tensors[name].data_ptr() not in loaded
    ]  # tied tensors come once
    unfit = [*absent, *unexpected]
    assert not unfit, f"state does not fit the model: {unfit}"
    return model


def _as_array(item: tuple[str, Tensor]) -> tuple[str, NDArray[np.generic]]:
    name, tensor = item
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype is torch.bfloat16:
        return _BFLOAT16 + name, tensor.view(torch.int16).numpy()
    return name, tensor.numpy()


def _as_tensor(name: str, array: NDArray[np.generic]) -> Tensor:
    with warnings.catch_warnings():
        # Arrays that Ray shares are read-only; nothing here writes to them, torch only can't know.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if name.startswith(_BFLOAT16) else tensor
