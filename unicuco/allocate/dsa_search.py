"""The search for DSA's expressions: a population, crossover, mutation, and a judge from outside.

The paper describes it and its code leaves it out. Written from the description: expressions are
judged by what they cost (the judge: say, the KL of the allocation that an expression makes), the
best ones are crossed part by part and mutated one operation at a time. No expression is judged
twice. The judge's numbers decide, and nothing else does: the same seed and judge find the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from unicuco.allocate.expressions import POST, PRE, REDUCE, Expression

Judge = Callable[[Expression], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How expressions are searched.

    ``parents`` of a generation's best are crossed; ``mutation`` is the chance that a child, after
    crossing, has one operation changed.
    """

    population: int = 12
    parents: int = 4
    evaluations: int = 60
    mutation: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.parents <= self.population <= self.evaluations:
            raise ValueError(f"need 2 <= parents <= population <= evaluations, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found: every judged expression with its cost, in order."""

    judged: tuple[tuple[Expression, float], ...]

    @property
    def best(self) -> tuple[Expression, float]:
        """The cheapest expression, the earliest among equals."""
        return min(self.judged, key=lambda item: item[1])

    @property
    def best_so_far(self) -> tuple[float, ...]:
        """The lowest cost after every evaluation; never rises."""
        lowest, course = math.inf, []
        for _, cost in self.judged:
            lowest = min(lowest, cost)
            course.append(lowest)
        return tuple(course)


def search_expressions(
    judge: Judge, options: SearchOptions, *, first: tuple[Expression, ...] = ()
) -> SearchResult:
    """Evolve expressions.

    Args:
        judge: the cost of an expression, lower is better; one that is not finite counts as the
            worst.
        options: of the search.
        first: expressions to start from besides random ones, at most the population.
    """
    draw = random.Random(options.seed)
    known: dict[Expression, float] = {}
    for expression in (*first[: options.population], *_fresh(draw, options.population, known)):
        if len(known) < options.population and expression not in known:
            known[expression] = _cost(judge, expression)
    while len(known) < options.evaluations:
        ranked = sorted(known, key=lambda expression: known[expression])
        parents = ranked[: options.parents]
        for _ in range(min(options.population, options.evaluations - len(known))):
            child = _child(draw, parents, options.mutation, known)
            known[child] = _cost(judge, child)
    return SearchResult(judged=tuple(known.items()))


def random_expressions(judge: Judge, evaluations: int, *, seed: int) -> SearchResult:
    """Judge random expressions: what a search has to beat at equal evaluations."""
    known: dict[Expression, float] = {}
    for expression in _fresh(random.Random(seed), evaluations, known):
        known[expression] = _cost(judge, expression)
    return SearchResult(judged=tuple(known.items()))


def draw_expression(draw: random.Random) -> Expression:
    """Return a random expression of any form that is allowed."""
    return Expression(
        pre=tuple(draw.choice([*PRE]) for _ in range(draw.randint(0, 2))),
        reduce=draw.choice(REDUCE),
        post=tuple(draw.choice([*POST]) for _ in range(draw.randint(1, 2))),
    )


def cross(draw: random.Random, mother: Expression, father: Expression) -> Expression:
    """Return a child that takes each of the three parts from one of its parents."""
    return Expression(
        pre=draw.choice((mother.pre, father.pre)),
        reduce=draw.choice((mother.reduce, father.reduce)),
        post=draw.choice((mother.post, father.post)),
    )


def mutate(draw: random.Random, expression: Expression) -> Expression:
    """Return the expression with one part changed: an operation replaced, added or removed."""
    part = draw.choice(("pre", "reduce", "post"))
    if part == "reduce":
        return Expression(pre=expression.pre, reduce=draw.choice(REDUCE), post=expression.post)
    if part == "pre":
        pre = _changed(draw, expression.pre, [*PRE], least=0)
        return Expression(pre=pre, reduce=expression.reduce, post=expression.post)
    post = _changed(draw, expression.post, [*POST], least=1)
    return Expression(pre=expression.pre, reduce=expression.reduce, post=post)


def _changed(
    draw: random.Random, names: tuple[str, ...], choices: list[str], *, least: int
) -> tuple[str, ...]:
    own = list(names)
    kinds = ["replace"] * bool(own) + ["add"] * (len(own) < 2) + ["remove"] * (len(own) > least)
    kind = draw.choice(kinds)
    if kind == "add":
        own.insert(draw.randint(0, len(own)), draw.choice(choices))
    elif kind == "remove":
        own.pop(draw.randrange(len(own)))
    else:
        own[draw.randrange(len(own))] = draw.choice(choices)
    return tuple(own)


def _child(
    draw: random.Random, parents: list[Expression], mutation: float, known: dict[Expression, float]
) -> Expression:
    """Return an expression that was not judged yet, as near to the parents as can be drawn."""
    child = cross(draw, *draw.sample(parents, 2))
    if draw.random() < mutation:
        child = mutate(draw, child)
    while child in known:
        child = mutate(draw, child)
    return child


def _fresh(draw: random.Random, count: int, known: dict[Expression, float]) -> list[Expression]:
    found: list[Expression] = []
    while len(found) < count:
        expression = draw_expression(draw)
        if expression not in known and expression not in found:
            found.append(expression)
    return found


def _cost(judge: Judge, expression: Expression) -> float:
    cost = float(judge(expression))
    return cost if math.isfinite(cost) else math.inf
