"""The pool's book-keeping on replicas that need no Ray: who is asked, and who is blamed."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import closing
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.pool import RayPool
from tests.cluster.synthetic import make_ask
from tests.serve.conftest import wait_until
from unicuco.errors import ClusterError
from unicuco.types import Ask, Evaluation, FailedEvaluation


class Reference:
    """What stands for a reference of Ray's."""

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._future


class FakePipeline:
    """Holds three asks; one whose key is in ``deadly`` kills it together with all it holds."""

    capacity = 3
    ahead = 0

    def __init__(self, deadly: set[str], log: list[list[str]], *, mute: bool) -> None:
        self._deadly = deadly
        self._log = log
        self._mute = mute
        self.stuck = False
        self.held: dict[str, Reference] = {}

    def start(self) -> Reference:
        started = Reference()
        started.future().set_result(None)
        return started

    def evaluate(self, ask: Ask) -> Reference:
        self.held[ask.strategy.key] = reference = Reference()
        self._log.append(sorted(self.held))
        is_full = len(self.held) == self.capacity or len(self._log) > self.capacity
        if not self.stuck and (is_full or not self._mute):
            self.work()
        return reference

    def work(self) -> None:
        doomed = self._deadly & self.held.keys()
        for key, reference in list(self.held.items()):
            if doomed:
                lost = RayTaskError("forward", "", ActorDiedError())
                reference.future().set_exception(lost)
            else:
                reference.future().set_result(evaluation(key))
        self.held.clear()

    def kill(self) -> None:
        self.held.clear()


def evaluation(key: str) -> Evaluation:
    return Evaluation(
        strategy_key=key,
        kl=0.1,
        kept_fraction=0.5,
        gradient=None,
        tokens=8,
        text_digest="",
        cost_units=1.0,
        wall_s=0.0,
    )


def test_what_was_in_flight_with_a_deadly_strategy_is_not_blamed() -> None:
    asks = [make_ask(bytes([k] * 8), position=k) for k in range(1, 6)]
    deadly = asks[1].strategy.key
    log: list[list[str]] = []
    with closing(RayPool(lambda: FakePipeline({deadly}, log, mute=True), 1)) as pool:
        for ask in asks:
            pool.submit(ask)
        outcomes = dict(pool.next_outcome() for _ in asks)
    assert list(outcomes) == [asks[0], asks[1], *asks[2:]]
    assert outcomes.pop(asks[1]) == FailedEvaluation(
        strategy_key=deadly,
        kind="ReplicaDied",
        message="3 replicas died or hung while evaluating it",
    )
    assert all(isinstance(outcome, Evaluation) for outcome in outcomes.values())
    first = sorted(ask.strategy.key for ask in asks[:3])
    assert log[2] == first, "three at a time"
    assert [held for held in log[3:] if deadly in held] == [[deadly], [deadly]], "then alone"


def test_asks_go_to_the_emptiest_replica_and_the_pool_says_how_many_it_takes() -> None:
    pipelines: list[FakePipeline] = []

    def start() -> FakePipeline:
        pipelines.append(FakePipeline(set(), [], mute=True))
        return pipelines[-1]

    with closing(RayPool(start, 2)) as pool:
        assert pool.max_pending == 8
        for k in range(1, 5):
            pool.submit(make_ask(bytes([k] * 8), position=k))
        assert wait_until(lambda: sum(len(pipeline.held) for pipeline in pipelines) == 4, 60)
        assert [len(pipeline.held) for pipeline in pipelines] == [2, 2]


class FakeActor(FakePipeline):
    """Works on one ask at a time and keeps another."""

    capacity = 1
    ahead = 1

    def work(self) -> None:
        key = next(iter(self.held))
        self.held.pop(key).future().set_result(evaluation(key))


def test_an_actor_is_sent_one_ask_ahead_while_as_many_wait_as_there_are_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.lateness._LEAST_LATE_S", 300.0)  # nobody helps anybody out here
    actors: list[FakeActor] = []

    def start() -> FakeActor:
        actors.append(FakeActor(set(), [], mute=True))
        actors[-1].stuck = True
        return actors[-1]

    asks = [make_ask(bytes([k] * 8), position=k) for k in range(1, 7)]
    keys = [ask.strategy.key for ask in asks]
    with closing(RayPool(start, 2)) as pool:
        assert pool.max_pending == 6
        for ask in asks[:3]:
            pool.submit(ask)
        assert wait_until(lambda: all(actor.held for actor in actors), 60)
        assert [len(actor.held) for actor in actors] == [1, 1], "whoever is first takes the third"
        for ask in asks[3:]:
            pool.submit(ask)
        assert wait_until(
            lambda: (
                [list(actor.held) for actor in actors] == [[keys[0], keys[2]], [keys[1], keys[3]]]
            ),
            60,
        )
        actors[0].work()
        assert pool.next_outcome()[0] == asks[0]
        assert wait_until(lambda: list(actors[0].held) == [keys[2], keys[4]], 60)
        actors[0].work()
        assert pool.next_outcome()[0] == asks[2]
        actors[0].work()
        assert pool.next_outcome()[0] == asks[4]
        assert wait_until(lambda: list(actors[0].held) == [keys[5]], 60)


def test_the_first_of_two_answers_counts_and_the_second_is_dropped() -> None:
    pipelines: list[FakePipeline] = []

    def start() -> FakePipeline:
        pipelines.append(FakePipeline(set(), [], mute=False))
        return pipelines[-1]

    asks = [make_ask(bytes([k] * 8), position=k) for k in range(1, 4)]
    with closing(RayPool(start, 2)) as pool:
        pool.submit(asks[0])
        assert pool.next_outcome()[0] == asks[0]  # so it is known how long that takes
        for pipeline in pipelines:
            pipeline.stuck = True
        pool.submit(asks[1])
        assert wait_until(lambda: all(pipeline.held for pipeline in pipelines), 60), "both have it"
        for pipeline in pipelines:
            pipeline.stuck = False
            pipeline.work()
        assert pool.next_outcome()[0] == asks[1]
        pool.submit(asks[2])
        assert pool.next_outcome()[0] == asks[2]
        pool.close()
        with pytest.raises(ClusterError, match="was closed"):  # and nothing else is left
            pool.next_outcome()


def test_a_replica_without_work_is_given_back_and_comes_again_when_there_is_some() -> None:
    log: list[list[str]] = []
    started: list[FakePipeline] = []

    def start() -> FakePipeline:
        started.append(FakePipeline(set(), log, mute=False))
        return started[-1]

    asks = [make_ask(bytes([k] * 8), position=k) for k in range(1, 31)]
    with closing(RayPool(start, 3, gives_back=True, least_idle_s=0.5)) as pool:
        pool.submit(asks.pop())
        pool.next_outcome()
        assert wait_until(lambda: len(pool.replicas) == 1, 60)
        started[0].stuck = True
        for ask in asks:
            pool.submit(ask)
        assert wait_until(lambda: len(started) == 5, 60), "three were there, two came again"
        started[0].work()
        assert {pool.next_outcome()[0] for _ in asks} == set(asks)
