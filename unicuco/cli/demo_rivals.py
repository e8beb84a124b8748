"""What the demo compares with: one-shot allocations, and what a search per request would cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from unicuco.allocate import ALLOCATORS
from unicuco.evaluate import LocalEvaluator
from unicuco.export import write_variant
from unicuco.pipeline import LearnOptions, Run
from unicuco.pipeline.contest import Contest
from unicuco.pipeline.preparation import Prepared, allocation_context, prepare
from unicuco.search.drive import outcome_of
from unicuco.search.evolution import Evolution, EvolutionOptions
from unicuco.types import Plan, Request, ServedAs, Strategy, Target

# What an EvoPress-style search spends on one target before it stops gaining (DESIGN.md, section 8).
SEARCH_UNITS: Final = 300
_TIMED_GENERATIONS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchCost:
    """What one search for one target costs: timed on ``timed_units``, scaled to ``units``.

    A unit is one forward pass over the run's search tokens.
    """

    timed_units: float
    timed_s: float
    units: int

    @property
    def seconds(self) -> float:
        """Seconds of the whole search, derived by proportion."""
        return self.timed_s * self.units / self.timed_units

    def describe(self) -> str:
        """Return how the number came about."""
        return (
            f"evolution by switches, {self.units} units, by proportion from"
            f" {self.timed_units:.0f} units timed at {self.timed_s:.1f} s"
        )


class Rivals:
    """One-shot allocations and a timed search on the model, texts and ranks of a finished run."""

    def __init__(self, prepared: Prepared, run: Run) -> None:
        self._prepared = prepared
        self._run = run

    @classmethod
    def prepare(cls, options: LearnOptions, run: Run) -> Self:
        """Read model, texts, ranks and Fisher sums back from the run."""
        return cls(prepare(replace(options, resume=True), run.folder, lambda step: None), run)

    def strategy(self, name: str, sparsity: float) -> Strategy:
        """Return what an allocator answers to a sparsity."""
        allocator = ALLOCATORS[name](allocation_context(self._prepared))
        (strategy,) = allocator.allocate([sparsity])
        return strategy

    def cut(self, name: str, sparsity: float, out: Path) -> Path:
        """Cut an allocator's variant and return its folder; its prediction is the run's own."""
        run = self._run
        strategy = self.strategy(name, sparsity)
        cost = run.planner.space.cost
        dropped = sum(cost.site_drops(strategy.values).values())
        (prediction,) = run.planner.predict([strategy])
        plan = Plan(
            request=Request(target=Target.SPARSITY, value=sparsity),
            strategy=strategy,
            sparsity=dropped / cost.num_site_weights,
            kept_params=cost.kept_params(strategy.values),
            total_params=cost.total_params,
            num_bytes=cost.num_bytes(strategy.values),
            served_as=ServedAs.MASK,
            kl=prediction,
        )
        write_variant(
            out,
            base=run.base_folder,
            profile=run.profile,
            ranks=run.ranks,
            space=run.planner.space,
            plan=plan,
            provenance={"run": run.digest, "seed": run.seed},
        )
        return out

    def time_search(self, sparsity: float) -> SearchCost:
        """Run a few generations of a search for one target on all cores, and time them."""
        prepared = self._prepared
        evaluator = LocalEvaluator(*prepared.judging(prepared.texts.search))
        contest = Contest(prepared, self._run.folder, seed=0, progress=lambda step: None)
        config = replace(contest.config, sparsity=sparsity)
        search = Evolution(
            config, EvolutionOptions(offspring=16, survivors=(2,), shares=(1 / 4, 1))
        )
        # The start is not timed: the first pass of a process warms up.
        search.tell(0, [(ask, outcome_of(evaluator, ask)) for ask in search.ask(0)])
        before = search.record.units
        started = time.perf_counter()
        for round_ in range(1, 1 + _TIMED_GENERATIONS * len(search.options.counts)):
            asks = search.ask(round_)
            search.tell(round_, [(ask, outcome_of(evaluator, ask)) for ask in asks])
        seconds = time.perf_counter() - started
        units = search.record.units - before
        return SearchCost(timed_units=units, timed_s=seconds, units=SEARCH_UNITS)
