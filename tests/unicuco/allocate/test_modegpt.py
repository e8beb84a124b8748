from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize

from unicuco.allocate.depth import DepthEvidence
from unicuco.allocate.modegpt import EPSILON, MoDeGpt, block_shares
from unicuco.dimensions import Granularity, build_space
from unicuco.models import load_model
from unicuco.testing.cases import random_tokens
from unicuco.testing.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> DepthEvidence:
    folder = tmp_path_factory.mktemp("modegpt") / "llama"
    loaded = load_model(tiny_model_folder(folder, num_blocks=4, hidden_size=32))
    return DepthEvidence(
        loaded=loaded,
        space=build_space(loaded.profile, ("width", "low_rank"), Granularity.LAYER),
        granularity=Granularity.LAYER,
        calibration=random_tokens(seed=5),
    )


def test_shares_are_the_best_of_influence_and_entropy() -> None:
    influence = torch.tensor([0.4, 0.1, 0.02, 0.2], dtype=torch.float64)
    average = 0.2

    def objective(shares: list[float]) -> float:
        p = torch.tensor(shares, dtype=torch.float64) / (4 * average)
        return float((influence * p).sum() + EPSILON * (p * p.log()).sum())

    best = minimize(
        objective,
        [average] * 4,
        bounds=[(1e-6, 1.0)] * 4,
        constraints={"type": "eq", "fun": lambda x: sum(x) - 4 * average},
        tol=1e-12,
    ).x
    found = block_shares(influence, [average, 0.9], EPSILON)
    assert found[0].tolist() == pytest.approx(list(best), abs=1e-3)
    assert float(found[1].max()) == 0.8
    assert block_shares(influence, [0.3], math.inf).tolist() == [[pytest.approx(0.3)] * 4]


def test_budgets_are_met_without_removing_a_head(evidence: DepthEvidence) -> None:
    allocator, space = MoDeGpt(evidence), evidence.space
    sparsities = [0.0, 0.1, 0.3, 0.5]
    lost = []
    for sparsity, strategy in zip(sparsities, allocator.allocate(sparsities), strict=True):
        kept = space.cost.kept_params(strategy.values)
        assert kept <= space.kept_for_sparsity(sparsity)
        lost.append(1 - kept / space.cost.total_params)
        heads = [v for n, v in strategy.settings if n.startswith("width/") and "attn" in n]
        assert heads == [0.0] * 4
    assert lost == sorted(lost)
    assert lost[0] == 0


def test_blocks_of_little_influence_lose_more(evidence: DepthEvidence) -> None:
    allocator = MoDeGpt(evidence, epsilon=0.02)
    (strategy,) = allocator.allocate([0.3])
    lost = [sum(v for n, v in strategy.settings if f".{block}." in n) for block in range(4)]
    order = sorted(range(4), key=lambda block: float(allocator.influence[block]))
    assert lost[order[0]] > lost[order[-1]]
