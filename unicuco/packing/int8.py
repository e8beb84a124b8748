"""Matrices as 8-bit integers of low entropy: scales follow sensitivity, not the largest weight.

A weight is q · r · c, with an integer q, a factor r of its row and c of its column. With entropy
coding a matrix costs about log2(σ√(2πe)/rc) bits per weight, whatever its largest weight, and it
errs by (rc)²/12 per weight. Minimising Σ F (rc)²/24, the KL to second order with F the Fisher
diagonal, at a given sum of bits makes F (rc)² the same everywhere: coarse steps where an input is
small or a loss flat, fine ones elsewhere. Where the inputs' second moments are known, columns are
rounded one after the other and each one's error is made up for by those to its right (GPTQ, arXiv
2210.17323); the column's step is then U_jj, the upper Cholesky factor's diagonal that takes the
place of 1/rms(x_j).

Both factors are powers of the fourth root of two, stored as exponents of one byte.

Notation: W ``o x i``; U the factor of the inverse second moment of inputs, ``i x i``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicuco.bits import round_columns
from unicuco.importance.sparsegpt import InverseFactor

FLOATS: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
LIMIT: Final = 127
_STEPS_PER_OCTAVE: Final = 4
_EXPONENT_LIMIT: Final = 127
_POWERS: Final = torch.tensor([2.0 ** (k / _STEPS_PER_OCTAVE) for k in range(_STEPS_PER_OCTAVE)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Matrix:
    """A quantised matrix as its file stores it: ``a x b`` codes, exponents of both axes.

    The weight is code · 2^((rows + columns) / 4).
    """

    codes: NDArray[np.int8]
    rows: NDArray[np.int8]
    columns: NDArray[np.int8]

    def part(self, start: int, codes: NDArray[np.int8]) -> Int8Matrix:
        """Return ``codes`` as the rows from ``start`` on, with the scales that belong to them."""
        rows = self.rows[start : start + len(codes)]
        return Int8Matrix(codes=codes, rows=rows, columns=self.columns)

    def transposed(self) -> Int8Matrix:
        """Return the matrix with its axes exchanged."""
        codes = np.ascontiguousarray(self.codes.T)
        return Int8Matrix(codes=codes, rows=self.columns, columns=self.rows)

    def dequantise(self, out: Tensor | None = None) -> Tensor:
        """Return the weights, ``a x b`` float32; the same bits on every machine.

        Args:
            out: where to put them, ``a x b`` float32.
        """
        out = torch.empty(self.codes.shape) if out is None else out
        out.copy_(torch.from_numpy(self.codes))
        # One factor after the other: products of both might leave the range of float32.
        out.mul_(_factors(self.rows)[:, None])
        return out.mul_(_factors(self.columns))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How much a matrix' errors matter, on calibration text: what its steps follow.

    ``rows`` and ``columns``: ``o`` and ``i`` float64, >= 0; their product is the Fisher diagonal,
    the KL in nats per token being half of it times the squared error. ``factor`` of the inputs'
    second moment, or none where rounding makes up for nothing.
    """

    rows: Tensor
    columns: Tensor
    factor: InverseFactor | None = None

    def steps(self, step: float) -> tuple[Tensor, Tensor]:
        """Return exponents of rows and columns, int8, that make every weight's share of KL equal.

        Args:
            step: root of F (rc)², > 0; a weight's share is its square / 24 nats per token.
        """
        # Fisher estimates of rows that the text hardly reached (rare tokens) are far too small; the
        # mean is added as if seen once more. Chosen on validation text of the reference model.
        rows = self.rows + self.rows.mean()
        columns = self.columns + 1e-2 * self.columns.mean()
        if self.factor is not None:
            columns = self.factor.upper.diagonal().square().reciprocal()
        return _exponents(step / rows.sqrt()), _exponents(columns.rsqrt())


def quantise(
    weight: Tensor, sensitivity: Sensitivity, step: float, *, drop: Tensor | None = None
) -> Int8Matrix:
    """Round a matrix.

    Args:
        weight: ``o x i``, any float dtype.
        sensitivity: of it.
        step: as `Sensitivity.steps` takes it.
        drop: ``o x i``, True where a weight becomes zero; None: nowhere.
    """
    rows, columns = sensitivity.steps(step)
    rows = _widened(weight, rows, columns)
    scaled = weight.double() / _factors(columns.numpy()).double()
    scale = _factors(rows.numpy()).double()[:, None]
    if sensitivity.factor is None:
        codes = (scaled / scale).round()
        codes = codes if drop is None else codes.masked_fill(drop, 0.0)
    else:
        steps = scale * _factors(columns.numpy()).double()
        codes = round_columns(weight, steps, LIMIT, sensitivity.factor.upper, drop)
    return Int8Matrix(
        codes=codes.clamp(-LIMIT, LIMIT).to(torch.int8).numpy(),
        rows=rows.numpy(),
        columns=columns.numpy(),
    )


def quantise_per_channel(weight: Tensor) -> Int8Matrix:
    """Round a matrix the plain way: the largest weight of each row is 127, up to the scales' grid.

    Args:
        weight: ``o x i``, any float dtype.
    """
    largest = weight.double().abs().amax(1) / LIMIT
    rows = _exponents(torch.where(largest > 0, largest, 1.0), up=True)
    codes = (weight.double() / _factors(rows.numpy()).double()[:, None]).round()
    columns = np.zeros(weight.shape[1], np.int8)
    return Int8Matrix(codes=codes.to(torch.int8).numpy(), rows=rows.numpy(), columns=columns)


def drop_by_peaks(weight: Tensor, peaks: Tensor, sparsity: float) -> Tensor:
    """Return what goes first by |w| times its input's largest absolute value, equally in each row.

    Args:
        weight: ``o x i``.
        peaks: ``i``, the inputs' l-infinity norms over calibration text.
        sparsity: fraction of each row, in [0, 1).

    Returns:
        ``o x i`` bool, True = dropped; ties by column.
    """
    score = weight.float().abs() * peaks
    count = int(sparsity * weight.shape[1])
    order = score.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def _widened(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Make the steps of rows wide enough for their largest weight."""
    largest = (weight.double() / _factors(columns.numpy()).double()).abs().amax(1) / LIMIT
    needed = _exponents(torch.where(largest > 0, largest, 1e-300), up=True)
    return torch.maximum(rows, needed)


def _exponents(scale: Tensor, *, up: bool = False) -> Tensor:
    """Return the nearest exponents (or the next above) of scales > 0, int8."""
    wanted = _STEPS_PER_OCTAVE * scale.double().log2()
    # Slack: a scale that is a power itself must not be rounded up to the next.
    wanted = (wanted - 1e-9).ceil() if up else wanted.round()
    return wanted.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT).to(torch.int8)


def _factors(exponents: NDArray[np.int8]) -> Tensor:
    """Return the scales of exponents, float32, exact but for four constants."""
    k = torch.from_numpy(exponents).to(torch.int32)
    whole = torch.div(k, _STEPS_PER_OCTAVE, rounding_mode="floor")
    return torch.ldexp(_POWERS[(k - _STEPS_PER_OCTAVE * whole).long()], whole)
