"""OWL and AlphaPruning against slow references and spectra of known tails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unicuco.allocate import OWL, AlphaPruning, Evidence
from unicuco.allocate.alphapruning import block_exponents, tail_exponent
from unicuco.allocate.blocks import block_weights, min_max, recentred, scaled, weighted_mean
from unicuco.allocate.owl import outlier_shares
from unicuco.dimensions import Granularity
from unicuco.testing.allocator import make_evidence_context
from unicuco.testing.planted import SENSITIVE_BLOCKS, planted_case


def _evidence() -> Evidence:
    return planted_case().context.require_evidence("test")


# --- OWL ----------------------------------------------------------------------------------------


def test_outlier_shares_are_those_of_the_pooled_scores_of_a_block() -> None:
    evidence = _evidence()
    for block, share in enumerate(outlier_shares(evidence, 5.0).tolist()):
        pooled = [
            value
            for site in evidence.profile.sites
            if site.block == block
            for value in (evidence.weight(site).abs() * evidence.input_norms[site.path])
            .flatten()
            .tolist()
        ]
        mean = sum(pooled) / len(pooled)
        assert share == pytest.approx(sum(v > 5 * mean for v in pooled) / len(pooled), abs=1e-4)


def test_owl_keeps_more_where_outliers_are_and_spreads_over_two_lambda() -> None:
    context = planted_case(Granularity.BLOCK).context
    owl = OWL(context)
    (strategy,) = owl.allocate([0.6])
    kept = 1 - torch.tensor(strategy.values)
    assert torch.equal(kept.argsort(), owl.outliers.argsort())
    # Six blocks of equal size: the mapping is exact to the weight, projection changes nothing.
    assert float(kept.max() - kept.min()) == pytest.approx(0.16, abs=1e-3)
    assert float(kept.mean()) == pytest.approx(0.4, abs=1e-4)


def test_owl_for_groups_keeps_n_of_m_on_average_and_more_where_outliers_are() -> None:
    owl = OWL(planted_case().context, width=1.5 / 8)
    kept = owl.n_of_m(4, 8)
    assert sum(kept) == 4 * len(kept)
    assert kept[0] == max(kept) > 4  # the sensitive block
    assert OWL(planted_case().context, width=0.0).n_of_m(2, 4) == (2,) * len(kept)
    with pytest.raises(ValueError, match="n must be in"):
        owl.n_of_m(4, 4)


def test_equal_outliers_give_uniform() -> None:
    assert min_max(torch.full((4,), 0.3, dtype=torch.float64)).tolist() == [0.5] * 4
    weights = torch.ones(4, dtype=torch.float64)
    assert torch.allclose(
        recentred(torch.full((4,), 0.5).double(), weights, [0.3, 0.6], 0.16),
        torch.tensor([[0.3], [0.6]], dtype=torch.float64).expand(2, 4),
    )


def test_mappings_keep_the_mean_by_weight_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randint(10, 90, (7,), generator=generator).double()
    importance = torch.rand(7, generator=generator, dtype=torch.float64)
    wanted = torch.tensor([[0.3], [0.65]], dtype=torch.float64)
    for blocks in (
        recentred(importance, weights, [0.3, 0.65], 0.16),
        scaled(importance, weights, [0.3, 0.65], 0.3),
    ):
        torch.testing.assert_close(weighted_mean(blocks, weights), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [OWL, AlphaPruning])
def test_all_sites_of_a_block_get_their_blocks_ratio(
    kind: type[OWL] | type[AlphaPruning],
) -> None:
    layer = make_evidence_context(Granularity.LAYER)
    block = make_evidence_context(Granularity.BLOCK)
    (by_site,) = kind(layer).allocate([0.5])
    (by_block,) = kind(block).allocate([0.5])
    profile = layer.require_evidence("test").profile
    for site, value in zip(profile.sites, by_site.values, strict=True):
        assert value == pytest.approx(by_block.values[site.block], abs=2 / site.num_weights)


# --- AlphaPruning -------------------------------------------------------------------------------


def _pareto(exponent: float, count: int, seed: int) -> Tensor:
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - uniform) ** (-1 / (exponent - 1))


@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    found = [tail_exponent(_pareto(exponent, 4000, seed)) for seed in range(3)]
    assert sum(found) / 3 == pytest.approx(exponent, rel=0.1)


def test_exponents_do_not_depend_on_scale_and_are_always_finite() -> None:
    values = _pareto(2.5, 300, 0)
    assert tail_exponent(values * 1e-6) == pytest.approx(tail_exponent(values), rel=1e-6)
    for odd in (torch.ones(8), torch.zeros(8), torch.tensor([2.0]), torch.tensor([0.0, 1.0, 1.0])):
        assert 1 < tail_exponent(odd.double()) <= 100


def test_the_exponent_is_hills_at_the_best_of_the_candidates_near_the_peak() -> None:
    values = _pareto(2.2, 60, 5).sort().values
    hill = [
        1 + len(tail) / float((tail / tail[0]).log().sum())
        for tail in (values[k:] for k in range(59))
    ]
    found = tail_exponent(values)
    assert min(abs(found - other) for other in hill) < 1e-9


def test_alphapruning_prunes_light_tails_more_and_spreads_over_one_plus_minus_epsilon() -> None:
    context = planted_case(Granularity.BLOCK).context
    allocator = AlphaPruning(context)
    (strategy,) = allocator.allocate([0.5])
    values = torch.tensor(strategy.values)
    assert float(values.max() / values.min()) == pytest.approx(1.3 / 0.7, abs=0.01)
    sensitive = list(SENSITIVE_BLOCKS)
    assert float(values[sensitive].max()) < 0.5 < float(values.max())


def test_block_exponents_are_the_means_of_their_sites() -> None:
    evidence = _evidence()
    expected = torch.zeros(evidence.profile.num_blocks, dtype=torch.float64)
    for site in evidence.profile.sites:
        weight = evidence.weight(site).double()
        gram = weight.T @ weight if site.num_rows >= site.num_columns else weight @ weight.T
        expected[site.block] += tail_exponent(torch.linalg.eigvalsh(gram).clamp(min=0))
    sites_per_block = len(evidence.profile.sites) / evidence.profile.num_blocks
    sensitive = list(SENSITIVE_BLOCKS)
    torch.testing.assert_close(
        block_exponents(evidence)[sensitive],
        expected[sensitive] / sites_per_block,
        rtol=1e-6,
        atol=1e-6,
    )
    assert block_weights(evidence.profile).sum() == evidence.profile.num_site_weights
