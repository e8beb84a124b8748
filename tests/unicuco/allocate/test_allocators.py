from __future__ import annotations

import itertools
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicuco.allocate import (
    ALLOCATORS,
    DSA,
    OWL,
    AllocationContext,
    Allocator,
    AlphaPruning,
    AxisCurves,
    Evidence,
    Fisher,
    LayerIF,
    TextPart,
    Trim,
    Uniform,
)
from unicuco.allocate.layerif import InfluenceScores, LayerIFOptions, measure_influence
from unicuco.dimensions import Granularity, build_space
from unicuco.errors import TextError
from unicuco.pipeline import LearnOptions
from unicuco.pipeline.preparation import allocation_context, prepare
from unicuco.ranks import rank_rows
from unicuco.stratnet import NetKind, StratNet, StratNetAllocator
from unicuco.testing.allocator import AllocatorContract, make_context, make_evidence_context
from unicuco.testing.cases import EvaluationCase
from unicuco.testing.profiles import make_profile


class TestUniform(AllocatorContract):
    name = "uniform"

    def make(self, context: AllocationContext) -> Allocator:
        return Uniform(context)


class TestFisher(AllocatorContract):
    name = "fisher"
    sees_sensitivity = True

    def make(self, context: AllocationContext) -> Allocator:
        return Fisher(context)


class TestOWL(AllocatorContract):
    name = "owl"
    needs_evidence = True
    sees_sensitivity = True

    def make(self, context: AllocationContext) -> Allocator:
        return OWL(context)


class TestAlphaPruning(AllocatorContract):
    name = "alphapruning"
    needs_evidence = True
    sees_sensitivity = True

    def make(self, context: AllocationContext) -> Allocator:
        return AlphaPruning(context)


class TestDSA(AllocatorContract):
    name = "dsa"
    needs_evidence = True
    sees_sensitivity = True

    def make(self, context: AllocationContext) -> Allocator:
        return DSA(context)


class TestLayerIF(AllocatorContract):
    name = "layerif"
    needs_evidence = True
    sees_sensitivity = True
    options = LayerIFOptions(train_items=150, validation_items=48, item_tokens=50)

    def make(self, context: AllocationContext) -> Allocator:
        return LayerIF(context, self.options, scores=self.measured(context))

    def measured(self, context: AllocationContext) -> InfluenceScores | None:
        """Measure every model once for all tests; contexts without a model are left alone."""
        evidence = context.evidence
        if evidence is None:
            return None
        return _influence(evidence)


class TestTrim(AllocatorContract):
    name = "trim"
    needs_evidence = True
    sees_sensitivity = True

    def make(self, context: AllocationContext) -> Allocator:
        return Trim(context)


@cache
def _influence(evidence: Evidence) -> InfluenceScores:
    return measure_influence(evidence, TestLayerIF.options)


class TestStratNet(AllocatorContract):
    name = "stratnet"
    kind = NetKind.SIZE

    def make(self, context: AllocationContext) -> Allocator:
        return StratNetAllocator(StratNet(self.kind, context.space.num_axes, seed=3), context.space)


class TestStratNetOfPreferences(TestStratNet):
    kind = NetKind.PREFERENCE


def test_every_registered_allocator_has_a_contract_test() -> None:
    for path in Path(__file__).parent.glob("test_*.py"):  # also when only this file is run
        import_module(f"tests.unicuco.allocate.{path.stem}")
    contracts = {getattr(kind, "name", None) for kind in AllocatorContract.__subclasses__()}
    assert set(ALLOCATORS) <= contracts
    context = make_evidence_context(Granularity.LAYER)
    assert all(make(context).name == name for name, make in ALLOCATORS.items())


def test_uniform_is_equal_everywhere_to_a_weight() -> None:
    context = make_context(Granularity.LAYER)
    for sparsity, strategy in zip((0.3, 0.7), Uniform(context).allocate((0.3, 0.7)), strict=True):
        for axis, value in zip(context.space.axes, strategy.values, strict=True):
            assert abs(value - sparsity) <= 1 / axis.num_steps + 1e-12


def _context(table: Tensor, sizes: list[int]) -> AllocationContext:
    space = build_space(make_profile([[(size, 1)] for size in sizes]))
    return AllocationContext(space=space, curves=AxisCurves(table))


def _convex_table(d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(d, 256, generator=generator, dtype=torch.float64).sort(1).values
    scale = torch.exp(torch.randn(d, 1, generator=generator))
    return torch.nn.functional.pad((scale * slopes).cumsum(1), (1, 0))


def _cost(context: AllocationContext, units: Tensor) -> Tensor:
    return context.curves.values(units).sum(1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.75])
def test_fisher_is_the_optimum_of_convex_curves(seed: int, sparsity: float) -> None:
    sizes = [50, 30, 20]
    context = _context(_convex_table(3, seed), sizes)
    space = context.space
    found = Fisher(context).allocate([sparsity])
    wanted = space.cost.total_params - space.kept_for_sparsity(sparsity)
    ranges = [range(axis.max_step + 1) for axis in space.axes[:2]]
    steps = []
    for first, second in itertools.product(*ranges):  # the budget decides the third
        third = wanted - first - second
        if 0 <= third <= space.axes[2].max_step:
            steps.append((first, second, third))
    counts = torch.tensor([axis.num_steps for axis in space.axes], dtype=torch.float64)
    units = torch.tensor(steps, dtype=torch.float64) / counts / space.span
    best = float(_cost(context, units).min())
    # Knots and whole weights are two grids: to within one weight of the steepest slope.
    slack = float((context.curves.table.diff(dim=1).max(1).values * 256 / counts).max())
    assert float(_cost(context, space.encode(found))[0]) <= best + slack


def test_fisher_takes_a_curve_that_is_not_convex_by_its_hull() -> None:
    knots = torch.linspace(0, 1, 257, dtype=torch.float64)
    humped = torch.where(knots < 0.5, 2 * knots, torch.ones_like(knots))  # up early, then free
    straight = 1.2 * knots
    context = _context(torch.stack([humped, straight]), [100, 100])
    (strategy,) = Fisher(context).allocate([0.45])
    assert strategy.values[0] > 0.85  # the hull's slope, 1.0, is below 1.2
    assert strategy.values[1] < 0.05


def test_an_axis_of_larger_sites_takes_its_cost_per_weight() -> None:
    knots = torch.linspace(0, 1, 257, dtype=torch.float64).square()
    context = _context(torch.stack([knots, knots]), [100, 400])
    (strategy,) = Fisher(context).allocate([0.5])
    small, large = strategy.values
    # Equal marginal cost per weight: u1 / 100 = u2 / 400.
    assert large / small == pytest.approx(4.0, rel=0.1)


# --- curves -------------------------------------------------------------------------------------


def test_curves_of_sites_are_cumulated_fisher_sums(case: EvaluationCase) -> None:
    space = case.space
    unit = torch.tensor([[0.0] * space.num_axes, [0.5] * space.num_axes, [1.0] * space.num_axes])
    values = case.curves.values(unit.double())
    assert bool((values[0] == 0).all())
    assert bool((case.curves.table.diff(dim=1) >= 0).all())
    for index, (site, axis) in enumerate(zip(case.loaded.profile.sites, space.axes, strict=True)):
        sums = case.fisher[site.path]
        for row, share in ((1, 0.5 * axis.high), (2, axis.high)):
            position = share * len(sums)
            whole = int(position)
            expected = float(
                sums[:whole].sum() + (position - whole) * sums[min(whole, len(sums) - 1)]
            )
            assert float(values[row, index]) == pytest.approx(expected, rel=0.02)


def test_curves_of_blocks_are_the_sums_of_their_sites(case: EvaluationCase) -> None:
    profile = case.loaded.profile
    space = build_space(profile, granularity=Granularity.BLOCK)
    blocks = AxisCurves.from_fisher(space, profile, Granularity.BLOCK, case.fisher)
    for block in range(profile.num_blocks):
        rows = [k for k, site in enumerate(profile.sites) if site.block == block]
        torch.testing.assert_close(blocks.table[block], case.curves.table[rows].sum(0))


def test_an_axis_of_which_nothing_is_known_gets_a_parabola(case: EvaluationCase) -> None:
    space = build_space(case.loaded.profile, ("sparsity", "depth"))
    curves = AxisCurves.from_fisher(space, case.loaded.profile, Granularity.LAYER, case.fisher)
    torch.testing.assert_close(curves.table[: case.space.num_axes], case.curves.table)
    knots = torch.linspace(0, 1, curves.table.shape[1], dtype=torch.float64)
    for row in curves.table[case.space.num_axes :]:
        torch.testing.assert_close(row / row[-1], knots.square())


def test_slopes_are_the_derivatives_of_values() -> None:
    curves = make_context(Granularity.LAYER).curves
    generator = torch.Generator().manual_seed(1)
    unit = torch.rand(4, len(curves.table), generator=generator, dtype=torch.float64)
    unit.requires_grad_(True)
    (gradient,) = torch.autograd.grad(curves.values(unit).sum(), unit)
    torch.testing.assert_close(curves.slopes(unit.detach()), gradient)
    outside = torch.tensor([[-0.5] * len(curves.table), [1.5] * len(curves.table)]).double()
    assert torch.equal(curves.values(outside), curves.values(outside.clamp(0, 1)))


@pytest.mark.parametrize("table", [torch.zeros(4), torch.tensor([[0.0, float("nan")]])])
def test_a_table_of_curves_is_finite_and_two_dimensional(table: Tensor) -> None:
    with pytest.raises(ValueError, match="finite d x m"):
        AxisCurves(table)


# --- evidence -----------------------------------------------------------------------------------


def test_evidence_collects_input_norms_once_and_scores_as_the_drop_order_was_made(
    case: EvaluationCase,
) -> None:
    evidence = case.context.require_evidence("test")
    assert evidence.input_norms is evidence.input_norms
    for site in evidence.profile.sites:
        assert torch.equal(rank_rows(evidence.scores(site)), case.ranks[site.path])


def test_evidence_gives_other_windows_of_the_texts_that_learning_may_read(
    tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    options = LearnOptions(
        model=str(tiny_llama), out=tmp_path, calibration=tiny_text_file, tokens=256
    )
    prepared = prepare(options, tmp_path, lambda step: None)
    context = allocation_context(prepared)
    evidence = context.require_evidence("test")
    assert context.space.names == prepared.space.names
    assert torch.equal(context.curves.table, prepared.search.curves)
    again = evidence.texts.windows(TextPart.CALIBRATION, tokens=256, context=64)
    assert again.digest == evidence.calibration.digest
    other = evidence.texts.windows(TextPart.SEARCH, tokens=256, context=64)
    assert other.digest == prepared.texts.search.digest
    assert evidence.texts.windows(TextPart.SEARCH, tokens=60, context=10).ids.shape == (6, 10)
    with pytest.raises(TextError, match="tokens and"):
        evidence.texts.windows(TextPart.SEARCH, tokens=10**6, context=10)
