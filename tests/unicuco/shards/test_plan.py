"""Splits of blocks: the slowest range is as fast as can be, and every range fits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicuco.errors import RequestError
from unicuco.shards.plan import ShardPlan, StageCosts, estimated_costs, plan_shards
from unicuco.shards.timing import measured_costs
from unicuco.testing.cases import EvaluationCase


def all_plans(num_blocks: int, num_shards: int) -> list[ShardPlan]:
    plans = []
    for cuts in itertools.combinations(range(1, num_blocks), num_shards - 1):
        ends = [0, *cuts, num_blocks]
        plans.append(ShardPlan(stages=tuple(map(range, ends[:-1], ends[1:]))))
    return plans


COSTS = st.lists(st.tuples(st.integers(1, 9).map(float), st.integers(1, 9)), min_size=1, max_size=7)


@given(COSTS, st.data())
def test_no_split_is_faster_or_needs_less_than_it_may(
    costs: list[tuple[float, int]], data: st.DataObject
) -> None:
    num_shards = data.draw(st.integers(1, len(costs)))
    cap = data.draw(st.integers(3, 40))
    stages = StageCosts(
        seconds=tuple(seconds for seconds, _ in costs),
        num_bytes=tuple(size for _, size in costs),
        first=(0.0, 3),
        last=(4.0, 3),
    )
    fitting = [
        max(stages.of(blocks)[0] for blocks in plan.stages)
        for plan in all_plans(len(costs), num_shards)
        if all(stages.of(blocks)[1] <= cap for blocks in plan.stages)
    ]
    if not fitting:
        with pytest.raises(RequestError, match="ask for more shards"):
            plan_shards(stages, num_shards, memory_bytes=cap)
        return
    plan = plan_shards(stages, num_shards, memory_bytes=cap)
    assert len(plan.stages) == num_shards
    assert max(stages.of(blocks)[0] for blocks in plan.stages) == min(fitting)
    assert all(stages.of(blocks)[1] <= cap for blocks in plan.stages)


def test_more_shards_than_blocks_are_refused(case: EvaluationCase) -> None:
    with pytest.raises(RequestError, match=r"--shards 3 is more than .* at most 2"):
        plan_shards(estimated_costs(case.loaded.profile), 3)


def test_an_estimate_counts_ranks_and_the_head(case: EvaluationCase) -> None:
    profile = case.loaded.profile
    costs = estimated_costs(profile)
    weights = sum(site.num_weights for site in profile.sites if site.block == 0)
    assert costs.seconds[0] == weights
    assert costs.num_bytes[0] == profile.block_bytes[0] + 2 * weights
    assert costs.last[0] == 260 * 16
    assert costs.first[1] == costs.last[1] == pytest.approx(4 * 260 * 16, rel=0.01)


def test_measured_times_are_those_of_blocks_and_head(case: EvaluationCase) -> None:
    costs = measured_costs(case.config, context=16)
    estimate = estimated_costs(case.loaded.profile)
    assert len(costs.seconds) == 2
    assert len(set(costs.seconds)) == 1, "blocks of one shape are timed once"
    assert min(*costs.seconds, costs.last[0]) > 0
    assert (costs.num_bytes, costs.first) == (estimate.num_bytes, estimate.first)


@pytest.mark.parametrize("stages", [(), (range(1, 2),), (range(1), range(2, 3)), (range(0),)])
def test_a_plan_covers_all_blocks_once(stages: tuple[range, ...]) -> None:
    with pytest.raises(ValueError, match=r"stages must|every stage"):
        ShardPlan(stages=stages)
