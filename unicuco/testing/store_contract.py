"""What every database must do for a run: subclass `StoreContract`, give it a `location` fixture."""

# ruff: noqa: D102 - a test's name is its sentence of behaviour

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
from sqlalchemy import select, update

from unicuco.errors import StorageError
from unicuco.store import EvaluationStore, Measurement
from unicuco.store.schema import EVALUATIONS, LEASE
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome, Strategy, TaskValue

DIGEST = "d" * 64


def make_ask(round_: int, position: int, value: float = 0.5) -> Ask:
    """Return an ask of two axes, named out of alphabetical order; equal arguments, equal ask."""
    settings = (("sparsity/z", value), ("sparsity/a", (16 * round_ + position + 1) / 1024))
    strategy = Strategy(settings=settings)
    return Ask(round=round_, position=position, strategy=strategy, derivatives=position % 2 == 0)


def make_outcome(ask: Ask, kl: float = 1 / 3) -> Evaluation:
    """Return a successful outcome of ``ask`` with numbers that no short decimal holds."""
    return Evaluation(
        strategy_key=ask.strategy.key,
        kl=kl,
        kept_fraction=2 / 3,
        gradient=(math.pi, -5e-324) if ask.derivatives else None,
        tokens=3072,
        text_digest=DIGEST,
        cost_units=3.0 if ask.derivatives else 1.0,
        wall_s=0.1,
    )


def _task_values(names: tuple[str, ...], derivatives: bool) -> tuple[TaskValue, ...]:
    return tuple(
        TaskValue(task=name, kl=k + 1 / 3, gradient=(math.pi, -k / 7) if derivatives else None)
        for k, name in enumerate(names)
    )


_HOLD_LEASE = """
import sys, time
from unicuco.store import EvaluationStore
store = EvaluationStore.open(sys.argv[1], create=True)
store.acquire_lease("other driver")
print("held", flush=True)
time.sleep(600)
"""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _write_for_ever(store: EvaluationStore, number: int) -> None:
    # A function of its own: Python 3.11 lets an interrupt at the end of a loop past the `try`
    # around that loop, but not past one around the call.
    while True:
        store.set_meta("number", number)


class StoreContract:
    """Tests of `EvaluationStore` against one kind of database."""

    @pytest.fixture
    def location(self, tmp_path: Path) -> str | Path:
        """Return the path or URL of a database that holds nothing yet."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, location: str | Path) -> Iterator[EvaluationStore]:
        """Yield an empty store at ``location``."""
        with EvaluationStore.open(location, create=True) as store:
            yield store

    def test_asks_come_back_equal_by_round_and_position(self, store: EvaluationStore) -> None:
        asks = [make_ask(1, 0), make_ask(0, 1), make_ask(0, 0)]
        store.record_asks(asks)
        assert store.asks() == sorted(asks, key=lambda ask: (ask.round, ask.position))

    def test_outcomes_come_back_bit_equal_in_ask_order(self, store: EvaluationStore) -> None:
        asks = [make_ask(0, position) for position in range(4)]
        failed = FailedEvaluation(
            strategy_key=asks[1].strategy.key, kind="RuntimeError", message="a: b", wall_s=0.25
        )
        results: list[tuple[Ask, Outcome]] = [
            (asks[3], make_outcome(asks[3])),
            (asks[1], failed),
            (asks[0], make_outcome(asks[0])),
        ]
        store.record_asks(asks)
        store.append(results)
        assert list(store.read()) == [results[2], results[1], results[0]]

    def test_values_of_several_tasks_come_back_in_task_order(self, store: EvaluationStore) -> None:
        asks = [make_ask(0, 0), make_ask(0, 1)]
        names = ("z", "a")
        results: list[tuple[Ask, Outcome]] = [
            (ask, replace(make_outcome(ask), tasks=_task_values(names, ask.derivatives)))
            for ask in asks
        ]
        store.record_asks(asks)
        store.append(results)
        store.append(results)
        assert list(store.read()) == results

    def test_a_second_outcome_of_a_strategy_changes_nothing(self, store: EvaluationStore) -> None:
        ask = make_ask(0, 0)
        store.record_asks([ask, ask])
        store.append([(ask, make_outcome(ask, 0.5))])
        store.append([(ask, make_outcome(ask, 0.25)), (ask, make_outcome(ask, 0.125))])
        store.record_asks([ask])
        assert store.asks() == [ask]
        assert list(store.read()) == [(ask, make_outcome(ask, 0.5))]

    def test_whole_numbers_and_fractions_keep_their_kind(self, store: EvaluationStore) -> None:
        asks = [make_ask(0, 0, value=0), make_ask(0, 1, value=0.0)]
        store.record_asks(asks)
        assert [ask.strategy.key for ask in store.asks()] == [ask.strategy.key for ask in asks]

    def test_cheaper_fidelities_have_records_and_a_table_of_their_own(
        self, store: EvaluationStore
    ) -> None:
        whole = make_ask(2, 0)
        cheap = [replace(whole, round=k, tokens=64 * (k + 1)) for k in range(2)]
        store.record_asks([whole, *cheap])
        results: list[tuple[Ask, Outcome]] = [
            (ask, make_outcome(ask, 0.1 * ask.round)) for ask in (*cheap, whole)
        ]
        store.append(results)
        store.append([(cheap[0], make_outcome(cheap[0], 9.0))])
        assert store.asks() == [*cheap, whole]
        assert list(store.read()) == results
        count = store._database.run(lambda c: c.execute(select(EVALUATIONS.c.kl)).all())
        assert count == [(0.2,)], "those on the whole text are what `evaluations` holds"

    def test_an_outcome_of_another_strategy_is_refused(self, store: EvaluationStore) -> None:
        with pytest.raises(ValueError, match="given for"):
            store.append([(make_ask(0, 0), make_outcome(make_ask(0, 1)))])

    def test_measurements_are_recorded_once(self, store: EvaluationStore) -> None:
        dense = Measurement(
            purpose="dense", tokens=3072, cost_units=1.0, seconds=0.5, text_digest=DIGEST
        )
        check = Measurement(
            purpose="validation",
            strategy_key="k" * 64,
            kl=0.1,
            tokens=9216,
            cost_units=3.0,
            seconds=1.5,
            text_digest=DIGEST,
        )
        store.record_measurements([dense, check])
        store.record_measurements([dense])
        store.record_measurements([])
        assert store.measurements() == [dense, check]
        assert store.measurements("validation") == [check]

    def test_meta_holds_json_and_replaces_it(self, store: EvaluationStore) -> None:
        assert store.get_meta("options") is None
        store.set_meta("options", {"seed": 1})
        store.set_meta("options", {"seed": 2, "texts": ["a", None, 0.1]})
        assert store.get_meta("options") == {"seed": 2, "texts": ["a", None, 0.1]}

    def test_all_is_there_when_opened_again(
        self, store: EvaluationStore, location: str | Path
    ) -> None:
        ask = make_ask(0, 0)
        store.record_asks([ask])
        store.append([(ask, make_outcome(ask))])
        store.close()
        with EvaluationStore.open(location, create=False) as again:
            assert again.asks() == [ask]
            assert list(again.read()) == [(ask, make_outcome(ask))]

    def test_a_copy_holds_all_that_is_recorded_and_nobodys_lease(
        self, store: EvaluationStore, tmp_path: Path
    ) -> None:
        asks = [make_ask(0, position) for position in range(3)]
        store.acquire_lease("first")
        store.record_asks(asks)
        store.append([(ask, make_outcome(ask)) for ask in asks[:2]])
        store.set_meta("prepared", True)
        store.copy_to(tmp_path / "copy.db")
        assert [path.name for path in tmp_path.glob("copy.db*")] == ["copy.db"], "closed and whole"
        with EvaluationStore.open(tmp_path / "copy.db", create=False) as copy:
            copy.acquire_lease("second")
            assert list(copy.read()) == list(store.read())
            assert copy.asks() == store.asks()
            assert copy.get_meta("prepared") is True

    def test_a_reader_sees_rows_while_the_driver_writes(
        self, store: EvaluationStore, location: str | Path
    ) -> None:
        store.acquire_lease("driver")
        with EvaluationStore.open(location, create=False) as reader:
            for position in range(3):
                ask = make_ask(0, position)
                store.append([(ask, make_outcome(ask))])
                assert len(list(reader.read())) == position + 1

    def test_a_second_live_driver_gets_one_line_that_names_the_first(
        self, store: EvaluationStore, location: str | Path
    ) -> None:
        store.acquire_lease("first driver")
        with EvaluationStore.open(location, create=False) as second:
            with pytest.raises(StorageError, match="in use by first driver") as refused:
                second.acquire_lease("second driver")
            assert f"process {os.getpid()}" in str(refused.value)
            assert "\n" not in str(refused.value)
            with pytest.raises(StorageError, match="in use by first driver"):
                second.set_meta("a", 1)

    def test_a_released_lease_can_be_taken(
        self, store: EvaluationStore, location: str | Path
    ) -> None:
        store.acquire_lease("first driver")
        store.release_lease()
        with EvaluationStore.open(location, create=False) as second:
            second.acquire_lease("second driver")
            second.set_meta("a", 1)
            assert second.renew_lease()
        assert not store.renew_lease()

    def test_a_driver_whose_lease_was_taken_over_can_not_write(
        self, store: EvaluationStore, location: str | Path
    ) -> None:
        store.acquire_lease("slow driver")
        store._database.run(lambda c: c.execute(update(LEASE).values(expires_at=1.0)))
        with EvaluationStore.open(location, create=False) as second:
            second.acquire_lease("quick driver")
            with pytest.raises(StorageError, match="taken over by quick driver"):
                store.record_asks([make_ask(0, 0)])
            assert not store.renew_lease()
            store.release_lease()
            second.set_meta("a", 1)
            assert second.asks() == []

    def test_an_interrupt_within_a_transaction_leaves_nothing_locked(
        self, store: EvaluationStore, location: str | Path
    ) -> None:
        store.acquire_lease("driver")

        # By CPU time: the clock's own timer is what ends a test that takes too long.
        before = signal.signal(signal.SIGPROF, _interrupt)
        caught: list[BaseException] = []  # whose frames still hold what was open
        try:
            for number in range(40):
                signal.setitimer(signal.ITIMER_PROF, 0.001 + 0.0002 * number, 0.05)
                try:
                    _write_for_ever(store, number)
                except KeyboardInterrupt as interrupted:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    caught.append(interrupted)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        store.close()
        assert len(caught) == 40
        with EvaluationStore.open(location, create=False) as again:
            again.acquire_lease("next driver")
            assert again.get_meta("number") is not None

    def test_the_lease_of_a_killed_driver_is_taken_over_at_once(
        self, store: EvaluationStore, location: str | Path
    ) -> None:
        other = subprocess.Popen(
            [sys.executable, "-c", _HOLD_LEASE, str(location)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        with other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(StorageError, match="in use by other driver"):
                store.acquire_lease("driver")
            other.kill()
        store.acquire_lease("driver")
        assert store.renew_lease()
