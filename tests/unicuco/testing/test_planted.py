from __future__ import annotations

import pytest
import torch

from unicuco.dimensions import Granularity
from unicuco.testing.planted import (
    NUM_BLOCKS,
    SENSITIVE_BLOCKS,
    planted_case,
    planted_judge,
    reversed_strategy,
    shuffled_strategy,
)


def test_pruning_a_sensitive_block_hurts_many_times_more_than_any_other() -> None:
    case = planted_case(Granularity.BLOCK)
    judge = case.evaluator()
    costs = []
    for block in range(NUM_BLOCKS):
        unit = torch.zeros(1, NUM_BLOCKS)
        unit[0, block] = 0.5
        costs.append(judge.evaluate(case.space.decode(unit)[0]).kl)
    others = [cost for block, cost in enumerate(costs) if block not in SENSITIVE_BLOCKS]
    assert min(costs[block] for block in SENSITIVE_BLOCKS) > 5 * max(others)


@pytest.mark.slow
def test_reversed_and_shuffled_strategies_stay_at_the_budget_to_the_weight() -> None:
    case = planted_case()
    space = case.space
    unit = torch.rand(1, space.num_axes, generator=torch.Generator().manual_seed(2))
    (strategy,) = space.decode_exact(unit, [space.kept_for_sparsity(0.5)])
    kept = space.cost.kept_params(strategy.values)
    backwards = reversed_strategy(space, strategy)
    assert space.cost.kept_params(backwards.values) == kept
    highest = max(range(space.num_axes), key=lambda a: strategy.values[a])
    assert backwards.values[highest] == min(backwards.values)
    shuffles = [shuffled_strategy(space, strategy, seed=seed) for seed in range(3)]
    assert all(space.cost.kept_params(other.values) == kept for other in shuffles)
    assert len({other.key for other in shuffles}) == 3
    assert planted_judge() is planted_judge()
