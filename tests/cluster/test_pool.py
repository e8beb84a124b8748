"""The pool's book-keeping on replicas that need no Ray: who is asked, and who is blamed."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError

from cluster.pool import RayPool
from tests.cluster.synthetic import make_ask
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

    def __init__(self, deadly: set[str], log: list[list[str]], *, mute: bool) -> None:
        self._deadly = deadly
        self._log = log
        self._mute = mute
        self.held: dict[str, Reference] = {}

    def start(self) -> Reference:
        started = Reference()
        started.future().set_result(None)
        return started

    def evaluate(self, ask: Ask) -> Reference:
        self.held[ask.strategy.key] = reference = Reference()
        self._log.append(sorted(self.held))
        if not self._mute or len(self.held) == self.capacity or len(self._log) > self.capacity:
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
    pool = RayPool(lambda: FakePipeline({deadly}, log, mute=True), 1)
    for ask in asks:
        pool.submit(ask)
    outcomes = dict(pool.next_outcome() for _ in asks)
    assert list(outcomes) == [asks[0], asks[1], *asks[2:]]
    assert outcomes.pop(asks[1]) == FailedEvaluation(
        strategy_key=deadly, kind="ReplicaDied", message="3 replicas died while evaluating it"
    )
    assert all(isinstance(outcome, Evaluation) for outcome in outcomes.values())
    first = sorted(ask.strategy.key for ask in asks[:3])
    assert log[2] == first, "three at a time"
    assert [held for held in log[3:] if deadly in held] == [[deadly], [deadly]], "then alone"


def test_asks_go_to_the_emptiest_replica_and_the_pool_says_how_many_it_takes() -> None:
    log: list[list[str]] = []
    pool = RayPool(lambda: FakePipeline(set(), log, mute=True), 2)
    assert pool.max_pending == 8
    for k in range(1, 5):
        pool.submit(make_ask(bytes([k] * 8), position=k))
    for member in pool._members:
        member.is_ready = True
    pool._dispatch()
    assert [len(member.asks) for member in pool._members] == [2, 2]
