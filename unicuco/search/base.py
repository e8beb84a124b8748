"""What a search is: asks in rounds, each a pure function of what was told two rounds before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from unicuco.allocate import AxisCurves
from unicuco.dimensions import Granularity, build_space, follow_slopes
from unicuco.search.screening import Screening
from unicuco.space import StrategySpace
from unicuco.stratnet import TrainOptions
from unicuco.surrogate import Prior, SurrogateOptions
from unicuco.types import Ask, Evaluation, ModelProfile, Outcome, Strategy


class Search(Protocol):
    """An ask/tell loop over rounds.

    ``ask(k)`` may use only outcomes of rounds up to k - 2 and the seed, so rounds overlap and the
    same seed asks the same strategies whatever the number of workers and the order they finish in.
    """

    round_size: int

    def ask(self, round: int) -> list[Ask]:
        """Return the strategies of a round."""

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a whole round in ask order: what was asked and what it came to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """All that decides what a search asks; picklable, and recorded with the run.

    ``curves`` is the ``d x m`` table of axis curves; ``sparsity_range`` the targets that are
    learned; ``tasks`` the search texts, where there are several, and ``task_curves`` a table of
    curves for each; ``level_step`` the weights from one level of a site to the next, where sites
    come from a level database (0: they don't); ``round_size`` strategies are asked at a time, where
    the preset takes that from here (0: as many as it would by itself). ``screen_tokens`` of the
    search text judge the alternatives of which the best is evaluated (0: there are none); ``prior``
    is what another run's surrogate says of the model (none: there is no other run).
    """

    preset: str
    profile: ModelProfile
    dimensions: tuple[str, ...]
    granularity: Granularity
    curves: Tensor
    sparsity_range: tuple[float, float]
    seed: int
    surrogate: SurrogateOptions = field(default_factory=SurrogateOptions)
    training: TrainOptions = field(default_factory=TrainOptions)
    tasks: tuple[str, ...] = ()
    task_curves: tuple[Tensor, ...] = ()
    level_step: int = 0
    round_size: int = 0
    screen_tokens: int = 0
    prior: Prior | None = None

    @property
    def has_derivatives(self) -> bool:
        """Whether derivatives are asked."""
        return self.surrogate.directions > 0 and follow_slopes(self.dimensions)

    @property
    def screening(self) -> Screening | None:
        """How alternatives are screened; none: there are none."""
        if not self.screen_tokens:
            return None
        return Screening(tokens=self.screen_tokens, derivatives=self.has_derivatives)

    def space(self) -> StrategySpace:
        """Build the strategy space."""
        return build_space(
            self.profile, self.dimensions, self.granularity, level_step=self.level_step
        )

    def axis_curves(self) -> AxisCurves:
        """Build the axis curves."""
        return AxisCurves(self.curves)


class History:
    """Told rounds, and what a round may see of them."""

    def __init__(self) -> None:
        self._rounds: dict[int, list[tuple[Ask, Outcome]]] = {}

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Remember a round."""
        self._rounds[round] = list(results)

    def visible(self, round: int) -> list[tuple[Strategy, Evaluation]]:
        """Return the successful evaluations of rounds up to ``round - 2``, in ask order.

        Without those on part of the text: they are values of another objective.
        """
        return [
            (ask.strategy, outcome)
            for k in range(round - 1)
            for ask, outcome in self._rounds.get(k, [])
            if isinstance(outcome, Evaluation) and ask.tokens is None
        ]
