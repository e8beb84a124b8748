from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unicuco.allocate import Fisher, Uniform
from unicuco.allocate.base import AllocationContext
from unicuco.dimensions import Granularity
from unicuco.errors import RequestError, SurrogateError
from unicuco.search import (
    LEARNERS,
    SEARCHES,
    Search,
    SearchConfig,
    build_search,
    learn_network,
    paper,
)
from unicuco.search.drive import outcome_of
from unicuco.search.paper import latin_hypercube
from unicuco.stratnet import NetKind, StratNetAllocator, TrainOptions
from unicuco.surrogate import SurrogateOptions
from unicuco.testing.cases import make_evaluation_case
from unicuco.testing.search_contract import (
    SearchContract,
    ToyModel,
    learned_kl,
    run_search,
    toy_config,
)
from unicuco.types import Evaluation, FailedEvaluation


class TestFront(SearchContract):
    preset = "default"


@pytest.mark.slow
class TestFrontInLargeRounds(SearchContract):
    preset = "default"

    def make(self, *, seed: int = 0) -> tuple[Search, ToyModel]:
        config = replace(toy_config("default", seed=seed), round_size=16)
        search = build_search(config)
        assert search.round_size == 16
        return search, ToyModel(config.space())


@pytest.mark.slow
class TestShapes(SearchContract):
    preset = "default"
    num_rounds = 6  # parts alone first

    def make(self, *, seed: int = 0) -> tuple[Search, ToyModel]:
        config = toy_config("default", seed=seed, dimensions=("depth", "width"))
        return build_search(config), ToyModel(config.space())

    def is_within(self, sparsity: float) -> bool:
        return 0 < sparsity < 0.95  # shapes meet a budget to a step, and never remove everything


class TestNarrowing(TestShapes):
    def make(self, *, seed: int = 0) -> tuple[Search, ToyModel]:
        config = toy_config("default", seed=seed, dimensions=("sparsity", "width"))
        return build_search(config), ToyModel(config.space())

    def test_few_steps_are_asked_alone_and_all_else_with_derivatives(self) -> None:
        search, _ = self.make()
        axes = {axis.name: axis for axis in self.make()[1].space.axes}
        for ask in (*search.ask(0), *search.ask(1)):
            active = [name for name, value in ask.strategy.settings if value > 0]
            is_alone = len(active) == 1
            assert ask.derivatives is not is_alone
            assert not is_alone or axes[active[0]].num_steps <= 4


class TestPaper(SearchContract):
    preset = "paper"

    @pytest.fixture(autouse=True)
    def _few_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(paper, "_STEPS", 40)
        monkeypatch.setattr(paper, "_CANDIDATES", 100)

    def is_within(self, sparsity: float) -> bool:
        return 0 <= sparsity < 1  # the published search knows no range


def test_every_registered_search_has_a_contract_test_and_a_learner() -> None:
    tested = {kind.preset for kind in SearchContract.__subclasses__()}
    assert set(SEARCHES) == set(LEARNERS) == tested


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(RequestError, match="preset must be one of default, paper"):
        build_search(toy_config("papers"))


def test_the_published_search_has_no_derivatives_and_the_default_has_them() -> None:
    assert not any(ask.derivatives for ask in build_search(toy_config("paper")).ask(0))
    assert all(ask.derivatives for ask in build_search(toy_config("default")).ask(0))


def test_every_slice_of_every_axis_of_a_latin_hypercube_holds_one_point() -> None:
    points = latin_hypercube(10, 4, seed=3)
    slices = (points * 10).floor().long()
    for axis in range(4):
        assert sorted(slices[:, axis].tolist()) == list(range(10))
    assert torch.equal(points, latin_hypercube(10, 4, seed=3))
    assert not torch.equal(points, latin_hypercube(10, 4, seed=4))


def test_learning_from_nothing_is_an_error_in_one_line() -> None:
    for preset in SEARCHES:
        with pytest.raises(SurrogateError, match="at least two different"):
            learn_network(toy_config(preset), [], seed=0)


@pytest.mark.slow
def test_a_network_of_shapes_answers_as_well_as_the_best_of_all_shapes() -> None:
    config = toy_config("default", dimensions=("depth",))
    model = ToyModel(config.space())
    search = build_search(config)
    results = run_search(search, model, 5)
    ok = [(ask.strategy, outcome) for ask, outcome in results if isinstance(outcome, Evaluation)]
    _, net = learn_network(config, ok, seed=0)
    targets = [0.1, 0.25, 0.4, 0.55, 0.7]
    answers = StratNetAllocator(net, model.space).allocate(targets)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * model.space.num_axes)
    every = every[every.sum(1) < model.space.num_axes]
    kept = model.space.cost.kept(every)
    for target, answer in zip(targets, answers, strict=True):
        budget = model.space.kept_for_sparsity(target)
        assert model.space.cost.kept_params(answer.values) <= budget
        best = float(model.kl(every[kept <= budget]).min())
        assert float(learned_kl(model, [answer])) <= 1.05 * best


def test_the_default_search_first_asks_what_fisher_answers() -> None:
    config = toy_config("default")
    space, (low, high) = config.space(), config.sparsity_range
    fisher = Fisher(AllocationContext(space=space, curves=config.axis_curves()))
    targets = [low + share * (high - low) for share in (0.3, 0.9, 0.6, 0.25, 0.75, 0.55)]
    answers = fisher.allocate(targets)
    asked = [ask.strategy for round in (0, 1) for ask in build_search(config).ask(round)]
    assert asked[:3] == answers[:3]
    assert not set(asked[3:]) & set(answers), "then what tells of others"


def test_the_default_search_finds_better_strategies_than_uniform_and_fisher() -> None:
    config = toy_config("default", training=TrainOptions(steps=40, batch=8))
    model = ToyModel(config.space())
    results = run_search(build_search(config), model, 5)
    ok = [(ask.strategy, outcome) for ask, outcome in results if isinstance(outcome, Evaluation)]
    _, net = learn_network(config, ok, seed=0)
    context = AllocationContext(space=model.space, curves=config.axis_curves())
    targets = [0.4, 0.5, 0.6, 0.7, 0.8]
    found, uniform, fisher = (
        learned_kl(model, allocator.allocate(targets))
        for allocator in (
            StratNetAllocator(net, model.space),
            Uniform(context),
            Fisher(context),
        )
    )
    assert float((found / uniform).log().mean()) < -0.1
    assert float((found / fisher).log().mean()) < -0.02


@pytest.mark.slow
def test_the_published_search_learns_a_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "_STEPS", 200)
    config = toy_config("paper")
    model = ToyModel(config.space())
    results = run_search(build_search(config), model, 3)
    ok = [(ask.strategy, outcome) for ask, outcome in results if isinstance(outcome, Evaluation)]
    _, net = learn_network(config, ok, seed=0)
    assert net.kind is NetKind.PREFERENCE
    allocator = StratNetAllocator(net, model.space)
    kl = learned_kl(model, allocator.allocate([0.2, 0.5, 0.8]))
    assert kl.tolist() == sorted(kl.tolist())


@pytest.mark.slow
def test_depth_goes_through_space_search_and_network_on_a_real_model(tiny_llama: Path) -> None:
    case = make_evaluation_case(tiny_llama, dimensions=("sparsity", "depth"))
    config = SearchConfig(
        preset="default",
        profile=case.loaded.profile,
        dimensions=("sparsity", "depth"),
        granularity=Granularity.LAYER,
        curves=case.curves.table,
        sparsity_range=(0.05, 0.9),
        seed=0,
        surrogate=SurrogateOptions(steps=15),
        training=TrainOptions(steps=15, batch=8),
    )
    search, evaluator, space = build_search(config), case.evaluator(), case.space
    evaluations = []
    for round_ in range(4):
        results = [(ask, outcome_of(evaluator, ask)) for ask in search.ask(round_)]
        assert not any(isinstance(outcome, FailedEvaluation) for _, outcome in results), results
        search.tell(round_, results)
        evaluations += [(ask.strategy, o) for ask, o in results if isinstance(o, Evaluation)]
    assert all(evaluation.gradient is None for _, evaluation in evaluations)
    surrogate, net = learn_network(config, evaluations, seed=0)
    targets = [0.1, 0.3, 0.6, 0.9]
    answers = StratNetAllocator(net, space).allocate(targets)
    kept = [space.cost.kept_params(answer.values) for answer in answers]
    assert kept == sorted(kept, reverse=True)
    for answer, target, count in zip(answers, targets, kept, strict=True):
        assert count <= space.kept_for_sparsity(target)
        assert {v for name, v in answer.settings if name.startswith("depth/")} <= {0.0, 1.0}
        assert evaluator.evaluate(answer).kl >= 0
    mean, std = surrogate.posterior(space.encode(answers))
    assert bool(torch.isfinite(mean).all() and torch.isfinite(std).all())
    asked = {name for s, _ in evaluations for name, v in s.settings if name[:5] == "depth" and v}
    assert asked, "some strategy removes a block"
