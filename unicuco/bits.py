"""Matrices, activations, keys and values as small integers: rounding, and what storing them takes.

Weights are symmetric integers in compressed-tensors' forms: at 8 bits one scale per row (output
channel), and inputs are rounded per token to 8 bits as they come, for that is what engines compute;
at 4 bits one scale per group of 128 consecutive weights of a row, or of the largest power of two
that divides the row, inputs as they are. A zero stays an exact zero.

Rounding is to the nearest, or by GPTQ (Frantar et al. 2022, arXiv 2210.17323): column after column,
each one's error made up for by those to its right, with the factor that SparseGPT has.

What it does not know: which site has which bits, and files.

Notation: W ``o x i``, g groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from unicuco.types import Site

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

WEIGHT_BITS: Final = (16, 8, 4)  # 16: as the model's files have them
KV_BITS: Final = (16, 8, 6, 4)
GROUP: Final = 128
LIMITS: Final = {8: 127, 6: 31, 4: 7}  # symmetric: the lowest code is left out
_MIN_GROUP: Final = 8  # smaller groups would be mostly scales: then one per row
_BLOCK_COLUMNS: Final = 128  # whose errors reach the columns behind them in one product
_PER_WORD: Final = 8  # 4-bit codes in 32 bits
_SHAPE_BYTES: Final = 16  # two 64-bit numbers beside every packed matrix
_KV_SCALE_BYTES: Final = 2


def group_size(num_columns: int) -> int:
    """Return the weights that share a scale at 4 bits: 128 or the nearest below that divides."""
    size = GROUP
    while size >= _MIN_GROUP:
        if num_columns % size == 0:
            return size
        size //= 2
    return num_columns


def scale_dtype(site: Site) -> torch.dtype:
    """Return the type of a site's scales: two bytes where its weights have two, else four."""
    return torch.bfloat16 if site.item_bytes == 2 else torch.float32


def code_bytes(site: Site, bits: int) -> int:
    """Return the bytes of a site's weights alone, scales and shape left out."""
    if bits == 16:
        return site.num_weights * site.item_bytes
    if bits == 8:
        return site.num_weights
    return site.num_rows * -(-site.num_columns // _PER_WORD) * 4


def scale_bytes(site: Site, bits: int) -> int:
    """Return the bytes of what stands beside a site's weights: scales, and the shape at 4 bits."""
    item = scale_dtype(site).itemsize
    if bits == 16:
        return 0
    if bits == 8:
        return site.num_rows * item
    groups = site.num_columns // group_size(site.num_columns)
    return site.num_rows * groups * item + _SHAPE_BYTES


def site_bytes(site: Site, bits: int) -> int:
    """Return the bytes of a site as its file stores it, zeros included."""
    return code_bytes(site, bits) + scale_bytes(site, bits)


def kv_token_bytes(num_heads: int, head_size: int, bits: int) -> int:
    """Return the bytes that a block's cache takes per token: keys, values, and a scale for each.

    Every head of a token has a scale of its own, two bytes; at 16 bits there are none.
    """
    own = head_size * 2 if bits == 16 else -(-head_size * bits // 8) + _KV_SCALE_BYTES
    return 2 * num_heads * own


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """A rounded matrix: ``codes`` int8 ``o x i``, ``scales`` ``o x g`` (`scale_dtype`)."""

    codes: Tensor
    scales: Tensor

    def dequantise(self) -> Tensor:
        """Return the weights, ``o x i`` float32."""
        groups = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        weight: Tensor = (groups * self.scales.float()[:, :, None]).flatten(1)
        return weight


def round_matrix(
    weight: Tensor, bits: int, dtype: torch.dtype, *, upper: Tensor | None = None
) -> IntegerMatrix:
    """Round a matrix to 8 or 4 bits; zeros stay zeros.

    Args:
        weight: ``o x i``, any float dtype.
        bits: 8 or 4.
        dtype: of the scales.
        upper: ``i x i`` upper Cholesky factor of the inverse Hessian, damped, for GPTQ; none: to
            the nearest.
    """
    limit = LIMITS[bits]
    num_columns = weight.shape[1]
    size = num_columns if bits == 8 else group_size(num_columns)
    work = weight.detach().float()
    groups = work.unflatten(1, (num_columns // size, size))
    largest = groups.abs().amax(2)
    scales = torch.where(largest > 0, largest / limit, 1.0).to(dtype)
    scales = torch.where(scales > 0, scales, torch.finfo(dtype).tiny)
    if upper is None:
        codes = (groups / scales.float()[:, :, None]).round().clamp(-limit, limit).flatten(1)
    else:
        steps = scales.float().repeat_interleave(size, 1)
        codes = round_columns(work, steps, limit, upper, work == 0)
    return IntegerMatrix(codes.to(torch.int8), scales)


def round_columns(
    weight: Tensor, scale: Tensor, limit: int, upper: Tensor, zero: Tensor | None
) -> Tensor:
    """Round column by column, each error made up for to its right; return ``o x i`` float64 codes.

    Args:
        weight: ``o x i``, any float dtype.
        scale: ``o x i`` steps, > 0.
        limit: codes lie in [-limit, limit].
        upper: ``i x i`` upper Cholesky factor of the damped inverse Hessian.
        zero: ``o x i``, True where a code is 0 whatever the weight; none: nowhere.
    """
    work = weight.to(torch.float64, copy=True)
    scale, upper, codes = scale.double(), upper.double(), torch.zeros_like(work)
    for start in range(0, work.shape[1], _BLOCK_COLUMNS):
        end = min(start + _BLOCK_COLUMNS, work.shape[1])
        part = work[:, start:end]  # a view: updates inside the block are seen at once
        errors = torch.zeros_like(part)
        for k in range(end - start):
            column = start + k
            code = (part[:, k] / scale[:, column]).round().clamp(-limit, limit)
            if zero is not None:
                code = code.masked_fill(zero[:, column], 0.0)
            codes[:, column] = code
            errors[:, k] = (part[:, k] - code * scale[:, column]) / upper[column, column]
            part[:, k:] -= torch.outer(errors[:, k], upper[column, column:end])
        work[:, end:] -= errors @ upper[start:end, end:]
    return codes


def pack_words(codes: Tensor) -> Tensor:
    """Pack ``o x i`` 4-bit codes, int8, into ``o x ceil(i / 8)`` int32, lowest bits first."""
    padding = -codes.shape[1] % _PER_WORD
    unsigned = torch.nn.functional.pad(codes.to(torch.int32) + 8, (0, padding))
    shifts = torch.arange(_PER_WORD, dtype=torch.int32) * 4
    words = unsigned.unflatten(1, (-1, _PER_WORD)) << shifts
    packed: Tensor = words.sum(2, dtype=torch.int32)
    return packed


def unpack_words(words: Tensor, num_columns: int) -> Tensor:
    """Undo `pack_words`: ``o x i`` int8."""
    shifts = torch.arange(_PER_WORD, dtype=torch.int32) * 4
    codes = (words[:, :, None] >> shifts) & 15
    return (codes.flatten(1)[:, :num_columns] - 8).to(torch.int8)


def round_vectors(x: Tensor, bits: int) -> Tensor:
    """Return what symmetric rounding leaves of the vectors along the last axis, each on its own.

    Args:
        x: ``... x n``, any float dtype; the result has it too.
        bits: 16 changes nothing.
    """
    if bits == 16:
        return x
    codes, scales = _vector_codes(x, bits)
    return codes.to(x.dtype) * scales.to(x.dtype)


def pack_vectors(x: Tensor, bits: int) -> bytes:
    """Return ``... x n`` vectors as a cache of so many bits stores them: codes, then scales."""
    if bits == 16:
        return x.contiguous().to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    codes, scales = _vector_codes(x, bits)
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).numpy()
    planes = np.unpackbits(unsigned[..., None], axis=-1)[..., 8 - bits :]
    packed = np.packbits(planes.reshape(*unsigned.shape[:-1], -1), axis=-1)
    return packed.tobytes() + scales.numpy().tobytes()


def _vector_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float16 scales, ``... x 1``, of vectors."""
    limit = LIMITS[bits]
    scales = (x.float().abs().amax(-1, keepdim=True) / limit).to(torch.float16)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (x.float() / scales.float()).round().clamp(-limit, limit)
    return codes.to(torch.int8), scales


def round_inputs(module: nn.Module) -> RemovableHandle:
    """Round what a module is given to 8 bits per token, as engines do for 8-bit weights."""
    return module.register_forward_pre_hook(_rounded)


def _rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_vectors(args[0], 8), *args[1:])
