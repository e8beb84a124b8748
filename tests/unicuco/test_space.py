from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unicuco.dimensions import Granularity, build_space
from unicuco.errors import InfeasibleRequestError
from unicuco.space import Axis, StrategySpace
from unicuco.testing.profiles import make_profile
from unicuco.types import Strategy

PROFILE = make_profile()
LARGE = make_profile([[(512, 384), (1024, 128)], [(640, 512), (96, 2048)], [(512, 512)]])
SPACES = {
    "layer": build_space(PROFILE),
    "block": build_space(PROFILE, granularity=Granularity.BLOCK),
    "large": build_space(LARGE),
    "mixed": build_space(PROFILE, ("sparsity", "depth")),
    "mixed large": build_space(LARGE, ("depth", "sparsity"), Granularity.BLOCK),
    "depth": build_space(LARGE, ("depth",)),
    "width": build_space(LARGE, ("width",)),
    "shapes": build_space(LARGE, ("depth", "width")),
    "all": build_space(LARGE, ("depth", "width", "sparsity")),
    "bits": build_space(LARGE, ("weight_bits",)),
    "zeros and bits": build_space(LARGE, ("sparsity", "weight_bits")),
}
WITHOUT_CHOICES = ("layer", "block", "large")
names = st.sampled_from(sorted(SPACES))
few = settings(max_examples=40)
counting = st.sampled_from(WITHOUT_CHOICES)
seeds = st.integers(0, 10**6)
shares = st.floats(0, 1)


def points(space: StrategySpace, seed: int, n: int = 3) -> Tensor:
    """Points of the cube, some at its faces."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(n, space.num_axes, generator=generator, dtype=torch.float64)
    return (1.2 * unit - 0.1).clamp(0, 1)


def budget_at(space: StrategySpace, share: float) -> int:
    fewest, most = space.kept_range()
    return round(fewest + share * (most - fewest))


@given(names, seeds)
def test_decoding_then_encoding_then_decoding_is_decoding(name: str, seed: int) -> None:
    space = SPACES[name]
    strategies = space.decode(points(space, seed))
    unit = space.encode(strategies)
    assert unit.dtype == torch.float64
    assert bool(((unit >= -1e-12) & (unit <= 1 + 1e-12)).all())
    assert space.decode(unit) == strategies


@given(names, seeds)
def test_decoded_settings_lie_on_the_grid_within_their_range(name: str, seed: int) -> None:
    space = SPACES[name]
    for strategy in space.decode(points(space, seed)):
        for axis, (axis_name, value) in zip(space.axes, strategy.settings, strict=True):
            assert axis_name == axis.name
            assert axis.low <= value <= axis.high
            assert value * axis.num_steps == pytest.approx(round(value * axis.num_steps), abs=1e-6)


def test_strategies_of_another_space_are_not_encoded() -> None:
    other = SPACES["block"].uniform(0.5)
    with pytest.raises(ValueError, match="another space"):
        SPACES["layer"].encode([other])
    shuffled = Strategy(settings=SPACES["layer"].uniform(0.5).settings[::-1])
    with pytest.raises(ValueError, match="another space"):
        SPACES["layer"].encode([shuffled])


@given(names, seeds, shares)
def test_projection_meets_the_relaxed_budget(name: str, seed: int, share: float) -> None:
    space = SPACES[name]
    fewest, most = space.kept_range()
    kept = torch.full((3,), fewest + (0.01 + 0.98 * share) * (most - fewest), dtype=torch.float64)
    projected = space.project(points(space, seed), kept)
    assert bool(((projected >= 0) & (projected <= 1)).all())
    reached = space.cost.size(space.settings(projected))
    torch.testing.assert_close(reached, kept, rtol=1e-6, atol=1e-2)


@given(names, seeds, shares, shares)
def test_more_size_pressure_moves_every_axis_towards_compression(
    name: str, seed: int, one: float, other: float
) -> None:
    space = SPACES[name]
    fewest, most = space.kept_range()
    kept = fewest + torch.tensor(sorted((one, other)), dtype=torch.float64) * (most - fewest)
    tight, loose = space.project(points(space, seed, 1).expand(2, -1), kept)
    assert bool((tight >= loose - 1e-6).all())


@given(names, seeds, st.floats(0.1, 0.9))
def test_a_point_on_its_budget_stays_where_it_is(name: str, seed: int, share: float) -> None:
    space = SPACES[name]
    unit = 0.05 + 0.9 * points(space, seed)
    kept = space.cost.size(space.settings(unit))
    torch.testing.assert_close(space.project(unit, kept), unit, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SPACES))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_projection_has_the_gradient_of_finite_differences(name: str, share: float) -> None:
    space = SPACES[name]
    fewest, most = space.kept_range()
    kept = torch.full((2,), fewest + share * (most - fewest), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    unit = 0.2 + 0.6 * torch.rand(2, space.num_axes, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, space.num_axes, generator=generator, dtype=torch.float64)

    def judge(point: Tensor) -> Tensor:
        return (weight * space.project(point, kept)).sum()

    leaf = unit.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(judge(leaf), leaf)
    numeric = torch.zeros_like(unit)
    for row, axis in itertools.product(range(2), range(space.num_axes)):
        step = torch.zeros_like(unit)
        step[row, axis] = 1e-4
        numeric[row, axis] = (judge(unit + step) - judge(unit - step)) / 2e-4
    torch.testing.assert_close(gradient, numeric, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["layer", "mixed"])
def test_a_budget_beyond_the_range_ends_at_its_corner_with_finite_gradients(name: str) -> None:
    space = SPACES[name]
    unit = points(space, 0, 2).requires_grad_(True)
    total = space.cost.total_size
    projected = space.project(unit, torch.tensor([0.0, 2.0 * total]))
    assert bool((projected[0] > 0.999).all())
    assert bool((projected[1] < 0.001).all())
    projected.sum().backward()
    assert unit.grad is not None
    assert bool(torch.isfinite(unit.grad).all())


@settings(max_examples=60)
@given(counting, seeds, shares)
def test_any_whole_budget_is_met_to_the_weight(name: str, seed: int, share: float) -> None:
    space = SPACES[name]
    kept = budget_at(space, share)
    for strategy in space.decode_exact(points(space, seed), [kept] * 3):
        assert space.cost.size_of(strategy.values) == kept


def test_every_single_budget_of_a_small_space_is_met_to_the_weight() -> None:
    for name in ("layer", "block"):
        space = SPACES[name]
        fewest, most = space.kept_range()
        budgets = list(range(fewest, most + 1))
        unit = points(space, 5, 1).expand(len(budgets), -1)
        kept = [space.cost.size_of(s.values) for s in space.decode_exact(unit, budgets)]
        assert kept == budgets


@few
@given(st.sampled_from(["mixed", "mixed large", "depth", "width", "shapes", "all"]), seeds, shares)
def test_a_space_with_shapes_never_exceeds_a_budget(name: str, seed: int, share: float) -> None:
    space = SPACES[name]
    kept = budget_at(space, share)
    for strategy in space.decode_exact(points(space, seed), [kept] * 3):
        assert space.cost.size_of(strategy.values) <= kept


@few
@given(st.sampled_from(["mixed", "mixed large"]), seeds, shares)
def test_a_space_with_choices_meets_a_budget_to_the_weight_where_a_block_survives(
    name: str, seed: int, share: float
) -> None:
    space = SPACES[name]
    kept = budget_at(space, share)
    for strategy in space.decode_exact(points(space, seed), [kept] * 3):
        drops = space.cost.site_drops(strategy.values)
        removed = [a for a, v in strategy.settings if a.startswith("depth/") and v == 1]
        if len(removed) == sum(axis.is_shape for axis in space.axes) or not any(drops.values()):
            continue
        spare = kept - space.cost.size_of(strategy.values)
        alive = [v for a, v in strategy.settings if a.startswith("sparsity/") and v > 0]
        assert spare == 0 or not alive


@few
@given(seeds, shares)
def test_shapes_and_weights_together_meet_any_budget_to_the_weight(seed: int, share: float) -> None:
    space = SPACES["all"]
    kept = budget_at(space, 0.1 + 0.9 * share)
    for strategy in space.decode_exact(points(space, seed), [kept] * 3):
        shape = space.cost.shape(strategy.values)
        # Of a narrowed site a step is less than a weight; where one is whole, it takes the rest.
        whole = [
            zeroed
            for site, size, zeroed in zip(LARGE.sites, shape.sizes, shape.zeroed, strict=True)
            if size == site.num_weights
        ]
        spare = kept - space.cost.size_of(strategy.values)
        assert spare == 0 if any(whole) else spare >= 0


@few
@given(st.sampled_from(["depth", "width", "shapes"]), seeds, shares)
def test_of_shapes_nothing_is_taken_that_could_be_given_back(
    name: str, seed: int, share: float
) -> None:
    space = SPACES[name]
    kept = budget_at(space, share)
    for strategy in space.decode_exact(points(space, seed), [kept] * 3):
        for a, axis in enumerate(space.axes):
            values = list(strategy.values)
            if values[a] > 0:
                values[a] -= 1 / axis.num_steps
                assert space.cost.size_of(values) > kept


@few
@given(seeds, shares)
def test_zeros_that_nobody_asked_for_make_up_for_no_step_of_bits(seed: int, share: float) -> None:
    space = SPACES["zeros and bits"]
    bits = torch.tensor([axis.is_shape for axis in space.axes])
    least = space.cost.size_of([axis.high if axis.is_shape else 0.0 for axis in space.axes])
    kept = round(least + (0.05 + 0.95 * share) * (space.cost.total_size - least))
    unit = (0.05 + 0.9 * points(space, seed)) * bits
    for strategy in space.decode_exact(unit, [kept] * 3):
        assert max(v for v, own in zip(strategy.values, bits, strict=True) if not own) < 0.01
        assert space.cost.size_of(strategy.values) <= kept


@few
@given(names, seeds)
def test_a_smaller_budget_never_keeps_more(name: str, seed: int) -> None:
    space = SPACES[name]
    budgets = [budget_at(space, share / 25) for share in range(26)]
    unit = points(space, seed, 1).expand(len(budgets), -1)
    strategies = space.decode_exact(unit, budgets)
    kept = [space.cost.size_of(strategy.values) for strategy in strategies]
    assert kept == sorted(kept)


@few
@given(counting, seeds)
def test_a_smaller_budget_gives_back_at_most_a_rounded_weight_of_any_axis(
    name: str, seed: int
) -> None:
    space = SPACES[name]
    budgets = [budget_at(space, share / 25) for share in range(26)]
    unit = points(space, seed, 1).expand(len(budgets), -1)
    steps = [
        [round(v * axis.num_steps) for v, axis in zip(strategy.values, space.axes, strict=True)]
        for strategy in space.decode_exact(unit, budgets)
    ]
    for tight, loose in itertools.pairwise(steps):
        assert all(a >= b - 2 for a, b in zip(tight, loose, strict=True))


@pytest.mark.parametrize("name", sorted(SPACES))
def test_a_budget_below_the_range_names_the_nearest_that_can_be_met(name: str) -> None:
    space = SPACES[name]
    fewest, _ = space.kept_range()
    with pytest.raises(InfeasibleRequestError, match=f"{fewest:,}") as caught:
        space.decode_exact(points(space, 0), [fewest + 1, fewest - 1, fewest])
    assert caught.value.nearest == fewest
    (strategy,) = space.decode_exact(points(space, 0, 1), [fewest])
    assert space.cost.size_of(strategy.values) == fewest


@pytest.mark.parametrize("name", sorted(SPACES))
def test_a_budget_above_the_dense_model_keeps_it_whole(name: str) -> None:
    space = SPACES[name]
    (strategy,) = space.decode_exact(points(space, 1, 1), [space.cost.total_size + 5])
    assert set(strategy.values) == {0.0}
    assert space.cost.size_of(strategy.values) == space.cost.total_size


@pytest.mark.parametrize("name", WITHOUT_CHOICES)
def test_uniform_is_equal_to_a_weight_and_exact(name: str) -> None:
    space = SPACES[name]
    for sparsity in (0.0, 0.1, 1 / 3, 0.6, 0.9):
        strategy = space.uniform(sparsity)
        assert space.cost.size_of(strategy.values) == space.kept_for_sparsity(sparsity)
        for axis, value in zip(space.axes, strategy.values, strict=True):
            assert abs(value - sparsity) <= 1.5 / axis.num_steps


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_sparsity_given_as_a_fraction_of_weights_means_exactly_those(n: int, k: int) -> None:
    k = min(k, n - 1)
    space = build_space(make_profile([[(n, 1)]], extra_params=0, outside_params=0))
    assert space.kept_for_sparsity(k / n) == n - k


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.6, 0.7, 0.9])
def test_the_budget_of_a_sparsity_is_met_to_the_weight_in_models_of_billions(
    sparsity: float,
) -> None:
    n = 80_000_000_000
    space = build_space(make_profile([[(n // 1000, 1000)]] * 2))
    total = space.cost.total_size
    assert total - space.kept_for_sparsity(sparsity) == round(2 * n * sparsity)


@pytest.mark.parametrize(
    ("low", "high", "num_steps"), [(0.5, 0.5, 4), (-0.1, 0.5, 4), (0, 1.1, 4), (0, 1, 0)]
)
def test_an_axis_has_a_range_and_steps(low: float, high: float, num_steps: int) -> None:
    with pytest.raises(ValueError, match="low < high"):
        Axis(name="a", low=low, high=high, num_steps=num_steps)


def test_axis_names_of_a_space_are_unique() -> None:
    axis = Axis(name="a", low=0, high=1, num_steps=4)
    with pytest.raises(ValueError, match="unique"):
        StrategySpace([axis, axis], SPACES["layer"].cost)


# --- levels -------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1), st.sampled_from([7, 40, 1000]))
def test_budgets_are_met_at_levels_but_for_one_axis(seed: int, share: float, step: int) -> None:
    space = build_space(LARGE, level_step=step)
    unit, kept = points(space, seed), budget_at(space, share)
    strategies = space.decode_exact(unit, [kept] * len(unit))
    plain = build_space(LARGE).decode_exact(unit, [kept] * len(unit))
    for strategy, fine in zip(strategies, plain, strict=True):
        assert space.cost.size_of(strategy.values) == kept
        steps = [round(v * a.num_steps) for v, a in zip(strategy.values, space.axes, strict=True)]
        exact = [round(v * a.num_steps) for v, a in zip(fine.values, space.axes, strict=True)]
        assert all(0 <= n <= axis.max_step for n, axis in zip(steps, space.axes, strict=True))
        if share > 0.05:  # below, all axes stand at their last levels, and more must lie above
            assert sum(n % step > 0 for n in steps) <= 1
            far = len(steps) * step  # where others stand at their last levels, one takes up for all
            assert all(abs(a - b) <= far for a, b in zip(steps, exact, strict=True))


def test_a_stride_is_of_sites_and_never_of_shapes() -> None:
    by_block = build_space(PROFILE, granularity=Granularity.BLOCK, level_step=7)
    assert by_block.uniform(0.4) == SPACES["block"].uniform(0.4)
    with pytest.raises(ValueError, match="a shape"):
        build_space(PROFILE, ("sparsity", "depth"), level_step=7)
