from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicuco.errors import ModelError
from unicuco.importance.hessian import collect_hessians
from unicuco.importance.magnitude import magnitude_scores
from unicuco.importance.sparsegpt import (
    InverseFactor,
    n_of_m_dropped,
    prune_n_of_m,
    prune_with_update,
)
from unicuco.importance.wanda import wanda_scores
from unicuco.models import site_module
from unicuco.ranks import cut, rank_rows
from unicuco.testing.cases import EvaluationCase


def _inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix


def _weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _hessian(x: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ x


def slow_sparsegpt(weight: Tensor, hessian: Tensor, share: float, block: int) -> Tensor:
    """The released loop in ten lines: column by column, a threshold per block, exact inverses."""
    w, columns = weight.clone(), weight.shape[1]
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for column in range(columns):
        if column % block == 0:
            end = min(column + block, columns)
            scores = w[:, column:end] ** 2 / upper.diagonal()[column:end] ** 2
            limit = scores.flatten().sort().values[int(scores.numel() * share) - 1]
            mask = scores <= limit
        error = torch.where(mask[:, column % block], w[:, column], 0.0) / upper[column, column]
        w[:, column:] -= torch.outer(error, upper[column, column:])
    return w


def test_agrees_with_the_released_loop() -> None:
    weight, hessian = _weight(6, 24), _hessian(_inputs(50, 24))
    expected = slow_sparsegpt(weight, hessian, 0.5, block=8)
    found = prune_with_update(weight, InverseFactor.of(hessian), 72, block=8)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_update_is_the_least_squares_optimum_for_the_last_block() -> None:
    # One row, one block: what is dropped first is made up for by all columns to its right.
    x, weight = _inputs(60, 5), _weight(1, 5)
    factor = InverseFactor.of(_hessian(x), damping=1e-9)
    pruned = prune_with_update(weight, factor, 1)
    dropped = (pruned == 0)[0]
    if int(dropped.nonzero()[0, 0]) == 0:  # nothing to the left was frozen: the exact optimum
        kept = x[:, ~dropped]
        best = torch.linalg.lstsq(kept, x @ weight[0]).solution
        torch.testing.assert_close(pruned[0, ~dropped], best, rtol=1e-4, atol=1e-6)
    before = ((x @ (weight * ~dropped - weight).T) ** 2).sum()
    assert float(((x @ (pruned - weight).T) ** 2).sum()) <= float(before)


@given(st.integers(0, 7 * 30), st.integers(1, 40))
def test_any_count_is_met_exactly(num_dropped: int, block: int) -> None:
    factor = InverseFactor.of(_hessian(_inputs(64, 30)))
    pruned = prune_with_update(_weight(7, 30), factor, num_dropped, block=block)
    assert int((pruned == 0).sum()) == num_dropped


def test_nothing_dropped_is_the_identity() -> None:
    weight = _weight(4, 6)
    factor = InverseFactor.of(_hessian(_inputs(20, 6)))
    assert torch.equal(prune_with_update(weight, factor, 0), weight)
    assert torch.equal(prune_n_of_m(weight, factor, 3, 3), weight)


def test_with_white_inputs_it_is_magnitude_per_block_without_update() -> None:
    weight = _weight(9, 32)
    pruned = prune_with_update(weight, InverseFactor.of(torch.eye(32)), 144, block=16)
    for start in (0, 16):
        part = weight[:, start : start + 16]
        limit = part.abs().flatten().sort().values[72]
        expected = torch.where(part.abs() < limit, 0.0, part)
        torch.testing.assert_close(pruned[:, start : start + 16], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_its_output_error_is_below_wandas_and_that_below_magnitudes(
    seed: int, sparsity: float
) -> None:
    x = _inputs(200, 48, seed) * torch.logspace(-1, 1, 48, dtype=torch.float64)
    weight = _weight(32, 48, seed + 10)
    num_dropped = round(sparsity * weight.numel())

    def error(pruned: Tensor) -> float:
        return float(((x @ (pruned - weight).T) ** 2).sum())

    updated = prune_with_update(weight, InverseFactor.of(_hessian(x)), num_dropped)
    norms = x.norm(dim=0).float()
    wanda = cut(weight, rank_rows(wanda_scores(weight, norms)), num_dropped)
    magnitude = cut(weight, rank_rows(magnitude_scores(weight)), num_dropped)
    assert error(updated) < error(wanda) < error(magnitude)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (0, 2), (3, 4)])
def test_every_group_of_m_keeps_n_with_update_and_without(n: int, m: int) -> None:
    weight, factor = _weight(5, 16), InverseFactor.of(_hessian(_inputs(40, 16)))
    zeros = (prune_n_of_m(weight, factor, n, m) == 0).unflatten(1, (-1, m)).sum(2)
    assert bool((zeros == m - n).all())
    scores = wanda_scores(weight, torch.rand(16, generator=torch.Generator().manual_seed(0)))
    dropped = n_of_m_dropped(scores, n, m)
    assert bool((dropped.unflatten(1, (-1, m)).sum(2) == m - n).all())


def test_n_of_m_drops_the_lowest_scores_of_every_group() -> None:
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(2))
    dropped = n_of_m_dropped(scores, 2, 4)
    for row in range(6):
        for start in range(0, 12, 4):
            group = scores[row, start : start + 4].tolist()
            lowest = sorted(range(4), key=lambda k: group[k])[:2]
            assert sorted(dropped[row, start : start + 4].nonzero()[:, 0].tolist()) == sorted(
                lowest
            )


@pytest.mark.parametrize(("n", "m"), [(3, 2), (-1, 4), (2, 5)])
def test_groups_that_do_not_fit_are_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"keep {n} of every {m}"):
        n_of_m_dropped(torch.ones(2, 8), n, m)


def test_columns_without_input_go_first_and_only_as_far_as_asked() -> None:
    x = _inputs(30, 8)
    x[:, 3] = 0
    weight = _weight(4, 8)
    factor = InverseFactor.of(_hessian(x))
    assert factor.dead.nonzero()[:, 0].tolist() == [3]
    pruned = prune_with_update(weight, factor, 2)
    assert (pruned == 0).nonzero().tolist() == [[0, 3], [1, 3]]
    torch.testing.assert_close(pruned[2:, 3], weight[2:, 3])
    assert int((prune_with_update(weight, factor, 5) == 0)[:, 3].sum()) == 4


def test_bad_hessians_and_counts_are_refused() -> None:
    with pytest.raises(ModelError, match="NaN, infinite or too large"):
        InverseFactor.of(torch.full((3, 3), float("nan")))
    factor = InverseFactor.of(torch.eye(3))
    with pytest.raises(ValueError, match="num_dropped must be in"):
        prune_with_update(_weight(2, 3), factor, 7)


def test_half_precision_weights_come_back_in_their_type() -> None:
    weight = _weight(4, 6).to(torch.bfloat16)
    pruned = prune_with_update(weight, InverseFactor.of(torch.eye(6)), 9)
    assert pruned.dtype == torch.bfloat16
    assert int((pruned == 0).sum()) == 9


def test_hessians_are_those_of_the_inputs_that_the_sites_saw(case: EvaluationCase) -> None:
    site = case.loaded.profile.sites[6]
    seen: list[Tensor] = []
    handle = site_module(case.loaded.model, site).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].flatten(0, -2))
    )
    case.loaded.model(input_ids=case.calibration.ids, use_cache=False)
    handle.remove()
    (found,) = collect_hessians(case.loaded, [site], case.calibration).values()
    torch.testing.assert_close(found, _hessian(torch.cat(seen)), rtol=1e-4, atol=1e-5)
