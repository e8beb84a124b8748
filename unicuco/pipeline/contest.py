"""`Contest`: every allocator on one prepared model, at equal budgets, with what each answer costs.

Three kinds answer through the same protocol: one-shot allocators look and decide; searches judge
strategies anew for every request, over a pool, everything in a store of its own per request; the
learned network answers from its run. What this module does not know: which of them is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from unicuco.allocate import ALLOCATORS, Allocator, RowAllocator
from unicuco.calibration import Sampling, TokenSet
from unicuco.errors import RunError, UnicucoError
from unicuco.pipeline.options import ProgressSink
from unicuco.pipeline.preparation import Prepared, allocation_context
from unicuco.pipeline.run import Run
from unicuco.rows import RowRule
from unicuco.search import REQUEST_SEARCHES, RequestConfig, RequestSearch, SearchAllocator
from unicuco.search.drive import Pool, Progress, drive
from unicuco.search.request import axis_blocks
from unicuco.store import EvaluationStore, Measurement
from unicuco.types import Request, Strategy, Target

LEARNED: Final = "stratnet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One allocator's strategy for one sparsity, and what it took to get it.

    ``rows`` says how sites' drops are spread over their rows; none: equally.

    ``seconds`` of wall time; ``evaluations`` of strategies on the model, and ``units`` of forward
    passes over the search text, for this request alone. ``curve`` is (units, best KL on the search
    text so far) of a search.
    """

    allocator: str
    sparsity: float
    strategy: Strategy
    rows: RowRule | None = None
    seconds: float
    evaluations: int = 0
    units: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()


def allocator_names() -> list[str]:
    """Return the names of everything that answers requests, ours last."""
    return [*ALLOCATORS, *REQUEST_SEARCHES, LEARNED]


class Contest:
    """The allocators of one prepared model.

    Args:
        prepared: model, ranks and texts, the same for all.
        folder: where searches keep their stores; it exists.
        seed: of every draw.
        progress: told of every search.
    """

    def __init__(
        self, prepared: Prepared, folder: Path, *, seed: int, progress: ProgressSink
    ) -> None:
        self._prepared = prepared
        self._folder = folder
        self._seed = seed
        self._progress = progress
        self._context = allocation_context(prepared)
        self._allocators: dict[str, Allocator] = {}
        self._sampled: tuple[TokenSet, Measurement] | None = None

    def one_shot(self, name: str, sparsities: Sequence[float]) -> list[Answer]:
        """Ask an allocator of `ALLOCATORS`; its seconds are shared evenly by the requests.

        An allocator is made once: what it looked at counts into the first requests' seconds only.
        """
        started = time.perf_counter()
        if name not in self._allocators:
            self._allocators[name] = ALLOCATORS[name](self._context)
        allocator = self._allocators[name]
        strategies = allocator.allocate(sparsities)
        rules = [
            allocator.row_rule(strategy) if isinstance(allocator, RowAllocator) else None
            for strategy in strategies
        ]
        seconds = (time.perf_counter() - started) / max(1, len(sparsities))
        return [
            Answer(allocator=name, sparsity=sparsity, strategy=strategy, rows=rows, seconds=seconds)
            for sparsity, strategy, rows in zip(sparsities, strategies, rules, strict=True)
        ]

    def learned(self, run: Run, sparsities: Sequence[float]) -> list[Answer]:
        """Ask a run's network, as ``unicuco plan`` does.

        Raises:
            InfeasibleRequestError: a sparsity beyond what the run learned.
        """
        started = time.perf_counter()
        requests = [Request(target=Target.SPARSITY, value=value) for value in sparsities]
        plans = run.plan(requests)
        seconds = (time.perf_counter() - started) / max(1, len(sparsities))
        answers = []
        for sparsity, plan in zip(sparsities, plans, strict=True):
            if isinstance(plan, UnicucoError):
                raise plan
            answers.append(
                Answer(
                    allocator=LEARNED, sparsity=sparsity, strategy=plan.strategy, seconds=seconds
                )
            )
        return answers

    def sampling(self, name: str) -> Sampling:
        """Return how the windows that judge a search's strategies are chosen."""
        return REQUEST_SEARCHES[name](self.config).sampling

    def search_text(self, sampling: Sampling) -> TokenSet:
        """Return the text that searches are judged on: as many tokens however they are chosen."""
        if sampling is Sampling.EVEN:
            return self._prepared.texts.search
        return self._sample()[0]

    def sampling_costs(self, name: str) -> tuple[Measurement, ...]:
        """Return what choosing a search's windows costs, once for all its requests."""
        return () if self.sampling(name) is Sampling.EVEN else (self._sample()[1],)

    def _sample(self) -> tuple[TokenSet, Measurement]:
        if self._sampled is None:
            self._sampled = self._prepared.sampled_search_text(self._seed)
        return self._sampled

    def search(
        self, name: str, sparsity: float, pool: Pool, *, units: float | None = None
    ) -> Answer:
        """Search one request over a pool, going on where an earlier attempt was cut off.

        Args:
            name: of `REQUEST_SEARCHES`.
            sparsity: the request.
            pool: of evaluators on the `search_text` of its sampling, nothing pending.
            units: to spend at most; none: the method's own number.
        """
        runs = _SearchRun(self, name, sparsity, pool)
        config = replace(self.config, units=units)
        allocator = SearchAllocator(name, REQUEST_SEARCHES[name], config, runs)
        (strategy,) = allocator.allocate([sparsity])
        record = runs.search.record
        return Answer(
            allocator=name,
            sparsity=sparsity,
            strategy=strategy,
            seconds=runs.seconds,
            evaluations=record.evaluations,
            units=record.units,
            curve=tuple(record.curve),
        )

    @property
    def config(self) -> RequestConfig:
        """What every search of one request is given, but for the request: its sparsity is 0."""
        search = self._prepared.search
        return RequestConfig(
            space=self._prepared.space,
            curves=search.axis_curves(),
            blocks=axis_blocks(search.profile, search.granularity),
            sparsity=0.0,
            tokens=self._prepared.texts.search.num_tokens,
            seed=self._seed,
        )


class _SearchRun:
    """Runs one search over a pool with a store, and remembers it."""

    search: RequestSearch

    def __init__(self, contest: Contest, name: str, sparsity: float, pool: Pool) -> None:
        self._contest = contest
        self._name = name
        self._sparsity = sparsity
        self._pool = pool
        self.seconds = 0.0

    def __call__(self, search: RequestSearch) -> None:
        contest, self.search = self._contest, search
        path = contest._folder / f"{self._name}-{self._sparsity:g}.db"
        with EvaluationStore.open(path, create=True) as store:
            store.acquire_lease(f"compare {self._name}")
            _check_identity(store, path, self._identity(search))
            with _timed(store) as elapsed:
                drive(
                    search,
                    self._pool,
                    store,
                    num_evaluations=search.num_evaluations,
                    on_progress=self._report,
                    lag=search.lag,
                )
                self.seconds = elapsed()

    def _identity(self, search: RequestSearch) -> dict[str, object]:
        prepared, sampling = self._contest._prepared, search.sampling
        text = prepared.texts if sampling is Sampling.EVEN else self._contest.search_text(sampling)
        return {
            "base_model": prepared.loaded.profile.digest,
            "data": text.digest,
            "granularity": str(prepared.search.granularity),
            "seed": self._contest._seed,
            "evaluations": search.num_evaluations,
        }

    def _report(self, step: Progress) -> None:
        record = self.search.record
        best = f", best KL {record.best_kl:.4g}" if record.curve else ""
        self._contest._progress(
            replace(step, stage=f"{self._name} {self._sparsity:g}", detail=f"{step.detail}{best}")
        )


def _check_identity(store: EvaluationStore, path: Path, identity: dict[str, object]) -> None:
    recorded = store.get_meta("identity")
    if recorded is None:
        store.set_meta("identity", identity)
    elif recorded != identity:
        differing = [name for name, value in identity.items() if recorded.get(name) != value]
        raise RunError(
            f"{path} was begun with another {' and '.join(differing)}; compare with the same"
            " options, or choose another folder"
        )


@contextmanager
def _timed(store: EvaluationStore) -> Iterator[Callable[[], float]]:
    """Add the seconds spent inside to those that the store has noted of earlier attempts."""
    before = float(store.get_meta("seconds") or 0.0)
    started = time.perf_counter()
    try:
        yield lambda: before + time.perf_counter() - started
    finally:
        store.set_meta("seconds", before + time.perf_counter() - started)
