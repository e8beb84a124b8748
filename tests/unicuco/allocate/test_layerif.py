from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicuco.allocate import Evidence, LayerIF, TextPart
from unicuco.allocate.blocks import block_weights, scaled, weighted_mean
from unicuco.allocate.experts import expert_counts
from unicuco.allocate.gradients import block_products
from unicuco.allocate.layerif import InfluenceScores, LayerIFOptions, measure_influence, smoothed
from unicuco.dimensions import Granularity
from unicuco.errors import AllocationError, RunError, StorageError, TextError
from unicuco.models import site_module
from unicuco.testing.allocator import make_evidence_context
from unicuco.testing.cases import RandomTexts, random_tokens

_FEW = LayerIFOptions(train_items=8, validation_items=4, item_tokens=12)


@pytest.fixture
def evidence() -> Evidence:
    return make_evidence_context(Granularity.LAYER).require_evidence("test")


def _slow_gradient(evidence: Evidence, block: int, item: Tensor) -> Tensor:
    """The gradient of one item's mean next-token loss to all sites of a block, by autograd."""
    model = evidence.loaded.model
    sites = [site for site in evidence.profile.sites if site.block == block]
    weights = [site_module(model, site).weight for site in sites]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        loss = model(input_ids=item[None], labels=item[None], use_cache=False).loss
        parts = torch.autograd.grad(loss, weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return torch.cat([part.flatten() for part in parts]).double()


@pytest.mark.parametrize("memory_bytes", [1 << 30, 200_000])
def test_products_are_those_of_each_items_own_gradient_however_many_passes(
    evidence: Evidence, memory_bytes: int
) -> None:
    train = random_tokens(seed=3, num_windows=18, context=6)
    validation = random_tokens(seed=4, num_windows=2, context=6)
    products = block_products(evidence.loaded, train, validation, memory_bytes=memory_bytes)
    for block, (gram, cross) in enumerate(products):
        own = torch.stack([_slow_gradient(evidence, block, item) for item in train.ids])
        other = torch.stack([_slow_gradient(evidence, block, item) for item in validation.ids])
        torch.testing.assert_close(gram, own @ own.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(cross, own @ other.sum(0), rtol=1e-3, atol=1e-5)


def test_gradients_that_would_not_fit_are_refused_beforehand(evidence: Evidence) -> None:
    with pytest.raises(AllocationError, match="gradients of one block on 12 items of 12 tokens"):
        measure_influence(evidence, replace(_FEW, memory_bytes=1000))


def test_nan_influence_is_one_clear_error(evidence: Evidence) -> None:
    weight = site_module(evidence.loaded.model, evidence.profile.sites[8]).weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(AllocationError, match="influence of block 0 is NaN or infinite"):
            measure_influence(evidence, _FEW)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_text_too_short_for_the_samples_is_one_clear_error(evidence: Evidence) -> None:
    class Short(RandomTexts):
        def windows(self, part: TextPart, *, tokens: int, context: int) -> object:  # type: ignore[override]
            raise TextError(f"the text has 10 tokens and {tokens} are needed")

    with pytest.raises(TextError, match="96 are needed"):
        measure_influence(replace(evidence, texts=Short()), _FEW)


def test_scores_carry_their_data_and_seed_and_answer_the_same_after_the_disk(
    tmp_path: Path,
) -> None:
    context = make_evidence_context(Granularity.LAYER)
    first = LayerIF(context, _FEW)
    path = tmp_path / "scores.json"
    first.scores.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = InfluenceScores.load(path)
    assert loaded == first.scores
    assert loaded.seed == 0
    assert len(loaded.data_digest) == 128
    assert LayerIF(context, scores=loaded).allocate([0.5]) == first.allocate([0.5])
    with pytest.raises(AllocationError, match="another model"):
        LayerIF(context, scores=replace(loaded, model_digest="0" * 64))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RunError, match="influence scores"):
        InfluenceScores.load(path)
    with pytest.raises(StorageError, match="can't be written"):
        loaded.save(tmp_path / "absent" / "scores.json")


def test_epsilon_follows_the_metric_that_prunes() -> None:
    context = make_evidence_context(Granularity.BLOCK)
    scores = measure_influence(context.require_evidence("test"), _FEW)

    def spread(metric: str) -> float:
        evidence = context.require_evidence("test")
        ranks = replace(evidence.ranks, metric=metric)
        own = replace(context, evidence=replace(evidence, ranks=ranks))
        (strategy,) = LayerIF(own, scores=scores).allocate([0.5])
        return max(strategy.values) / min(strategy.values)

    assert spread("wanda") == pytest.approx(1.1 / 0.9, abs=0.01)
    assert spread("magnitude") == pytest.approx(1.3 / 0.7, abs=0.02)


def test_scores_are_smoothed_over_seven_blocks_by_a_cubic() -> None:
    cubic = torch.linspace(-1, 1, 12, dtype=torch.float64) ** 3
    torch.testing.assert_close(smoothed(cubic + 2), (cubic + 1) / 2)  # a cubic passes unchanged
    spike = torch.zeros(12, dtype=torch.float64)
    spike[6] = -5.0  # the size counts, not the sign
    assert float(smoothed(spike)[5]) > 0.3
    for blocks in range(1, 9):
        assert bool(torch.isfinite(smoothed(torch.arange(blocks, dtype=torch.float64))).all())


def test_factors_meet_the_sum_over_blocks_of_unequal_sizes(evidence: Evidence) -> None:
    weights = block_weights(evidence.profile) * torch.tensor([1.0, 2.0, 5.0, 3.0])
    blocks = scaled(torch.tensor([0.0, 1.0, 0.2, 0.7]).double(), weights, [0.6], 0.1)
    assert float(weighted_mean(blocks, weights)) == pytest.approx(0.6, rel=1e-12)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.integers(0, 60), st.floats(0, 5))
def test_every_expert_is_dealt_and_every_block_has_one(
    scores: list[float], spare: int, beta: float
) -> None:
    counts = expert_counts(scores, len(scores) + spare, beta=beta)
    assert sum(counts) == len(scores) + spare
    assert min(counts) >= 1


def test_well_trained_blocks_get_more_experts() -> None:
    assert expert_counts([0.0, 5.0, 10.0], 12) == (9, 2, 1)
    assert expert_counts([3.0, 3.0, 3.0], 8) == (3, 3, 2)
    with pytest.raises(ValueError, match="2 experts can't give each of 3 blocks one"):
        expert_counts([1.0, 2.0, 3.0], 2)
