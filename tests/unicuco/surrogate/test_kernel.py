from __future__ import annotations

import gpytorch
import pytest
import torch
from torch import Tensor

from unicuco.surrogate.kernel import DirectionalMatern, as_rows

D = 4


def make_kernel() -> DirectionalMatern:
    kernel = DirectionalMatern(ard_num_dims=D).double()
    kernel.lengthscale = torch.tensor([[0.4, 1.1, 0.7, 2.0]], dtype=torch.float64)
    return kernel.requires_grad_(False)


def matern(x: Tensor, y: Tensor) -> Tensor:
    """The value kernel of two points, by the definition; twice differentiable off the diagonal."""
    scale = torch.tensor([0.4, 1.1, 0.7, 2.0], dtype=torch.float64)
    r = ((x - y) / scale).square().sum().sqrt()
    root = 5**0.5
    return (1 + root * r + 5 * r.square() / 3) * torch.exp(-root * r)


def draw(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=torch.float64)


def covariance(one: Tensor, other: Tensor) -> Tensor:
    # Called as `ScaleKernel` calls it: rows are longer than the points the lengthscales are of.
    return make_kernel().forward(one, other)


def test_value_rows_have_the_matern_kernel_of_the_library() -> None:
    reference = gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=D).double()
    reference.lengthscale = make_kernel().lengthscale
    x, y = draw(5, 1), draw(6, 2)
    expected = reference(x, y).to_dense().detach()
    torch.testing.assert_close(covariance(as_rows(x), as_rows(y)), expected)


def test_a_value_and_a_derivative_row_covary_as_the_derivative_of_the_kernel() -> None:
    x, y, v = draw(3, 3), draw(4, 4), draw(4, 5)
    found = covariance(as_rows(x), as_rows(y, v))
    for i in range(3):
        for j in range(4):
            point = y[j].clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(matern(x[i], point), point)
            assert float(found[i, j]) == pytest.approx(float(gradient @ v[j]), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(covariance(as_rows(y, v), as_rows(x)), found.T)


def test_two_derivative_rows_covary_as_the_mixed_second_derivative() -> None:
    x, y, v, w = draw(3, 6), draw(4, 7), draw(3, 8), draw(4, 9)
    found = covariance(as_rows(x, v), as_rows(y, w))
    for i in range(3):
        for j in range(4):
            one, other = x[i].clone().requires_grad_(True), y[j].clone().requires_grad_(True)
            (first,) = torch.autograd.grad(matern(one, other), one, create_graph=True)
            (mixed,) = torch.autograd.grad(first @ v[i], other)
            assert float(found[i, j]) == pytest.approx(float(mixed @ w[j]), rel=1e-8, abs=1e-10)


def test_the_covariance_of_all_kinds_of_rows_is_symmetric_and_positive() -> None:
    points = draw(6, 10)
    rows = torch.cat([as_rows(points), *(as_rows(points, draw(6, 11 + k)) for k in range(3))])
    matrix = covariance(rows, rows)
    torch.testing.assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-9
    diagonal = make_kernel().forward(rows, rows, diag=True)
    torch.testing.assert_close(diagonal, matrix.diagonal())


def test_the_short_way_for_value_rows_is_the_same() -> None:
    points, other = draw(5, 14), draw(4, 15)
    rows = torch.cat([as_rows(other), as_rows(other, draw(4, 16)), as_rows(points)])
    found = make_kernel().value_rows(points, rows)
    torch.testing.assert_close(found, covariance(as_rows(points), rows), rtol=1e-9, atol=1e-9)


def test_at_a_training_point_the_kernel_has_a_finite_derivative() -> None:
    points = draw(3, 17)
    leaf = points.clone().requires_grad_(True)
    value = make_kernel().value_rows(leaf, as_rows(points)).diagonal().sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
