from __future__ import annotations

import numpy as np
import pytest
import torch

from unicuco.importance.sparsegpt import InverseFactor
from unicuco.packing import drop_by_peaks, entropy_bits, quantise, quantise_per_channel
from unicuco.packing.int8 import Int8Matrix, Sensitivity

ROWS, COLUMNS = 48, 64
SIZES = torch.logspace(-0.5, 0.5, COLUMNS)  # of inputs; weights are the smaller for it


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """Correlated, with columns of very different size, as activations are."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(4000, 8, generator=generator) @ torch.randn(
        8, COLUMNS, generator=generator
    )
    own = torch.randn(4000, COLUMNS, generator=generator)
    return (own + 0.4 * shared) * SIZES


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) / 8 / SIZES


@pytest.fixture(scope="module")
def sensitivity(inputs: torch.Tensor) -> Sensitivity:
    moment = (inputs.T @ inputs) / len(inputs)
    return Sensitivity(
        rows=torch.ones(ROWS, dtype=torch.float64),
        columns=moment.diagonal().double(),
        factor=InverseFactor.of(moment),
    )


def error(weight: torch.Tensor, matrix: Int8Matrix, inputs: torch.Tensor) -> float:
    return float((inputs @ (weight - matrix.dequantise()).T).square().mean())


def entropy(matrix: Int8Matrix) -> float:
    return entropy_bits(matrix.codes.reshape(-1).view(np.uint8))


def test_lower_entropy_at_equal_or_better_output_error_than_plain_int8(
    weight: torch.Tensor, inputs: torch.Tensor, sensitivity: Sensitivity
) -> None:
    plain = quantise_per_channel(weight)
    aware = quantise(weight, sensitivity, 0.02)
    assert error(weight, aware, inputs) <= error(weight, plain, inputs)
    assert entropy(aware) < entropy(plain) - 1


def test_making_up_for_errors_is_worth_its_while(
    weight: torch.Tensor, inputs: torch.Tensor, sensitivity: Sensitivity
) -> None:
    alone = Sensitivity(rows=sensitivity.rows, columns=sensitivity.columns)
    rounded, swept = quantise(weight, alone, 0.1), quantise(weight, sensitivity, 0.1)
    assert entropy(swept) < entropy(rounded)
    assert error(weight, swept, inputs) < 1.2 * error(weight, rounded, inputs)


def test_entropy_falls_and_error_grows_with_the_step(
    weight: torch.Tensor, inputs: torch.Tensor, sensitivity: Sensitivity
) -> None:
    steps = [quantise(weight, sensitivity, step) for step in (0.02, 0.08, 0.32)]
    entropies = [entropy(matrix) for matrix in steps]
    errors = [error(weight, matrix, inputs) for matrix in steps]
    assert entropies == sorted(entropies, reverse=True)
    assert errors == sorted(errors)


def test_entropy_of_normal_weights_is_what_theory_says(weight: torch.Tensor) -> None:
    flat = Sensitivity(
        rows=torch.ones(ROWS, dtype=torch.float64), columns=torch.ones(COLUMNS, dtype=torch.float64)
    )
    even = weight * SIZES
    matrix = quantise(even, flat, 0.05)
    step = float(quantise_step(matrix))
    sigma = float(even.std())
    assert entropy(matrix) == pytest.approx(
        np.log2(sigma / step * np.sqrt(2 * np.pi * np.e)), abs=0.05
    )


def quantise_step(matrix: Int8Matrix) -> float:
    (row,), (column,) = set(matrix.rows.tolist()), set(matrix.columns.tolist())
    return 2.0 ** ((row + column) / 4)


def test_scales_are_the_powers_that_their_exponents_say() -> None:
    exponents = np.arange(-127, 128, dtype=np.int8)
    matrix = Int8Matrix(
        codes=np.full((255, 1), 3, np.int8), rows=exponents, columns=np.array([5], np.int8)
    )
    expected = 3 * 2.0 ** ((exponents.astype(float) + 5) / 4)
    assert np.allclose(matrix.dequantise()[:, 0].numpy(), expected, rtol=1e-6)


def test_dropped_weights_are_zero_and_the_others_make_up_for_them(
    weight: torch.Tensor, inputs: torch.Tensor, sensitivity: Sensitivity
) -> None:
    drop = drop_by_peaks(weight, inputs.abs().amax(0), 0.5)
    assert drop.sum(1).tolist() == [COLUMNS // 2] * ROWS
    matrix = quantise(weight, sensitivity, 0.02, drop=drop)
    assert not matrix.codes[drop.numpy()].any()
    assert error(weight, matrix, inputs) < float((inputs @ (weight * drop).T).square().mean())


def test_peaks_decide_what_is_dropped() -> None:
    weight = torch.tensor([[1.0, 1.0, 2.0, 2.0]])
    drop = drop_by_peaks(weight, torch.tensor([4.0, 1.0, 1.0, 1.0]), 0.5)
    assert drop.tolist() == [[False, True, True, False]]


def test_a_large_weight_widens_its_row_and_is_never_clipped(sensitivity: Sensitivity) -> None:
    weight = torch.zeros(ROWS, COLUMNS)
    weight[0, -1] = 1000.0
    matrix = quantise(weight, sensitivity, 0.01)
    assert float(matrix.dequantise()[0, -1]) == pytest.approx(1000.0, rel=0.01)


def test_parts_and_transposes_are_those_of_the_weights(
    weight: torch.Tensor, sensitivity: Sensitivity
) -> None:
    matrix = quantise(weight, sensitivity, 0.05)
    whole = matrix.dequantise()
    assert torch.equal(matrix.part(8, matrix.codes[8:20]).dequantise(), whole[8:20])
    assert torch.allclose(matrix.transposed().dequantise(), whole.T, rtol=1e-6)
