"""Actors that die while a run goes on: nothing is lost, nothing is done twice in the record."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from cluster.driver import RayBackend
from cluster.learner import RaySearch, start_learner
from cluster.pulse import Pulse
from tests.cluster.synthetic import (
    ARRAYS,
    Bowl,
    BowlConfig,
    DigestSearch,
    DyingSearch,
    HangingSearch,
)
from tests.cluster.test_driver import local_asks
from tests.serve.conftest import wait_until
from unicuco.search.drive import Progress, drive
from unicuco.store import EvaluationStore
from unicuco.types import Evaluation, FailedEvaluation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EvaluationStore]:
    with EvaluationStore.open(tmp_path / "evaluations.db", create=True) as store:
        yield store


def ignore(progress: Progress) -> None:
    pass


def replica_of(outcome: Evaluation | FailedEvaluation) -> int | None:
    if isinstance(outcome, FailedEvaluation):
        return None
    return int(outcome.text_digest.rpartition("pid=")[2])


def test_a_killed_replica_is_replaced_and_its_strategy_evaluated_again(
    store: EvaluationStore,
) -> None:
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        seen = {replica_of(outcome) for _, outcome in store.read()} - {None, *killed}
        if progress.done >= 6 * (1 + len(killed)) and len(killed) < 2 and seen:
            (pid, *_) = sorted(filter(None, seen))
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    with RayBackend("local", 2, build_evaluator=Bowl, build_search=DigestSearch) as backend:
        search, pool = backend.start(BowlConfig(seconds=0.1), ARRAYS, 4)
        drive(search, pool, store, num_evaluations=32, on_progress=kill_one)
    assert len(killed) == 2
    recorded = list(store.read())
    assert [ask for ask, _ in recorded] == local_asks(8, 4)
    kinds = {outcome.kind for _, outcome in recorded if isinstance(outcome, FailedEvaluation)}
    assert kinds <= {"RuntimeError"}, "a strategy that was there by chance is not blamed"


def test_a_replica_that_hangs_is_helped_out_and_replaced(store: EvaluationStore) -> None:
    hung: list[int] = []

    def stop_one(progress: Progress) -> None:
        seen = {replica_of(outcome) for _, outcome in store.read()} - {None}
        if not hung and progress.done >= 6 and seen:
            (pid, *_) = sorted(filter(None, seen))
            hung.append(pid)
            os.kill(pid, signal.SIGSTOP)
        elif progress.done == 28:  # more than was out when it was stopped: its strategy is judged
            assert psutil.pid_exists(hung[0])
            assert wait_until(lambda: not psutil.pid_exists(hung[0]), 120), "it is given up"

    with RayBackend("local", 2, build_evaluator=Bowl, build_search=DigestSearch) as backend:
        search, pool = backend.start(BowlConfig(seconds=0.1), ARRAYS, 4)
        drive(search, pool, store, num_evaluations=32, on_progress=stop_one)
        assert len(pool.replicas) == 2
    recorded = list(store.read())
    assert [ask for ask, _ in recorded] == local_asks(8, 4)
    kinds = {outcome.kind for _, outcome in recorded if isinstance(outcome, FailedEvaluation)}
    assert kinds <= {"RuntimeError"}


def test_a_strategy_that_kills_its_replica_once_is_evaluated(
    store: EvaluationStore, tmp_path: Path
) -> None:
    victim = local_asks(1, 4)[2].strategy.key
    config = BowlConfig(die_at=victim, once_file=str(tmp_path / "died"))
    with RayBackend("local", 2, build_evaluator=Bowl, build_search=DigestSearch) as backend:
        search, pool = backend.start(config, ARRAYS, 4)
        drive(search, pool, store, num_evaluations=12, on_progress=ignore)
    assert (tmp_path / "died").exists()
    outcomes = {ask.strategy.key: outcome for ask, outcome in store.read()}
    assert len(outcomes) == 12
    assert getattr(outcomes[victim], "kind", None) != "ReplicaDied"


def test_a_strategy_that_kills_every_replica_is_a_recorded_failure(store: EvaluationStore) -> None:
    victim = local_asks(1, 4)[1].strategy.key
    with RayBackend("local", 2, build_evaluator=Bowl, build_search=DigestSearch) as backend:
        search, pool = backend.start(BowlConfig(die_at=victim), ARRAYS, 4)
        drive(search, pool, store, num_evaluations=12, on_progress=ignore)
    outcomes = {ask.strategy.key: outcome for ask, outcome in store.read()}
    assert len(outcomes) == 12
    assert outcomes.pop(victim) == FailedEvaluation(
        strategy_key=victim,
        kind="ReplicaDied",
        message="3 replicas died or hung while evaluating it",
    )
    assert "ReplicaDied" not in {getattr(outcome, "kind", None) for outcome in outcomes.values()}


def test_a_learner_that_dies_goes_on_as_if_it_had_not(
    store: EvaluationStore, tmp_path: Path
) -> None:
    with RayBackend("local", 1, build_evaluator=Bowl, build_search=DyingSearch) as backend:
        search, pool = backend.start(BowlConfig(), ARRAYS, (4, str(tmp_path / "died")))
        drive(search, pool, store, num_evaluations=24, on_progress=ignore)
    assert (tmp_path / "died").exists()
    assert store.asks() == local_asks(6, 4)


def test_a_learner_that_hangs_is_rebuilt_and_one_that_is_slow_is_not(
    store: EvaluationStore, tmp_path: Path
) -> None:
    log = tmp_path / "asked"
    start = partial(start_learner, HangingSearch, (4, str(log), 10.0))
    with RayBackend("local", 1, build_evaluator=Bowl) as backend:
        pool = backend.start_pool(BowlConfig(), ARRAYS)
        search = RaySearch(start, pulse=Pulse(8.0))
        drive(search, pool, store, num_evaluations=24, on_progress=ignore)
        search.close()
    asked = [line.split() for line in log.read_text().splitlines()]
    assert [int(number) for number, _ in asked] == [0, 1, 2, 3, 3, 4, 4, 5]
    pids = [int(pid) for _, pid in asked]
    assert pids[:4] == [pids[0]] * 4, "one that is slow is waited for"
    assert len(set(pids)) == 3
    assert wait_until(lambda: not any(map(psutil.pid_exists, pids)), 60), "none is left behind"
    assert store.asks() == local_asks(6, 4)
