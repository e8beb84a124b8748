"""The contract of searches: subclass `SearchContract`, and its tests run on a toy model."""

# ruff: noqa: D102 - a test's name is its sentence of behaviour

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor

from unicuco.allocate import AxisCurves
from unicuco.dimensions import Granularity
from unicuco.search import SEARCHES, Search, SearchConfig, build_search
from unicuco.search.hypervolume import hypervolume
from unicuco.space import StrategySpace
from unicuco.stratnet import TrainOptions
from unicuco.surrogate import EPSILON, SurrogateOptions
from unicuco.testing.profiles import make_profile
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome, Strategy

_BLOCKS: Final = [[(40, 60), (80, 30)], [(50, 50), (20, 90)], [(60, 60)]]
_SPARSITY_RANGE: Final = (0.05, 0.9)


class ToyModel:
    """A model known by heart: axes cost alone, and the first two more when they meet.

    Its Fisher curves know what axes cost alone, up to a factor per axis.
    """

    def __init__(self, space: StrategySpace) -> None:
        self.space = space
        generator = torch.Generator().manual_seed(2)
        draw = torch.randn(2, space.num_axes, generator=generator, dtype=torch.float64)
        self._weights = 0.05 * torch.exp(draw[0])
        self._known = self._weights * torch.exp(0.3 * draw[1])

    def curves(self) -> Tensor:
        """Return the table of axis curves."""
        knots = torch.linspace(0, 1, 257, dtype=torch.float64)
        return self._known[:, None] * knots.square()

    def kl(self, unit: Tensor) -> Tensor:
        """Return ``b`` KL in nats of ``b x d`` unit points; differentiable."""
        alone = (self._weights * unit.square() * (1 + unit.square())).sum(-1)
        return alone * (1 + 2 * unit[..., 0] * unit[..., 1])

    def evaluate(self, ask: Ask) -> Evaluation:
        """Return the outcome of an ask."""
        unit = self.space.encode([ask.strategy]).requires_grad_(True)
        kl = self.kl(unit)
        (gradient,) = torch.autograd.grad(kl.sum(), unit)
        dropped = sum(self.space.cost.site_drops(ask.strategy.values).values())
        return Evaluation(
            strategy_key=ask.strategy.key,
            kl=float(kl.detach()),
            kept_fraction=1 - dropped / self.space.cost.num_site_weights,
            gradient=tuple((gradient[0] / self.space.span).tolist()) if ask.derivatives else None,
            tokens=64,
            text_digest="toy",
            cost_units=3.0 if ask.derivatives else 1.0,
            wall_s=0.0,
        )


def toy_config(
    preset: str,
    *,
    seed: int = 0,
    dimensions: tuple[str, ...] = ("sparsity",),
    training: TrainOptions | None = None,
) -> SearchConfig:
    """Return a configuration for the toy model, quick to train."""
    config = SearchConfig(
        preset=preset,
        profile=make_profile(_BLOCKS),
        dimensions=dimensions,
        granularity=Granularity.LAYER,
        curves=torch.zeros(1, 2),
        sparsity_range=_SPARSITY_RANGE,
        seed=seed,
        surrogate=SurrogateOptions(directions=4, steps=15),
        training=training or TrainOptions(steps=15, batch=8),
    )
    space = config.space()  # what follows needs it
    object.__setattr__(config, "curves", ToyModel(space).curves())
    low, high = _SPARSITY_RANGE
    object.__setattr__(config, "sparsity_range", (low, min(high, space.highest_sparsity)))
    return config


def run_search(
    search: Search, model: ToyModel, num_rounds: int, *, fail: Sequence[tuple[int, int]] = ()
) -> list[tuple[Ask, Outcome]]:
    """Ask and tell round by round; evaluations at ``fail`` (round, position) fail."""
    results: list[tuple[Ask, Outcome]] = []
    for round_ in range(num_rounds):
        asked: list[tuple[Ask, Outcome]] = []
        for ask in search.ask(round_):
            failed = FailedEvaluation(strategy_key=ask.strategy.key, kind="E", message="no")
            is_failed = (ask.round, ask.position) in fail
            asked.append((ask, failed if is_failed else model.evaluate(ask)))
        search.tell(round_, asked)
        results += asked
    return results


class SearchContract:
    """What every entry of `SEARCHES` satisfies; subclasses set ``preset``."""

    preset: ClassVar[str]
    num_rounds: ClassVar[int] = 4

    def make(self, *, seed: int = 0) -> tuple[Search, ToyModel]:
        """Return a fresh search and the model it searches."""
        config = toy_config(self.preset, seed=seed)
        return build_search(config), ToyModel(config.space())

    def test_is_registered_under_its_name(self) -> None:
        assert self.preset in SEARCHES

    def test_numbers_its_asks_and_fills_its_rounds(self) -> None:
        search, model = self.make()
        asks = [ask for ask, _ in run_search(search, model, self.num_rounds)]
        size = search.round_size
        expected = [(r, p) for r in range(self.num_rounds) for p in range(size)]
        assert [(ask.round, ask.position) for ask in asks] == expected

    def test_the_same_seed_asks_the_same_and_another_seed_something_else_at_last(self) -> None:
        runs = [
            [ask for ask, _ in run_search(*self.make(seed=seed), self.num_rounds)]
            for seed in (5, 5, 6)
        ]
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]

    def test_what_a_round_asks_depends_on_rounds_up_to_two_before_only(self) -> None:
        search, model = self.make()
        results = run_search(search, model, self.num_rounds)
        size = search.round_size
        other, _ = self.make()
        for round_ in range(self.num_rounds):
            asked = other.ask(round_)  # round - 1 is not told yet
            assert asked == [ask for ask, _ in results[round_ * size : (round_ + 1) * size]]
            assert other.ask(round_) == asked
            if round_:
                other.tell(round_ - 1, results[(round_ - 1) * size : round_ * size])

    def test_a_search_that_is_told_anew_goes_on_as_before(self) -> None:
        search, model = self.make()
        results = run_search(search, model, self.num_rounds)
        size, last = search.round_size, self.num_rounds - 1
        other, _ = self.make()
        for round_ in range(last):
            other.tell(round_, results[round_ * size : (round_ + 1) * size])
        assert other.ask(last) == [ask for ask, _ in results[last * size :]]

    def test_asks_no_strategy_twice(self) -> None:
        asks = [ask for ask, _ in run_search(*self.make(), self.num_rounds)]
        assert len({ask.strategy.key for ask in asks}) == len(asks)

    def test_asks_strategies_of_the_space_within_what_is_learned(self) -> None:
        search, model = self.make()
        space = model.space
        for ask, outcome in run_search(search, model, self.num_rounds):
            assert space.decode(space.encode([ask.strategy])) == [ask.strategy]
            assert isinstance(outcome, Evaluation)
            assert self.is_within(1 - outcome.kept_fraction)

    def is_within(self, sparsity: float) -> bool:
        """Whether a sparsity may be asked."""
        low, high = _SPARSITY_RANGE
        return low - 1e-3 <= sparsity <= high + 1e-3

    def test_failures_are_no_end(self) -> None:
        search, model = self.make()
        size = search.round_size
        whole_round = [(0, position) for position in range(size)]
        results = run_search(search, model, self.num_rounds, fail=[*whole_round, (1, 0), (2, 1)])
        assert len(results) == self.num_rounds * size

    def test_what_is_measured_dominates_more_and_more(self) -> None:
        results = run_search(*self.make(), self.num_rounds)
        reference = torch.tensor([1.0, 2.0])
        points = torch.tensor(
            [
                [outcome.kept_fraction, float(torch.tensor(outcome.kl + EPSILON).log())]
                for _, outcome in results
                if isinstance(outcome, Evaluation)
            ]
        )
        volumes = [hypervolume(points[:k], reference) for k in range(1, len(points) + 1)]
        assert volumes == sorted(volumes)
        assert volumes[-1] > volumes[len(volumes) // 2]

    def test_a_configuration_travels_by_pickle(self) -> None:
        config = toy_config(self.preset)
        copy = pickle.loads(pickle.dumps(config))
        assert build_search(copy).ask(0) == build_search(config).ask(0)
        assert AxisCurves(copy.curves).table.equal(config.axis_curves().table)


def learned_kl(model: ToyModel, strategies: Sequence[Strategy]) -> Tensor:
    """Return the toy model's KL of strategies."""
    return model.kl(model.space.encode(strategies))
