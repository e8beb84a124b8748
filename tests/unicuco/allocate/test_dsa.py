from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicuco.allocate import DSA
from unicuco.allocate.dsa import block_importance
from unicuco.allocate.dsa_search import (
    SearchOptions,
    cross,
    draw_expression,
    mutate,
    random_expressions,
    search_expressions,
)
from unicuco.allocate.expressions import POST, PRE, PUBLISHED, REDUCE, Expression
from unicuco.dimensions import Granularity
from unicuco.testing.allocator import make_evidence_context
from unicuco.testing.planted import planted_case, planted_judge

expressions = st.builds(
    Expression,
    pre=st.lists(st.sampled_from([*PRE]), max_size=2).map(tuple),
    reduce=st.sampled_from(REDUCE),
    post=st.lists(st.sampled_from([*POST]), min_size=1, max_size=2).map(tuple),
)

NASTY = (
    torch.zeros(3, 5),
    torch.full((4, 4), 1e30),
    -torch.rand(3, 3, generator=torch.Generator().manual_seed(0)),
    torch.tensor([[float("inf"), float("nan")], [-1e-30, 1e-30]]),
    torch.ones(1, 1),
)


@given(expressions)
def test_text_and_expression_are_the_same_thing(expression: Expression) -> None:
    assert Expression.parse(str(expression)) == expression


@given(expressions)
def test_no_expression_gives_nan_whatever_the_scores(expression: Expression) -> None:
    assert all(math.isfinite(expression.evaluate([scores])) for scores in NASTY)
    assert math.isfinite(expression.evaluate(NASTY))


@pytest.mark.parametrize(
    "text",
    ["", "VAR > ATAN", "[VAR]", "[VAR] > ATAN > ASIN > SIN", "[SUM] > ATAN", "X > [VAR] > SIN"],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expression"):
        Expression.parse(text)


def test_the_published_expression_by_hand() -> None:
    assert str(PUBLISHED) == "ABSLOG > [VAR] > ATAN > ASIN"
    scores = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])]
    logs = [math.log(v) for v in (1.0, 2.0, 3.0, 4.0)]
    mean = sum(logs) / 4
    variance = sum((v - mean) ** 2 for v in logs) / 4
    assert PUBLISHED.evaluate(scores) == pytest.approx(math.asin(math.atan(variance)), rel=1e-6)


def test_importance_that_is_not_defined_counts_as_zero() -> None:
    wide = torch.exp(torch.tensor([[-9.0, 0.0, 9.0]]))  # atan of the variance exceeds 1
    assert PUBLISHED.evaluate([wide]) == 0.0


def test_more_importance_keeps_less_over_twice_lambda() -> None:
    context = planted_case(Granularity.BLOCK).context
    allocator = DSA(context)
    (strategy,) = allocator.allocate([0.6])
    values = torch.tensor(strategy.values, dtype=torch.float64)
    assert torch.equal(values.argsort(), allocator.importance.argsort())
    assert float(values.max() - values.min()) == pytest.approx(0.16, abs=1e-3)
    assert float(values.mean()) == pytest.approx(0.6, abs=1e-4)


# --- the search ---------------------------------------------------------------------------------


def _mismatches(expression: Expression) -> float:
    """A judge with a known best: how many parts differ from the published expression."""
    wanted, found = PUBLISHED, expression
    return float(
        sum(a != b for a, b in zip(wanted.pre, found.pre, strict=False))
        + abs(len(wanted.pre) - len(found.pre))
        + (wanted.reduce != found.reduce)
        + sum(a != b for a, b in zip(wanted.post, found.post, strict=False))
        + abs(len(wanted.post) - len(found.post))
    )


def test_the_search_never_loses_its_best_and_beats_random_at_equal_evaluations() -> None:
    found, drawn = [], []
    for seed in range(5):
        result = search_expressions(_mismatches, SearchOptions(evaluations=120, seed=seed))
        course = result.best_so_far
        assert list(course) == sorted(course, reverse=True)
        assert course[-1] == result.best[1]
        assert len({expression for expression, _ in result.judged}) == 120
        found.append(course[-1])
        drawn.append(random_expressions(_mismatches, 120, seed=seed).best[1])
    assert sum(found) < sum(drawn)


def test_the_same_seed_finds_the_same_and_starts_from_what_it_is_given() -> None:
    options = SearchOptions(evaluations=20, seed=7)
    first = search_expressions(_mismatches, options, first=(PUBLISHED,))
    assert first.judged[0] == (PUBLISHED, 0.0)
    assert first.best == (PUBLISHED, 0.0)
    assert search_expressions(_mismatches, options, first=(PUBLISHED,)) == first


def test_expressions_that_come_to_the_same_are_judged_once() -> None:
    judged: list[Expression] = []

    def judge(expression: Expression) -> float:
        judged.append(expression)
        return _mismatches(expression)

    def effect(expression: Expression) -> str:
        return expression.reduce

    options = SearchOptions(population=6, parents=3, evaluations=40, seed=2)
    result = search_expressions(judge, options, effect=effect)
    assert [expression for expression, _ in result.judged] == judged
    assert sorted(expression.reduce for expression in judged) == sorted(REDUCE), "and then it ends"
    drawn = random_expressions(_mismatches, 40, seed=2, effect=effect)
    assert len(drawn.judged) == len(REDUCE)


def test_a_cost_that_is_not_finite_is_the_worst() -> None:
    def judge(expression: Expression) -> float:
        return 1.0 if expression.reduce == "VAR" else math.nan

    result = search_expressions(judge, SearchOptions(evaluations=80, seed=1))
    assert result.best[1] == 1.0
    assert all(not math.isnan(cost) for _, cost in result.judged)


@given(st.integers(0, 10**6))
def test_children_are_expressions_made_of_their_parents_parts(seed: int) -> None:
    draw = random.Random(seed)
    mother, father = draw_expression(draw), draw_expression(draw)
    child = cross(draw, mother, father)
    assert child.reduce in (mother.reduce, father.reduce)
    assert child.pre in (mother.pre, father.pre)
    assert child.post in (mother.post, father.post)
    mutate(draw, child)  # its constructor refuses what is no expression


def test_options_that_make_no_search_are_refused() -> None:
    with pytest.raises(ValueError, match="parents <= population"):
        SearchOptions(parents=1)


def _judge_on_planted(expression: Expression) -> float:
    (strategy,) = DSA(planted_case().context, expression).allocate([0.6])
    return planted_judge().evaluate(strategy).kl


@pytest.mark.slow
def test_an_expression_found_on_one_model_transfers_to_another() -> None:
    options = SearchOptions(population=8, parents=3, evaluations=24, seed=0)
    expression, cost = search_expressions(_judge_on_planted, options).best
    uniform = planted_judge().evaluate(planted_case().space.uniform(0.6)).kl
    assert cost < uniform
    other = planted_case(Granularity.LAYER, 1)
    (strategy,) = DSA(other.context, expression).allocate([0.6])
    judge = other.evaluator()
    assert judge.evaluate(strategy).kl < judge.evaluate(other.space.uniform(0.6)).kl


def test_importance_does_not_depend_on_the_order_of_sites_within_a_block() -> None:
    evidence = make_evidence_context(Granularity.LAYER).require_evidence("test")
    found = block_importance(evidence, PUBLISHED)
    scores: list[Tensor] = [evidence.scores(s) for s in evidence.profile.sites if s.block == 1]
    assert PUBLISHED.evaluate(scores[::-1]) == pytest.approx(float(found[1]), rel=1e-9)
