"""The loop, with a real store, a pool of threads, and a search whose asks show what it knew."""

from __future__ import annotations

import hashlib
import os
import queue
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import unicuco
from unicuco.errors import StorageError, SurrogateError
from unicuco.search.drive import Progress, drive, outcome_of
from unicuco.store import EvaluationStore
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome, Strategy

ROUND_SIZE = 4


def strategy_of(seed: str) -> Strategy:
    digest = hashlib.sha256(seed.encode()).digest()
    values = (int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:8]) / 2**32)
    return Strategy(settings=(("sparsity/0", values[0]), ("sparsity/1", values[1])))


class TellingSearch:
    """Asks strategies drawn from a digest of everything that its round may depend on."""

    round_size = ROUND_SIZE

    def __init__(self, *, repeat: bool = False, last: int = 10**6) -> None:
        self.told: list[list[tuple[Ask, Outcome]]] = []
        self.num_asks = 0
        self._repeat = repeat
        self._last = last

    def ask(self, round: int) -> list[Ask]:
        assert len(self.told) >= round - 1, "results of rounds <= k - 2 are told"
        self.num_asks += 1
        known = [[_result(o) for _, o in results] for results in self.told[: max(0, round - 1)]]
        seeds = [f"{round} {position} {known}" for position in range(ROUND_SIZE)]
        if self._repeat and round:
            seeds[0] = seeds[1]
        strategies = [strategy_of(seed) for seed in seeds]
        if self._repeat and round > 1:
            strategies[3] = self.told[round - 2][0][0].strategy
        asks = [
            Ask(round=round, position=position, strategy=strategy, derivatives=position == 0)
            for position, strategy in enumerate(strategies)
        ]
        return asks if round < self._last else []

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        assert round == len(self.told), "rounds are told in order, each once"
        assert [ask.position for ask, _ in results] == sorted(ask.position for ask, _ in results)
        assert all(outcome.strategy_key == ask.strategy.key for ask, outcome in results)
        self.told.append(list(results))


def _result(outcome: Outcome) -> float | str:
    return outcome.kl if isinstance(outcome, Evaluation) else outcome.message


class Bowl:
    """A synthetic objective: the KL of a strategy is its squared distance from (0.3, 0.7)."""

    def evaluate(
        self, strategy: Strategy, *, tokens: int | None = None, derivatives: bool = False
    ) -> Evaluation:
        x, y = strategy.values
        if 0.4 < x < 0.5:
            raise RuntimeError(f"no memory\nfor {strategy.key[:6]}")
        return Evaluation(
            strategy_key=strategy.key,
            kl=(x - 0.3) ** 2 + (y - 0.7) ** 2,
            kept_fraction=1 - (x + y) / 2,
            gradient=(2 * (x - 0.3), 2 * (y - 0.7)) if derivatives else None,
            tokens=64,
            text_digest="t",
            cost_units=3.0 if derivatives else 1.0,
            wall_s=0.001,
        )


class ThreadPool:
    """Evaluates in threads; ``delay_s`` gives each ask its own duration, to vary the order."""

    def __init__(self, num_workers: int, delay_s: Callable[[Ask], float] = lambda ask: 0.0) -> None:
        self.max_pending = num_workers + 1
        self.submitted: list[Ask] = []
        self.finished: list[Ask] = []
        self.most_pending = 0
        self._delay_s = delay_s
        self._done: queue.SimpleQueue[tuple[Ask, Outcome]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers)

    def submit(self, ask: Ask) -> None:
        self.submitted.append(ask)
        self.most_pending = max(self.most_pending, len(self.submitted) - len(self.finished))
        self._threads.submit(self._evaluate, ask)

    def next_outcome(self) -> tuple[Ask, Outcome]:
        return self._done.get()

    def _evaluate(self, ask: Ask) -> None:
        time.sleep(self._delay_s(ask))
        outcome = outcome_of(Bowl(), ask)
        self.finished.append(ask)
        self._done.put((ask, outcome))


def shuffled(ask: Ask) -> float:
    return int(ask.strategy.key[:4], 16) / 2**16 * 0.02


def ignore(progress: Progress) -> None:
    pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EvaluationStore]:
    with EvaluationStore.open(tmp_path / "evaluations.db", create=True) as store:
        store.acquire_lease("test")
        yield store


def test_every_strategy_is_asked_evaluated_recorded_and_told_in_ask_order(
    store: EvaluationStore,
) -> None:
    search = TellingSearch()
    pool = ThreadPool(3, shuffled)
    drive(search, pool, store, num_evaluations=18, on_progress=ignore)
    recorded = list(store.read())
    assert [ask for ask, _ in recorded] == store.asks()
    assert [(a.round, a.position) for a in store.asks()] == [divmod(n, 4) for n in range(18)]
    assert [result for results in search.told for result in results] == recorded
    assert sorted(map(_key, pool.submitted)) == sorted(map(_key, store.asks()))
    assert pool.finished != pool.submitted, "the finish order did vary"


def obvious_asks(num_rounds: int) -> list[Ask]:
    """Ask one round after the other, with no more told than each may know."""
    search = TellingSearch()
    rounds: list[list[Ask]] = []
    for round_ in range(num_rounds):
        if round_ >= 2:
            results = [(ask, outcome_of(Bowl(), ask)) for ask in rounds[round_ - 2]]
            search.tell(round_ - 2, results)
        rounds.append(search.ask(round_))
    return [ask for asks in rounds for ask in asks]


def _key(ask: Ask) -> str:
    return ask.strategy.key


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("delay_s", [lambda ask: 0.0, shuffled])
def test_the_same_strategies_are_asked_whatever_the_workers_and_the_finish_order(
    store: EvaluationStore, num_workers: int, delay_s: Callable[[Ask], float]
) -> None:
    drive(
        TellingSearch(),
        ThreadPool(num_workers, delay_s),
        store,
        num_evaluations=24,
        on_progress=ignore,
    )
    assert store.asks() == obvious_asks(6)


def test_nothing_is_told_before_it_is_committed(store: EvaluationStore) -> None:
    class Checking(TellingSearch):
        def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
            recorded = list(store.read())
            assert all(result in recorded for result in results)
            super().tell(round, results)

    search = Checking()
    drive(search, ThreadPool(2, shuffled), store, num_evaluations=12, on_progress=ignore)
    assert len(search.told) == 3


def test_nothing_is_submitted_before_its_round_is_committed(store: EvaluationStore) -> None:
    class Checking(ThreadPool):
        def submit(self, ask: Ask) -> None:
            assert ask in store.asks()
            super().submit(ask)

    drive(TellingSearch(), Checking(2), store, num_evaluations=12, on_progress=ignore)


def test_rounds_overlap_and_never_run_further_ahead(store: EvaluationStore) -> None:
    first = TellingSearch().ask(0)[0]

    def until_others_are_done(ask: Ask) -> float:
        deadline = time.monotonic() + 30
        while ask == first and len(pool.finished) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        return 0.0

    pool = ThreadPool(4, until_others_are_done)
    drive(TellingSearch(), pool, store, num_evaluations=16, on_progress=ignore)
    order = pool.finished
    assert {a.round for a in order[: order.index(first)]} == {0, 1}, "round 1 ran beside round 0"
    assert len(order[: order.index(first)]) == 7, "and no part of it waited"


def test_a_slow_ask_holds_up_neither_results_nor_submissions(store: EvaluationStore) -> None:
    class Slow(TellingSearch):
        asking = -1

        def ask(self, round: int) -> list[Ask]:
            self.asking = round
            assert round != 1 or recorded.wait(30)
            self.asking = -1
            return super().ask(round)

    search, recorded = Slow(), threading.Event()
    seen: list[tuple[int, int]] = []

    def see(progress: Progress) -> None:
        seen.append((search.asking, progress.done))
        if progress.done == 4:
            recorded.set()

    drive(search, ThreadPool(1), store, num_evaluations=8, on_progress=see)
    assert (1, 4) in seen, "round 0 was submitted, done and recorded while round 1 was being asked"


def test_pending_work_is_bounded(store: EvaluationStore) -> None:
    pool = ThreadPool(2, shuffled)
    drive(TellingSearch(), pool, store, num_evaluations=20, on_progress=ignore)
    assert pool.most_pending <= pool.max_pending


def test_a_failed_evaluation_is_recorded_and_told_and_the_run_goes_on(
    store: EvaluationStore,
) -> None:
    search = TellingSearch()
    details: list[Progress] = []
    drive(search, ThreadPool(2), store, num_evaluations=32, on_progress=details.append)
    failed = [o for _, o in store.read() if isinstance(o, FailedEvaluation)]
    assert failed
    assert all(o.kind == "RuntimeError" and o.message.startswith("no memory for ") for o in failed)
    told = [outcome for results in search.told for _, outcome in results]
    assert failed == [outcome for outcome in told if isinstance(outcome, FailedEvaluation)]
    assert details[-1].detail == f"round 8, {len(failed)} failed"


def test_progress_counts_what_is_recorded(store: EvaluationStore) -> None:
    seen: list[Progress] = []
    drive(TellingSearch(), ThreadPool(2), store, num_evaluations=10, on_progress=seen.append)
    assert [p.done for p in seen] == sorted({p.done for p in seen})
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (0, 10, 10)
    assert {p.stage for p in seen} == {"evaluate"}


def test_a_finished_run_does_nothing_but_tell(store: EvaluationStore) -> None:
    drive(TellingSearch(), ThreadPool(2), store, num_evaluations=10, on_progress=ignore)
    search, pool = TellingSearch(), ThreadPool(2)
    drive(search, pool, store, num_evaluations=10, on_progress=ignore)
    assert search.num_asks == 0
    assert pool.submitted == []
    assert [result for results in search.told for result in results] == list(store.read())


@pytest.mark.parametrize("first", [1, 3, 4, 5, 8, 10, 14])
def test_extending_a_run_asks_what_the_larger_run_would_have_asked(
    store: EvaluationStore, tmp_path: Path, first: int
) -> None:
    drive(TellingSearch(), ThreadPool(2), store, num_evaluations=first, on_progress=ignore)
    pool = ThreadPool(2)
    drive(TellingSearch(), pool, store, num_evaluations=22, on_progress=ignore)
    assert len(pool.submitted) == 22 - first
    with EvaluationStore.open(tmp_path / "whole.db", create=True) as whole:
        drive(TellingSearch(), ThreadPool(3), whole, num_evaluations=22, on_progress=ignore)
        assert store.asks() == whole.asks()


def test_a_short_round_that_can_not_be_asked_again_stays_short(store: EvaluationStore) -> None:
    class Other(TellingSearch):
        def ask(self, round: int) -> list[Ask]:
            asks = super().ask(round)
            return asks[::-1] if round == 1 else asks

    drive(TellingSearch(), ThreadPool(2), store, num_evaluations=6, on_progress=ignore)
    drive(Other(), ThreadPool(2), store, num_evaluations=14, on_progress=ignore)
    assert [ask.round for ask in store.asks()] == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 4
    assert len(list(store.read())) == 14


def test_a_strategy_that_is_asked_again_is_neither_evaluated_nor_counted_again(
    store: EvaluationStore,
) -> None:
    pool = ThreadPool(2)
    drive(TellingSearch(repeat=True), pool, store, num_evaluations=13, on_progress=ignore)
    assert len({_key(ask) for ask in pool.submitted}) == len(pool.submitted) == 13
    assert len(store.asks()) == len(list(store.read())) == 13
    again = TellingSearch(repeat=True)
    drive(again, ThreadPool(2), store, num_evaluations=13, on_progress=ignore)
    assert again.num_asks == 0


def test_a_search_with_nothing_new_to_ask_ends_the_run(store: EvaluationStore) -> None:
    drive(TellingSearch(last=3), ThreadPool(2), store, num_evaluations=100, on_progress=ignore)
    assert len(list(store.read())) == 12
    drive(TellingSearch(last=3), ThreadPool(2), store, num_evaluations=100, on_progress=ignore)
    assert len(list(store.read())) == 12


@pytest.mark.parametrize("where", ["ask", "tell", "submit", "next_outcome", "append"])
def test_what_breaks_reaches_the_caller_and_the_run_can_be_continued(
    store: EvaluationStore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    search, pool = TellingSearch(), ThreadPool(2)
    owner = {"ask": search, "tell": search, "append": store}.get(where, pool)
    method = getattr(owner, where)
    calls = iter(range(100))

    def breaking(*args: object) -> object:
        if next(calls) == 2:
            raise SurrogateError("broken")
        return method(*args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, where, breaking)
        with pytest.raises(SurrogateError, match="broken"):
            drive(search, pool, store, num_evaluations=24, on_progress=ignore)
    done = {outcome.strategy_key for _, outcome in store.read()}
    pool = ThreadPool(2)
    drive(TellingSearch(), pool, store, num_evaluations=24, on_progress=ignore)
    assert len(list(store.read())) == 24
    assert not done & {_key(ask) for ask in pool.submitted}


def test_an_interrupt_leaves_a_run_that_can_be_continued(store: EvaluationStore) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done >= 5:
            raise KeyboardInterrupt

    before = threading.active_count()
    pool = ThreadPool(2, shuffled)
    with pytest.raises(KeyboardInterrupt):
        drive(TellingSearch(), pool, store, num_evaluations=24, on_progress=interrupt)
    done = {outcome.strategy_key for _, outcome in store.read()}
    assert 5 <= len(done) < 24
    pool = ThreadPool(2)
    drive(TellingSearch(), pool, store, num_evaluations=24, on_progress=ignore)
    assert len(pool.submitted) == 24 - len(done)
    assert before


def test_a_driver_that_lost_its_lease_stops(store: EvaluationStore, tmp_path: Path) -> None:
    def lose(progress: Progress) -> None:
        if progress.done >= 4:
            with sqlite3.connect(tmp_path / "evaluations.db") as connection:
                connection.execute("UPDATE lease SET token = token + 1, owner = 'other'")
            connection.close()

    with pytest.raises(StorageError, match="taken over by other"):
        drive(TellingSearch(), ThreadPool(1), store, num_evaluations=24, on_progress=lose)


def run_driver(path: Path, num_evaluations: int, held_at: int) -> subprocess.Popen[bytes]:
    root = Path(unicuco.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, __file__, str(path), str(num_evaluations), str(held_at)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_killed_driver_s_run_continues_with_nothing_lost_and_nothing_repeated(
    tmp_path: Path,
) -> None:
    path = tmp_path / "evaluations.db"
    kept: dict[str, tuple[object, ...]] = {}
    for least in (3, 11):
        driver = run_driver(path, 40, held_at=least + 5)
        wait_for_rows(path, least)
        driver.kill()
        driver.wait(30)
        rows = read_rows(path)
        assert least <= len(rows) < 40
        assert rows | kept == rows, "what was recorded stayed as it was"
        kept = rows
    assert run_driver(path, 40, held_at=40).wait(60) == 0
    rows = read_rows(path)
    assert len(rows) == 40
    assert rows | kept == rows
    with EvaluationStore.open(path, create=False) as store:
        assert store.asks() == [ask for ask, _ in store.read()]
        with EvaluationStore.open(tmp_path / "whole.db", create=True) as whole:
            drive(TellingSearch(), ThreadPool(3), whole, num_evaluations=40, on_progress=ignore)
            assert store.asks() == whole.asks()


def read_rows(path: Path) -> dict[str, tuple[object, ...]]:
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT strategy_key, kl, finished_at FROM evaluations").fetchall()
    connection.close()
    return {row[0]: row for row in rows}


def wait_for_rows(path: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if len(read_rows(path)) >= number:
                return
        except sqlite3.OperationalError:  # the driver has not made the table yet
            pass
        time.sleep(0.01)
    raise AssertionError("the driver recorded nothing")


def main(path: str, num_evaluations: str, held_at: str) -> None:
    def delay_s(ask: Ask) -> float:
        """However late it is that somebody kills this, it is not done before."""
        return 0.05 if len(pool.finished) + num_before < int(held_at) else 600.0

    with EvaluationStore.open(path, create=True) as store:
        store.acquire_lease("driver")
        num_before = len(list(store.read()))
        pool = ThreadPool(2, delay_s)
        drive(
            TellingSearch(), pool, store, num_evaluations=int(num_evaluations), on_progress=ignore
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
