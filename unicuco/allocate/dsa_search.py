"""The search for DSA's expressions: a population, crossover, mutation, and a judge from outside.

The paper describes it and its code leaves it out. Written from the description: expressions are
judged by what they cost (the judge: say, the KL of the allocation that an expression makes), the
best ones are crossed part by part and mutated one operation at a time. No expression is judged
twice, nor two that come to the same thing: of random chains three in ten do (a rising
post-operation hardly changes what is scaled to [0, 1] afterwards), and finding that out costs no
evaluation. The judge's numbers decide, and nothing else does: the same seed and judge find the
same.

What it does not know: how much there is to find. On the planted model one random expression in
sixteen comes within a hundredth of the best that keep ratios of this width allow, so random search
is nearly as good there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from unicuco.allocate.expressions import POST, PRE, REDUCE, Expression

_TRIES: Final = 1000

Judge = Callable[[Expression], float]
Effect = Callable[[Expression], Hashable]


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
    judge: Judge,
    options: SearchOptions,
    *,
    first: tuple[Expression, ...] = (),
    effect: Effect = str,
) -> SearchResult:
    """Evolve expressions.

    Args:
        judge: the cost of an expression, lower is better; one that is not finite counts as the
            worst.
        options: of the search.
        first: expressions to start from besides random ones, at most the population.
        effect: what an expression comes to, found without judging it, e.g. its strategy's key; of
            those with equal effects one is judged.
    """
    draw = random.Random(options.seed)
    pool = _Pool(judge, effect)
    for expression in first[: options.population]:
        pool.add(expression)
    while len(pool.known) < options.population and pool.has_more:
        pool.add(draw_expression(draw))
    while len(pool.known) < options.evaluations and pool.has_more:
        ranked = sorted(pool.known, key=lambda expression: pool.known[expression])
        parents = ranked[: options.parents]
        for _ in range(min(options.population, options.evaluations - len(pool.known))):
            child = cross(draw, *draw.sample(parents, 2))
            if draw.random() < options.mutation:
                child = mutate(draw, child)
            while not pool.add(child) and pool.has_more:
                child = mutate(draw, child)
    return SearchResult(judged=tuple(pool.known.items()))


def random_expressions(
    judge: Judge, evaluations: int, *, seed: int, effect: Effect = str
) -> SearchResult:
    """Judge random expressions: what a search has to beat at equal evaluations."""
    draw, pool = random.Random(seed), _Pool(judge, effect)
    while len(pool.known) < evaluations and pool.has_more:
        pool.add(draw_expression(draw))
    return SearchResult(judged=tuple(pool.known.items()))


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


class _Pool:
    """What was judged, one expression of each effect."""

    def __init__(self, judge: Judge, effect: Effect) -> None:
        self.known: dict[Expression, float] = {}
        self._judge = judge
        self._effect = effect
        self._effects: set[Hashable] = set()
        self._refused: int = 0

    @property
    def has_more(self) -> bool:
        """Whether anything new is likely to be drawn: the last thousand were not all known."""
        return self._refused < _TRIES

    def add(self, expression: Expression) -> bool:
        """Judge an expression, unless one like it was judged; say whether it was new."""
        effect = self._effect(expression)
        if effect in self._effects:
            self._refused += 1
            return False
        self._refused = 0
        self._effects.add(effect)
        cost = float(self._judge(expression))
        self.known[expression] = cost if math.isfinite(cost) else math.inf
        return True
