"""The contract of allocators: subclass `AllocatorContract`, and its tests run."""

# ruff: noqa: D102 - a test's name is its sentence of behaviour

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
import torch

from unicuco.allocate import AllocationContext, Allocator, AxisCurves
from unicuco.dimensions import Granularity, build_space
from unicuco.errors import AllocationError, InfeasibleRequestError
from unicuco.testing.cases import make_evaluation_case
from unicuco.testing.planted import (
    planted_case,
    planted_judge,
    reversed_strategy,
    shuffled_strategy,
)
from unicuco.testing.profiles import make_profile
from unicuco.testing.tiny import tiny_model_folder

PLANTED_SPARSITIES: Final = (0.5, 0.7)
SPARSITIES: Final = (0.0, 0.05, 0.3, 0.5, 0.501, 0.6, 0.8, 0.9)
_PROFILE: Final = make_profile([[(40, 60), (80, 30)], [(50, 50), (20, 90)], [(60, 60)]])


@cache
def make_context(granularity: Granularity) -> AllocationContext:
    """Return a context of a small space with rising, mostly convex curves, seeded."""
    space = build_space(_PROFILE, granularity=granularity)
    generator = torch.Generator().manual_seed(9)
    steps = torch.rand(space.num_axes, 256, generator=generator, dtype=torch.float64)
    rising = steps * torch.linspace(0.01, 1, 256, dtype=torch.float64) ** 2
    scale = 1e-3 * torch.exp(torch.randn(space.num_axes, 1, generator=generator))
    table = torch.nn.functional.pad((scale * rising).cumsum(1), (1, 0))
    return AllocationContext(space=space, curves=AxisCurves(table))


@cache
def make_evidence_context(granularity: Granularity) -> AllocationContext:
    """Return a context with evidence: a random Llama of 4 blocks and its calibration text."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model_folder(Path(folder), "llama", num_blocks=4, tied=True)
        return make_evaluation_case(Path(folder), granularity=granularity).context


class AllocatorContract:
    """What every allocator satisfies; subclasses say how one is made.

    ``needs_evidence``: it looks at the model, and refuses a context without evidence.
    ``sees_sensitivity``: it claims to know which parts of a model matter, and is held to it on the
    planted model.
    """

    name: ClassVar[str]
    needs_evidence: ClassVar[bool] = False
    sees_sensitivity: ClassVar[bool] = False

    def make(self, context: AllocationContext) -> Allocator:
        """Return a fresh allocator."""
        raise NotImplementedError(f"{type(self).__name__} must make its allocator")

    @pytest.fixture(params=list(Granularity), ids=str)
    def context(self, request: Any) -> AllocationContext:
        make = make_evidence_context if self.needs_evidence else make_context
        return make(Granularity(request.param))

    def test_refuses_a_context_without_the_evidence_it_needs(
        self, context: AllocationContext
    ) -> None:
        if self.needs_evidence:
            with pytest.raises(AllocationError, match=f"{self.name} looks at the model"):
                self.make(replace(context, evidence=None))
        else:
            assert self.make(replace(context, evidence=None)).name == self.name

    def test_has_its_name(self, context: AllocationContext) -> None:
        assert self.make(context).name == self.name

    def test_meets_every_budget_to_the_weight(self, context: AllocationContext) -> None:
        space = context.space
        strategies = self.make(context).allocate(SPARSITIES)
        kept = [space.cost.kept_params(strategy.values) for strategy in strategies]
        assert kept == [space.kept_for_sparsity(sparsity) for sparsity in SPARSITIES]

    def test_is_deterministic(self, context: AllocationContext) -> None:
        allocator = self.make(context)
        first = allocator.allocate(SPARSITIES)
        assert allocator.allocate(SPARSITIES) == first
        assert self.make(context).allocate(SPARSITIES) == first

    def test_answers_of_a_batch_are_those_of_single_requests(
        self, context: AllocationContext
    ) -> None:
        allocator = self.make(context)
        alone = [allocator.allocate([sparsity])[0] for sparsity in SPARSITIES]
        assert allocator.allocate(SPARSITIES) == alone
        assert allocator.allocate([]) == []

    def test_more_size_pressure_never_keeps_more(self, context: AllocationContext) -> None:
        targets = [0.9 * k / 60 for k in range(61)]
        strategies = self.make(context).allocate(targets)
        kept = [context.space.cost.kept_params(strategy.values) for strategy in strategies]
        assert kept == sorted(kept, reverse=True)

    def test_every_value_lies_on_its_grid(self, context: AllocationContext) -> None:
        space = context.space
        for strategy in self.make(context).allocate(SPARSITIES):
            assert space.decode(space.encode([strategy])) == [strategy]

    def test_a_sparsity_beyond_the_range_is_refused(self, context: AllocationContext) -> None:
        with pytest.raises(InfeasibleRequestError):
            self.make(context).allocate([0.5, 0.995])

    def test_beats_uniform_and_its_own_reversal_and_shuffles_where_sensitivity_is_planted(
        self,
    ) -> None:
        if not self.sees_sensitivity:
            return
        case = planted_case()
        space, judge = case.space, planted_judge()
        for strategy in self.make(case.context).allocate(PLANTED_SPARSITIES):
            dropped = space.cost.total_params - space.cost.kept_params(strategy.values)
            others = [
                space.uniform(dropped / space.cost.num_site_weights),
                reversed_strategy(space, strategy),
                *(shuffled_strategy(space, strategy, seed=seed) for seed in range(3)),
            ]
            own = judge.evaluate(strategy).kl
            assert own < min(judge.evaluate(other).kl for other in others)
