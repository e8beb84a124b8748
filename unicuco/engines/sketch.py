"""A checksum of weights that survives how an engine stores them: what they make of a fixed vector.

Engines transpose, join and repack matrices, so memory can't be compared with a file byte for byte.
But whatever a matrix looks like, it must still map the same vector to the same vector (Freivalds'
check of products, "Probabilistic machines can use less running time", 1977). The vector's entries
are random signs, so they are exact in every format; what comes out is summed in `NUM_SUMS` groups.
A weight that differs by more than the tolerance times the root mean square of its matrix' sums is
found; in float32 that is far less than a usual weight.

What this module does not know: vLLM, files, who compares what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

NUM_SUMS: Final = 64
_TOLERANCE: Final = 1e-3  # of float32 kernels that add up in different orders, with much room
_ROUNDINGS: Final = 4  # coarser formats round what comes out


@dataclass(frozen=True, slots=True)
class Sketch:
    """Of a whole model.

    ``precision``: the relative spacing of the format that was computed in. ``sums``: name of a
    tensor as Transformers calls it -> `NUM_SUMS` sums.
    """

    precision: float
    sums: Mapping[str, list[float]]


def signs(width: int, like: torch.Tensor) -> torch.Tensor:
    """Return the fixed vector of that width, shape ``(width,)``, on the device and in the dtype."""
    draw = torch.Generator().manual_seed(width)
    return (2.0 * torch.randint(0, 2, (width,), generator=draw) - 1.0).to(like)


def folded(outputs: torch.Tensor) -> list[float]:
    """Return the sums of a vector's entries in groups; entry ``i`` is in group ``i mod 64``."""
    rest = -len(outputs) % NUM_SUMS
    return nn.functional.pad(outputs.double(), (0, rest)).view(-1, NUM_SUMS).sum(0).tolist()


@torch.no_grad()
def sketch_of(model: nn.Module) -> Sketch:
    """Return the sketch of a Transformers model: of every matrix, vector and embedding in it."""
    sums: dict[str, list[float]] = {}
    precision = 0.0
    for name, module in model.named_modules():
        for kind, tensor in module.named_parameters(recurse=False):
            if tensor.ndim not in (1, 2):
                continue
            matrix = tensor.T if isinstance(module, Conv1D) and tensor.ndim == 2 else tensor
            outputs = matrix if tensor.ndim == 1 else matrix @ signs(matrix.shape[1], matrix)
            sums[f"{name}.{kind}"] = folded(outputs)
            precision = max(precision, torch.finfo(tensor.dtype).eps)
    return Sketch(precision, sums)


def first_difference(expected: Sketch, found: Sketch) -> str | None:
    """Return the name of a tensor that is not what it should be; only common names are compared."""
    precision = max(expected.precision, found.precision)
    tolerance = max(_TOLERANCE, _ROUNDINGS * precision)
    for name, sums in expected.sums.items():
        if name not in found.sums:
            continue
        size = math.sqrt(sum(value * value for value in sums) / NUM_SUMS)
        # Written so that a NaN differs, too.
        if not all(
            abs(ours - its) <= tolerance * size
            for ours, its in zip(sums, found.sums[name], strict=True)
        ):
            return name
    return None
