"""`Screening`: alternatives are judged on few tokens, and the best of them on all.

EvoPress judges offspring in stages, on ever more tokens (arXiv 2410.14649, section 3). Here a place
of a round is a budget, its alternatives have the same size, and the one with the least KL on the
first tokens of the search text deserves an evaluation on the whole of it. The choice depends on
the alternatives' own values alone, so it is the same whatever finished first; and as it is a
strategy and tokens that are asked, any pool can judge it. Values on part of the text never reach a
surrogate (`unicuco.search.base.History`).

Alternatives are answers of different daring: the network's, which stays near what was measured,
and for the same target the least of the surrogate's mean plus ever fewer of its deviations.

What this module does not know: how evaluations are run and recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from unicuco.space import StrategySpace
from unicuco.types import Ask, Evaluation, Outcome, Strategy

CAUTIONS: Final = (0.5, 0.0, -0.5)  # deviations added to the mean, of the further alternatives
_STEPS: Final = 60
_LEARNING_RATE: Final = 0.05  # of logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """How places of a round are screened.

    ``tokens`` of the search text judge an alternative; ``derivatives`` are asked of the best.
    """

    tokens: int
    derivatives: bool

    def asks(self, round: int, groups: Sequence[Sequence[Strategy]]) -> list[Ask]:
        """Return the asks that screen a round's places, at most `ALTERNATIVES` each."""
        return [
            Ask(
                round=round,
                position=place * ALTERNATIVES + number,
                strategy=strategy,
                derivatives=False,
                tokens=self.tokens,
            )
            for place, group in enumerate(groups)
            for number, strategy in enumerate(dict.fromkeys(group))
        ]

    def place(self, ask: Ask) -> int:
        """Return an ask's place in its round."""
        return ask.position if ask.tokens is None else ask.position // ALTERNATIVES

    def choose(self, results: Sequence[tuple[Ask, Outcome]]) -> Ask | None:
        """Return the ask of a place's best alternative on the whole text; none: all failed.

        Of equals it is the first.
        """
        good = [(outcome.kl, ask) for ask, outcome in results if isinstance(outcome, Evaluation)]
        if not good:
            return None
        _, best = min(good, key=lambda item: (item[0], item[1].position))
        return replace(best, position=self.place(best), derivatives=self.derivatives, tokens=None)


ALTERNATIVES: Final = 1 + len(CAUTIONS)


def daring_points(
    posterior: Callable[[Tensor], tuple[Tensor, Tensor]],
    space: StrategySpace,
    logits: Tensor,
    kept: Tensor,
) -> list[Tensor]:
    """Minimise the posterior's mean plus `CAUTIONS` times its deviation, each at every budget.

    Args:
        posterior: ``q x d`` unit points to mean and deviation, ``q`` each; differentiable.
        space: projects onto budgets.
        logits: ``b x d`` where to begin.
        kept: ``b`` budgets, as `StrategySpace.relaxed_budgets` gives them.

    Returns:
        ``b x d`` unit points for each caution.
    """
    count = len(CAUTIONS)
    z = logits.detach().double().repeat(count, 1).requires_grad_(True)
    budgets = kept.repeat(count)
    cautions = torch.tensor(CAUTIONS, dtype=torch.float64).repeat_interleave(len(logits))
    optimizer = torch.optim.Adam([z], lr=_LEARNING_RATE)
    for _ in range(_STEPS):
        mean, std = posterior(space.project_logits(z, budgets))
        optimizer.zero_grad()
        (mean + cautions * std).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return list(space.project_logits(z, budgets).chunk(count))
