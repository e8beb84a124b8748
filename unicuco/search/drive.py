"""`drive`: the one loop that asks a search, has a pool evaluate, commits, and tells the search.

Three threads: the caller's (owns the store and submits), one that talks with the search, so that
a fit of seconds holds nothing up, and one that waits for the pool. Rounds overlap: while round k
is evaluated, round k + 1 is asked, for it depends on rounds up to k - 1 only. What this module
does not know: how strategies are chosen, where they are evaluated, and how they are stored.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from unicuco.search.book import Book
from unicuco.search.screening import Screening
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome, Strategy


class AskTell(Protocol):
    """A search, by rounds. Called from one thread at a time, in an order that respects the rounds.

    ``ask(k)`` may use options, seed and the results of rounds <= k - 2, and nothing else, although
    results of round k - 1 may have been told: so the same run asks the same strategies whatever
    finished first, whatever was interrupted, on any number of workers.
    """

    @property
    def round_size(self) -> int:
        """Asks in a full round."""

    def ask(self, round: int) -> list[Ask]:
        """Return the asks of a round, positions 0, 1, …; an empty list ends the run."""

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a whole round in ask order; rounds come in order, each once.

        ``results`` is what was recorded of the round: not always all that `ask` returned, for
        repeated strategies are dropped and the last round ends at the total; and the rounds of a
        resumed run were asked by another process.
        """


class Pool(Protocol):
    """Evaluates asks, several at a time. ``submit`` and ``next_outcome`` come from two threads."""

    @property
    def max_pending(self) -> int:
        """The most asks that may be submitted and not yet returned."""

    def submit(self, ask: Ask) -> None:
        """Begin to evaluate; returns at once."""

    def next_outcome(self) -> tuple[Ask, Outcome]:
        """Wait for the next ask to finish, whichever it is; a failed evaluation is a value.

        Returns every submitted ask once.
        """


class Log(Protocol):
    """What the loop needs of `EvaluationStore`."""

    def record_asks(self, asks: Sequence[Ask]) -> None:
        """Commit asks."""

    def asks(self) -> list[Ask]:
        """Return all asks by round and position, in each round those on part of the text first."""

    def append(self, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Commit outcomes."""

    def read(self) -> Iterator[tuple[Ask, Outcome]]:
        """Return all outcomes with their asks."""


class Evaluator(Protocol):
    """Judges a strategy in this process; raises where it fails."""

    def evaluate(self, strategy: Strategy, *, tokens: int | None, derivatives: bool) -> Evaluation:
        """Measure one strategy on ``tokens`` tokens, or on the whole search text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a stage is: ``done`` of ``total`` (0: unknown), and a few words on it.

    ``announce`` asks to say it even where short stages say nothing.
    """

    stage: str
    done: int
    total: int
    detail: str = ""
    announce: bool = False


def outcome_of(evaluator: Evaluator, ask: Ask) -> Outcome:
    """Evaluate an ask; an evaluation that raises becomes a value with its reason in one line."""
    started = time.perf_counter()
    try:
        return evaluator.evaluate(ask.strategy, tokens=ask.tokens, derivatives=ask.derivatives)
    except Exception as error:  # whatever one strategy breaks, the others go on
        wall_s = time.perf_counter() - started
        return FailedEvaluation.from_error(ask.strategy.key, error, wall_s=wall_s)


def drive(
    search: AskTell,
    pool: Pool,
    store: Log,
    *,
    num_evaluations: int,
    on_progress: Callable[[Progress], None],
    lag: int = 2,
    screening: Screening | None = None,
) -> None:
    """Run a search until ``num_evaluations`` strategies are asked, evaluated, recorded and told.

    What the store holds is taken as it is and never evaluated again, so calling this after any
    kind of end continues the run, and a larger ``num_evaluations`` extends it. A search that has
    nothing new to ask ends the run early. Interrupting it at any moment leaves a store that can
    be continued.

    Args:
        search: fresh; what the store holds is told to it.
        pool: nothing pending.
        store: the run's store, the lease held by the caller.
        num_evaluations: total number of asked strategies, those of earlier calls included; of
            screened alternatives one counts.
        on_progress: told of every commit; stage "evaluate".
        lag: what ``ask(k)`` depends on: rounds up to k - lag. 1 is for searches of one request,
            whose every round needs the one before; then rounds don't overlap.
        screening: chooses which of the strategies that a round asks on part of the text are judged
            on all of it; none: those that the search asks itself.

    Raises:
        UnicucoError: the store refused, or the pool or the search can't go on.
    """
    book = Book(store.asks(), store.read(), num_evaluations, lag, screening)
    workers = _Workers(search, pool)
    try:
        _Loop(book, workers, store, on_progress).run(search.round_size, pool.max_pending)
    finally:
        workers.close()


@dataclass(frozen=True, slots=True)
class _Asked:
    round: int
    asks: list[Ask]


# None: the search was told something.
_Event = _Asked | None | tuple[Ask, Outcome] | Exception


class _Workers:
    """One thread that talks with the search and one that waits for the pool; both report events."""

    def __init__(self, search: AskTell, pool: Pool) -> None:
        self.num_calls = 0
        self.num_pending = 0
        self._search = search
        self._pool = pool
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._submitted = threading.Semaphore(0)
        self._is_closed = False
        self._error: Exception | None = None
        self._caller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="unicuco-search")
        threading.Thread(target=self._wait_for_pool, name="unicuco-pool").start()

    def ask(self, round_: int) -> None:
        self._call(lambda: _Asked(round_, self._search.ask(round_)))

    def tell(self, round_: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        self._call(lambda: self._search.tell(round_, results))

    def submit(self, ask: Ask) -> None:
        self._pool.submit(ask)
        self.num_pending += 1
        self._submitted.release()

    def next_events(self) -> list[_Asked | tuple[Ask, Outcome]]:
        """Wait for something to happen and return all that has.

        What a thread raised is raised by the call after, so that what came with it can be recorded.
        """
        if self._error is not None:
            raise self._error
        events = [self._events.get()]
        while not self._events.empty():
            events.append(self._events.get())
        happened: list[_Asked | tuple[Ask, Outcome]] = []
        for event in events:
            if isinstance(event, Exception):
                self._error = event
            elif isinstance(event, tuple):
                self.num_pending -= 1
                happened.append(event)
            else:
                self.num_calls -= 1
                happened += [event] if isinstance(event, _Asked) else []
        return happened

    def close(self) -> None:
        """Begin nothing more. What runs now ends by itself, or when its pool is closed."""
        self._is_closed = True
        self._submitted.release()
        self._caller.shutdown(wait=False, cancel_futures=True)

    def _call(self, function: Callable[[], _Asked | None]) -> None:
        def report() -> None:
            if self._is_closed:
                return
            try:
                self._events.put(function())
            except Exception as error:  # raised again by next_events
                self._is_closed = True  # what would follow can only hide this error
                self._events.put(error)

        self.num_calls += 1
        self._caller.submit(report)

    def _wait_for_pool(self) -> None:
        while True:
            self._submitted.acquire()
            if self._is_closed:
                return
            try:
                self._events.put(self._pool.next_outcome())
            except Exception as error:  # raised again by next_events
                self._events.put(error)
                return


class _Loop:
    """Moves a book forward until all is asked, evaluated, recorded and told."""

    def __init__(
        self, book: Book, workers: _Workers, store: Log, on_progress: Callable[[Progress], None]
    ) -> None:
        self._book = book
        self._workers = workers
        self._store = store
        self._on_progress = on_progress
        self._waiting: deque[Ask] = deque()
        self._asking: int | None = None
        self._num_failed = _num_failed(book.outcomes.values())

    def run(self, round_size: int, max_pending: int) -> None:
        self._waiting.extend(self._book.unfinished())
        self._promote()
        self._replay(round_size)
        self._report()
        while True:
            # A round that is being asked again for its rest is told when it is whole.
            self._tell(len(self._book.rounds) if self._asking is None else self._asking)
            self._ask()
            self._refill(max_pending)
            if not self._workers.num_calls and not self._workers.num_pending:
                return
            events = self._workers.next_events()
            self._refill(max_pending)  # before the commit, so that no worker waits for the disk
            self._record([event for event in events if isinstance(event, tuple)])
            for event in events:
                if isinstance(event, _Asked):
                    self._accept(event.round, event.asks)

    def _replay(self, round_size: int) -> None:
        """Tell the search what the store holds; ask the rest of a round that was cut short."""
        last = len(self._book.rounds) - 1
        if self._book.is_short(round_size):
            self._tell(last - 1)
            self._asking = last
            self._workers.ask(last)

    def _tell(self, num_rounds: int) -> None:
        while self._book.num_told < num_rounds:
            results = self._book.next_results()
            if results is None:
                return
            self._workers.tell(self._book.num_told, results)
            self._book.num_told += 1

    def _ask(self) -> None:
        round_ = len(self._book.rounds)
        if self._asking is None and self._book.may_ask(round_):
            self._asking = round_
            self._workers.ask(round_)

    def _accept(self, round_: int, asks: list[Ask]) -> None:
        self._asking = None
        new = self._book.accept(round_, asks)
        self._store.record_asks(new)
        self._waiting.extend(new)

    def _refill(self, max_pending: int) -> None:
        while self._waiting and self._workers.num_pending < max_pending:
            self._workers.submit(self._waiting.popleft())

    def _record(self, results: list[tuple[Ask, Outcome]]) -> None:
        if results:
            self._store.append(results)
            self._book.record(results)
            self._promote()
            self._num_failed += _num_failed(outcome for _, outcome in results)
            self._report()

    def _promote(self) -> None:
        """Ask for what was found to deserve the whole text, before anything newer."""
        promoted = self._book.promote()
        self._store.record_asks(promoted)
        self._waiting.extendleft(reversed(promoted))

    def _report(self) -> None:
        failed = self._num_failed
        total = max(self._book.num_evaluations, self._book.num_asked)
        detail = f"round {len(self._book.rounds)}" + (f", {failed} failed" if failed else "")
        self._on_progress(
            Progress(stage="evaluate", done=self._book.num_done, total=total, detail=detail)
        )


def _num_failed(outcomes: Iterable[Outcome]) -> int:
    return sum(isinstance(outcome, FailedEvaluation) for outcome in outcomes)
