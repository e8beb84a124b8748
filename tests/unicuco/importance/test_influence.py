from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unicuco.importance.influence import (
    datainf,
    default_damping,
    gradient_products,
    positive_influence,
)
from unicuco.testing.convex import RIDGE, convex_toy


def _gradients(items: int, parameters: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(items, parameters, generator=generator, dtype=torch.float64)


def _exact(gradients: Tensor, validation: Tensor, damping: float) -> Tensor:
    n, d = gradients.shape
    hessian = gradients.T @ gradients / n + damping * torch.eye(d, dtype=torch.float64)
    return -gradients @ torch.linalg.solve(hessian, validation)


def test_datainf_is_the_mean_of_the_items_own_inverses() -> None:
    gradients, validation, damping = _gradients(6, 4, 0), _gradients(1, 4, 1)[0], 0.3
    eye = damping * torch.eye(4, dtype=torch.float64)
    inverse = torch.stack([torch.linalg.inv(torch.outer(g, g) + eye) for g in gradients]).mean(0)
    expected = -gradients @ inverse @ validation
    found = datainf(gradients @ gradients.T, gradients @ validation, damping)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_datainf_agrees_with_the_exact_inverse_on_a_small_block(seed: int) -> None:
    gradients, validation = _gradients(40, 12, seed), _gradients(1, 12, 50 + seed)[0]
    gram, cross = gradients @ gradients.T, gradients @ validation
    damping = default_damping(gram, 12)
    approximate, exact = datainf(gram, cross, damping), _exact(gradients, validation, damping)
    assert float(torch.corrcoef(torch.stack([approximate, exact]))[0, 1]) > 0.85
    strong = 100 * float(gram.diagonal().mean())  # the swap is exact in this limit
    torch.testing.assert_close(
        datainf(gram, cross, strong), _exact(gradients, validation, strong), rtol=0.02, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_influence_predicts_retraining_without_an_item_on_a_convex_problem(seed: int) -> None:
    toy = convex_toy(seed)
    influence = datainf(toy.gradients @ toy.gradients.T, toy.gradients @ toy.validation, RIDGE)
    # Leaving an item out is lowering its weight: what harms is missed with gain.
    assert float(torch.corrcoef(torch.stack([-influence, toy.changes]))[0, 1]) > 0.9


def test_only_what_harms_counts() -> None:
    influence = torch.tensor([1.5, -3.0, 0.5], dtype=torch.float64)
    assert float(positive_influence(influence)) == 2.0


def test_products_are_those_of_the_items_own_weight_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(5, 7, 3, generator=generator)
    gradients = torch.randn(5, 7, 4, generator=generator)
    own = torch.stack([g.T @ x for g, x in zip(gradients, inputs, strict=True)]).flatten(1).double()
    gram, cross = gradient_products(inputs, gradients, 3)
    torch.testing.assert_close(gram, own[:3] @ own[:3].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross, own[:3] @ own[3:].sum(0), rtol=1e-5, atol=1e-5)
