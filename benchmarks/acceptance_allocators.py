"""Acceptance of the one-shot allocators, on the model with planted sensitivity and on toys."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Final

import torch

from benchmarks.common import Finding
from unicuco.allocate import ALLOCATORS, DSA, Trim, Uniform
from unicuco.allocate.alphapruning import tail_exponent
from unicuco.allocate.dsa_search import (
    SearchOptions,
    draw_expression,
    random_expressions,
    search_expressions,
)
from unicuco.allocate.expressions import Expression
from unicuco.importance.influence import datainf, default_damping
from unicuco.ranks import keep_mask
from unicuco.testing.convex import RIDGE, convex_toy
from unicuco.testing.planted import (
    planted_case,
    planted_judge,
    reversed_strategy,
    shuffled_strategy,
)
from unicuco.types import Strategy

_SPARSITIES: Final = (0.5, 0.7)
_DSA_SEEDS: Final = 12
_SIGHTED: Final = ("fisher", "owl", "alphapruning", "dsa", "layerif", "trim")


def findings() -> list[Finding]:
    """Measure everything."""
    return [*_planted(), *_alphapruning(), *_layerif(), *_dsa(), *_trim()]


def _kl(strategy: Strategy) -> float:
    return planted_judge().evaluate(strategy).kl


def _planted() -> list[Finding]:
    case = planted_case()
    space, found = case.space, []
    for name in _SIGHTED:
        allocator = ALLOCATORS[name](case.context)
        strategies = allocator.allocate(_SPARSITIES)
        own = [_kl(strategy) for strategy in strategies]

        def worst(
            other: Callable[[float, Strategy], Strategy],
            own: list[float] = own,
            strategies: list[Strategy] = strategies,
        ) -> float:
            rivals = [_kl(other(s, st)) for s, st in zip(_SPARSITIES, strategies, strict=True)]
            return max(kl / rival for kl, rival in zip(own, rivals, strict=True))

        off = sum(
            abs(space.cost.kept_params(strategy.values) - space.kept_for_sparsity(sparsity))
            for sparsity, strategy in zip(_SPARSITIES, strategies, strict=True)
        )
        shuffled = [
            worst(lambda _, st, seed=seed: shuffled_strategy(space, st, seed=seed))  # type: ignore[misc]
            for seed in range(5)
        ]
        test = "planted sensitivity, KL at 0.5 and 0.7, worse of the two, relative to"
        found += [
            Finding(name, f"{test} uniform", worst(lambda s, _: space.uniform(s)), "< 1"),
            Finding(
                name,
                f"{test} its reversal",
                worst(lambda _, st: reversed_strategy(space, st)),
                "< 1",
            ),
            Finding(name, f"{test} the best of 5 shuffles", max(shuffled), "< 1"),
            Finding(name, "weights off the budget", float(off), "== 0"),
        ]
    return found


def _alphapruning() -> list[Finding]:
    errors = []
    for exponent in (1.8, 2.5, 4.0):
        for seed in range(3):
            uniform = torch.rand(4000, generator=torch.Generator().manual_seed(seed)).double()
            found = tail_exponent((1 - uniform) ** (-1 / (exponent - 1)))
            errors.append(abs(found / exponent - 1))
    return [
        Finding(
            "alphapruning", "relative error of a known exponent, mean of 9", _mean(errors), "<= 0.1"
        )
    ]


def _layerif() -> list[Finding]:
    left_out, inverse = [], []
    for seed in range(5):
        toy = convex_toy(seed)
        gram, cross = toy.gradients @ toy.gradients.T, toy.gradients @ toy.validation
        left_out.append(_correlation(-datainf(gram, cross, RIDGE), toy.changes))
        damping = default_damping(gram, toy.gradients.shape[1])
        hessian = toy.gradients.T @ toy.gradients / len(toy.gradients)
        hessian += damping * torch.eye(len(hessian), dtype=torch.float64)
        exact = -toy.gradients @ torch.linalg.solve(hessian, toy.validation)
        inverse.append(_correlation(datainf(gram, cross, damping), exact))
    return [
        Finding(
            "layerif",
            "convex toy: correlation with leave-one-out, least of 5",
            min(left_out),
            "> 0.9",
        ),
        Finding(
            "layerif", "DataInf to exact inverse: correlation, least of 5", min(inverse), "> 0.8"
        ),
    ]


def _dsa() -> list[Finding]:
    draw = random.Random(0)
    drawn = [draw_expression(draw) for _ in range(2000)]
    unequal = sum(Expression.parse(str(expression)) != expression for expression in drawn)
    nasty = [torch.zeros(3, 5), torch.full((4, 4), 1e30), -torch.ones(2, 2) / 3]
    nan = sum(not math.isfinite(expression.evaluate(nasty)) for expression in drawn)

    def strategy(expression: Expression) -> Strategy:
        return DSA(planted_case().context, expression).allocate([0.6])[0]

    def judge(expression: Expression) -> float:
        return _kl(strategy(expression))

    def effect(expression: Expression) -> str:
        return strategy(expression).key

    searched, rises = [], 0
    for seed in range(_DSA_SEEDS):
        options = SearchOptions(population=8, parents=3, evaluations=32, seed=seed)
        result = search_expressions(judge, options, effect=effect)
        course = list(result.best_so_far)
        rises += course != sorted(course, reverse=True)
        searched.append(course[-1] / random_expressions(judge, 32, seed=seed + 50).best[1])
    best = result.best[0]
    other = planted_case(seed=1)
    there = other.evaluator()
    moved = there.evaluate(DSA(other.context, best).allocate([0.6])[0]).kl
    uniform = there.evaluate(other.space.uniform(0.6)).kl
    return [
        Finding("dsa", "expressions that text does not give back, of 2000", float(unequal), "== 0"),
        Finding("dsa", "expressions with NaN on degenerate scores, of 2000", float(nan), "== 0"),
        Finding("dsa", f"searches whose best ever rose, of {_DSA_SEEDS}", float(rises), "== 0"),
        Finding(
            "dsa",
            f"KL of the search over random's at 32 trials, mean of {_DSA_SEEDS}",
            _mean(searched),
            "<= 1",
        ),
        Finding("dsa", "found expression on another model, KL to uniform", moved / uniform, "< 1"),
    ]


def _trim() -> list[Finding]:
    case = planted_case()
    trim = Trim(case.context, Uniform)
    (strategy,) = trim.allocate([0.6])
    rule = trim.row_rule(strategy)
    drops = case.space.cost.site_drops(strategy.values)
    off = sum(
        abs(int((~keep_mask(case.ranks[path], drops[path], rule.of(path))).sum()) - drops[path])
        for path in drops
    )
    before = _mean([report.row_variance_before for report in trim.reports])
    after = _mean([report.row_variance_after for report in trim.reports])
    gains = [report.cosine_after - report.cosine_before for report in trim.reports]
    refined = planted_judge().evaluate(strategy, rows=rule).kl / _kl(strategy)
    return [
        Finding("trim", "least gain of a site's cosine over equal rows", min(gains), ">= 0"),
        Finding("trim", "weights off the sites' counts", float(off), "== 0"),
        Finding("trim", "variance of row quality, after over before", after / before, "<= 1"),
        Finding("trim", "planted model, KL at 0.6 relative to equal rows", refined, ""),
    ]


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
