from __future__ import annotations

import pytest
import torch

from unicuco.allocate.besa import Besa, BesaOptions, candidate_logits, straight_through_mask
from unicuco.ranks import keep_mask, rank_rows
from unicuco.testing.planted import planted_case

CANDIDATES = torch.arange(101) / 100


def ranks(rows: int = 6, columns: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return rank_rows(torch.rand(rows, columns, generator=generator))


@pytest.mark.parametrize("mean", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_logits_begin_at_the_flattest_distribution_of_the_wanted_mean(mean: float) -> None:
    p = candidate_logits(mean).softmax(0)
    assert float((p * CANDIDATES).sum()) == pytest.approx(mean, abs=1e-4)
    if mean == 0.5:  # the published start
        torch.testing.assert_close(p, torch.full((101,), 1 / 101), atol=1e-5, rtol=0)


def test_the_mask_is_hard_and_cut_at_the_mean_sparsity() -> None:
    rank = ranks()
    mask, sparsity = straight_through_mask(candidate_logits(0.37), rank)
    assert torch.equal(mask.round(), keep_mask(rank, round(float(sparsity) * 240)).float())
    torch.testing.assert_close(mask, mask.round(), atol=1e-6, rtol=0)
    assert float(mask.mean()) == pytest.approx(1 - 0.37, abs=1 / 240 + 1e-4)


def test_the_gradient_of_the_mask_is_that_of_the_probability_to_be_kept() -> None:
    rank = ranks()
    value = torch.rand(rank.shape, generator=torch.Generator().manual_seed(1))
    logits = candidate_logits(0.6).requires_grad_(True)
    mask, _ = straight_through_mask(logits, rank)
    (found,) = torch.autograd.grad((mask * value).sum(), logits)

    slow = logits.detach().double().requires_grad_(True)
    p = slow.softmax(0)
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(rank.shape[0]):
        for column in range(rank.shape[1]):
            r = int(rank[row, column])
            kept = sum(p[c] for c in range(101) if c * rank.shape[1] <= 100 * r)
            expected = expected + kept * float(value[row, column])
    (wanted,) = torch.autograd.grad(expected, slow)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_learned_sparsities_differ_within_blocks_and_stay_near_the_target() -> None:
    case = planted_case()
    besa = Besa(case.context, BesaOptions(steps=32))
    found = besa.site_sparsities(0.6)
    profile = case.loaded.profile
    sizes = torch.tensor([float(site.num_weights) for site in profile.sites])
    spreads = []
    for block in range(profile.num_blocks):
        own = torch.tensor([site.block == block for site in profile.sites])
        mean = float((found[own] * sizes[own]).sum() / sizes[own].sum())
        assert mean == pytest.approx(0.6, abs=0.2)
        spreads.append(float(found[own].max() - found[own].min()))
    assert max(spreads) > 0.1


@pytest.mark.slow
def test_the_penalty_holds_blocks_near_the_target() -> None:
    case = planted_case()
    sizes = torch.tensor([float(site.num_weights) for site in case.loaded.profile.sites])
    deviations = []
    for beta in (0.0, 5.0):
        found = Besa(case.context, BesaOptions(steps=64, beta=beta)).site_sparsities(0.6)
        deviations.append(abs(float((found * sizes).sum() / sizes.sum()) - 0.6))
    assert deviations[1] < 0.1 < deviations[0]  # without it, the error alone keeps all
