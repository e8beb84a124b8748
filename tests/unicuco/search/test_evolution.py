from __future__ import annotations

import pytest

from unicuco.dimensions import build_space
from unicuco.search.evolution import Evolution, EvolutionOptions
from unicuco.testing.profiles import make_profile
from unicuco.testing.search_contract import ToyModel, learned_kl

SPACE = build_space(make_profile([[(40, 60), (80, 30)], [(50, 50), (20, 90)], [(60, 60)]]))
MODEL = ToyModel(SPACE)


def evolve(evolution: Evolution, generations: int) -> list[float]:
    """Run, and return the best KL after the start and after every generation."""
    evolution.tell([evolution.best], learned_kl(MODEL, [evolution.best]).tolist())
    history = [evolution.best_kl]
    for _ in range(generations):
        children = evolution.ask()
        survivors = evolution.survivors(children, learned_kl(MODEL, children).tolist())
        evolution.tell(survivors, learned_kl(MODEL, survivors).tolist())
        history.append(evolution.best_kl)
    assert None not in history
    return [kl for kl in history if kl is not None]


def start(sparsity: float = 0.6, seed: int = 0) -> Evolution:
    return Evolution(SPACE, sparsity, EvolutionOptions(), seed=seed)


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.85])
def test_every_child_keeps_the_budget_to_the_weight(sparsity: float) -> None:
    evolution = start(sparsity)
    for _ in range(12):
        children = evolution.ask()
        for child in children:
            assert SPACE.cost.kept_params(child.values) == SPACE.kept_for_sparsity(sparsity)
            assert SPACE.decode(SPACE.encode([child])) == [child]
        evolution.tell(children, learned_kl(MODEL, children).tolist())


def test_the_best_never_rises_and_beats_uniform_in_the_end() -> None:
    history = evolve(start(), 25)
    assert history == sorted(history, reverse=True)
    assert history[-1] < 0.9 * history[0]


def test_children_are_all_different_and_never_asked_again() -> None:
    evolution = start()
    keys = [evolution.best.key]
    for _ in range(10):
        children = evolution.ask()
        assert len(children) == 8
        keys += [child.key for child in children]
        evolution.tell(children[:1], [1.0])
    assert len(set(keys)) == len(keys)


def test_the_same_seed_evolves_the_same() -> None:
    assert evolve(start(seed=3), 5) == evolve(start(seed=3), 5)
    assert evolve(start(seed=3), 5) != evolve(start(seed=4), 5)


def test_survivors_are_the_best_of_the_screening() -> None:
    evolution = start()
    children = evolution.ask()
    screening = [0.5, 0.1, 0.9, 0.2, 0.7, 0.6, 0.8, 0.3]
    assert evolution.survivors(children, screening) == [children[1], children[3]]


def test_a_generation_costs_its_screening_and_its_survivors() -> None:
    assert start().units_per_generation == pytest.approx(8 / 3 + 2)


def test_where_nothing_can_be_switched_there_are_no_children() -> None:
    evolution = Evolution(SPACE, 0.0, EvolutionOptions(), seed=0)
    assert evolution.ask() == []
    alone = Evolution(build_space(make_profile([[(9, 9)]])), 0.5, EvolutionOptions(), seed=0)
    assert alone.ask() == []
