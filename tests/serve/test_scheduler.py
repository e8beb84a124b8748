from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.scheduler import QueueFullError, Scheduler, Start, Stop, Switch, Ticket


def make(num_engines: int = 1, **changes: float) -> Scheduler:
    options = {"slots": 4, "max_queued": 100, "patience_s": 10.0, **changes}
    return Scheduler(num_engines=num_engines, **options)  # type: ignore[arg-type]


def ticket(number: int, variant: str = "a", arrived_s: float = 0.0, **changes: int) -> Ticket:
    return Ticket(number=number, variant=variant, arrived_s=arrived_s, **changes)  # type: ignore[arg-type]


def serving(scheduler: Scheduler, *variants: str) -> Scheduler:
    for number, variant in enumerate(variants):
        scheduler.warm(number, variant, "")
        scheduler.switched(number, variant, "", float(number))
    return scheduler


def test_the_first_request_starts_an_engine_and_then_runs() -> None:
    scheduler = make()
    scheduler.submit(ticket(1))
    assert scheduler.next(0.0) == [Switch(engine=0, variant="a", family="")]
    assert scheduler.next(1.0) == []
    scheduler.switched(0, "a", "", 60.0)
    assert scheduler.next(60.0) == [Start(ticket=ticket(1), engine=0)]
    assert (scheduler.num_queued, scheduler.num_running) == (0, 1)


def test_requests_of_one_variant_run_together_in_their_order_up_to_the_slots() -> None:
    scheduler = serving(make(slots=2), "a")
    for number in (1, 2, 3):
        scheduler.submit(ticket(number))
    assert [action.ticket.number for action in scheduler.next(0.0)] == [1, 2]  # type: ignore[union-attr]
    scheduler.finished(1, 1.0)
    assert [action.ticket.number for action in scheduler.next(1.0)] == [3]  # type: ignore[union-attr]


def test_a_request_larger_than_an_engine_runs_alone() -> None:
    scheduler = serving(make(slots=2), "a")
    scheduler.submit(ticket(1, size=5))
    scheduler.submit(ticket(2))
    assert [action.ticket.number for action in scheduler.next(0.0)] == [1]  # type: ignore[union-attr]
    assert scheduler.next(1.0) == []


def test_an_idle_engine_goes_to_another_variant_at_once() -> None:
    scheduler = serving(make(), "a")
    scheduler.submit(ticket(1, "b"))
    assert scheduler.next(0.0) == [Switch(engine=0, variant="b", family="")]
    assert scheduler.variant_of(0) is None


def test_the_engine_that_is_idle_for_longest_is_taken_and_a_running_one_before_a_start() -> None:
    scheduler = serving(make(3), "a", "b")
    scheduler.submit(ticket(1, "c"))
    assert scheduler.next(5.0) == [Switch(engine=0, variant="c", family="")]
    scheduler.submit(ticket(2, "d"))
    assert scheduler.next(5.0) == [Switch(engine=1, variant="d", family="")]
    scheduler.submit(ticket(3, "e"))
    assert scheduler.next(5.0) == [Switch(engine=2, variant="e", family="")]


def test_engines_with_nothing_to_do_stop_one_by_one_and_start_again_when_they_are_needed() -> None:
    scheduler = serving(make(3, min_engines=1, idle_stop_s=100.0), "a", "a", "a")
    assert scheduler.next(50.0) == []
    assert scheduler.wake_at_s(50.0) == 100.0  # engine 0 has been idle since it was started
    assert scheduler.next(100.0) == [Stop(engine=0)]
    scheduler.submit(ticket(1, size=4, arrived_s=100.5))
    assert scheduler.next(100.5) == [Start(ticket=ticket(1, size=4, arrived_s=100.5), engine=1)]
    # It can't start anew while it ends, so what is too much for the others waits for them.
    scheduler.submit(ticket(2, size=4, arrived_s=100.6))
    scheduler.submit(ticket(3, size=4, arrived_s=100.6))
    assert scheduler.next(100.6) == [Start(ticket=ticket(2, size=4, arrived_s=100.6), engine=2)]
    scheduler.stopped(0)
    assert scheduler.next(100.7) == [Switch(engine=0, variant="a", family="")]
    scheduler.switched(0, "a", "", 160.0)
    assert scheduler.next(160.0) == [Start(ticket=ticket(3, size=4, arrived_s=100.6), engine=0)]
    for number in (1, 2, 3):
        scheduler.finished(number, 160.0 + number)
    assert scheduler.wake_at_s(170.0) == 261.0
    assert scheduler.next(263.0) == [Stop(engine=1), Stop(engine=2)]
    assert scheduler.wake_at_s(264.0) is None  # one always runs


def test_an_engine_of_the_same_base_model_is_preferred() -> None:
    scheduler = make(2)
    for number, family in enumerate(("llama", "qwen")):
        scheduler.warm(number, family, family)
        scheduler.switched(number, family, family, 0.0)
    scheduler.submit(Ticket(number=1, variant="q", family="qwen", arrived_s=0.0))
    assert scheduler.next(0.0) == [Switch(engine=1, variant="q", family="qwen")]


def test_a_variant_that_loads_anew_gets_an_engine_of_its_own_while_there_is_one() -> None:
    scheduler = make(2)
    scheduler.warm(0, "mask", "base")
    scheduler.switched(0, "mask", "base", 0.0)
    for number, variant in enumerate(("narrow", "short")):
        scheduler.submit(Ticket(number=number, variant=variant, family=variant, arrived_s=1.0))
    assert scheduler.next(1.0) == [
        Switch(engine=1, variant="narrow", family="narrow"),
        Switch(engine=0, variant="short", family="short"),  # there is no other
    ]


def test_what_loads_anew_is_loaded_once_and_in_place_counts_only_within_a_family() -> None:
    scheduler = make(2)
    for number, family in enumerate(("base", "narrow")):
        scheduler.warm(number, family, family)
        scheduler.switched(number, family, family, 0.0)
    scheduler.submit(Ticket(number=1, variant="base", family="base", arrived_s=1.0))
    (started,) = scheduler.next(1.0)
    assert started.engine == 0
    scheduler.submit(Ticket(number=2, variant="mask", family="base", arrived_s=2.0))
    assert scheduler.next(2.0) == [Switch(engine=1, variant="mask", family="base")]
    scheduler.finished(1, 3.0)  # free before the other one has loaded
    assert scheduler.next(3.0) == [Switch(engine=0, variant="mask", family="base")]
    scheduler.submit(Ticket(number=3, variant="short", family="short", arrived_s=4.0))
    assert scheduler.next(4.0) == []  # nothing is idle
    scheduler.switched(0, "mask", "base", 5.0)
    assert scheduler.next(5.0)[0].engine == 0


def test_a_busy_engine_keeps_its_variant_until_another_has_waited_long_enough() -> None:
    scheduler = serving(make(patience_s=10.0), "a")
    scheduler.submit(ticket(1, "a", 0.0))
    scheduler.next(0.0)
    scheduler.submit(ticket(2, "b", 1.0))
    scheduler.submit(ticket(3, "a", 2.0))
    assert scheduler.next(2.0) == [Start(ticket=ticket(3, "a", 2.0), engine=0)]
    assert scheduler.wake_at_s(2.0) == 11.0
    assert scheduler.next(11.0) == []  # claimed: nothing more of "a" begins
    assert scheduler.wake_at_s(11.0) is None
    scheduler.submit(ticket(4, "a", 12.0))
    assert scheduler.next(12.0) == []
    scheduler.finished(1, 13.0)
    assert scheduler.next(13.0) == []
    scheduler.finished(3, 14.0)
    assert scheduler.next(14.0) == [Switch(engine=0, variant="b", family="")]
    scheduler.switched(0, "b", "", 14.1)
    assert [type(action) for action in scheduler.next(14.1)] == [Start]


def test_a_claim_ends_when_nobody_wants_it_any_more() -> None:
    scheduler = serving(make(), "a")
    scheduler.submit(ticket(1, "a"))
    scheduler.next(0.0)
    scheduler.submit(ticket(2, "b"))
    scheduler.next(10.0)
    scheduler.withdraw(2)
    scheduler.submit(ticket(3, "a", 11.0))
    scheduler.next(11.0)
    assert scheduler.num_running == 2


def test_a_full_variant_gets_a_second_engine_that_nobody_else_wants() -> None:
    scheduler = serving(make(2, slots=1), "a", "b")
    scheduler.submit(ticket(1, "a"))
    scheduler.submit(ticket(2, "a"))
    actions = scheduler.next(0.0)
    assert [type(action) for action in actions] == [Start, Switch]
    assert actions[1] == Switch(engine=1, variant="a", family="")


def test_while_an_engine_starts_a_running_one_may_come_sooner() -> None:
    scheduler = serving(make(2), "a")
    scheduler.submit(ticket(1, "a"))
    scheduler.next(0.0)
    scheduler.submit(ticket(2, "b"))
    assert scheduler.next(0.0) == [Switch(engine=1, variant="b", family="")]  # takes a minute
    assert scheduler.next(10.0) == []
    scheduler.finished(1, 12.0)
    assert scheduler.next(12.0) == [Switch(engine=0, variant="b", family="")]


def test_more_than_may_wait_are_refused_with_a_time() -> None:
    scheduler = make(max_queued=2)
    scheduler.submit(ticket(1))
    scheduler.submit(ticket(2))
    with pytest.raises(QueueFullError) as caught:
        scheduler.submit(ticket(3))
    assert 1 <= caught.value.retry_after_s <= 60
    scheduler.resubmit(ticket(4))  # accepted before: never refused


def test_a_request_whose_engine_died_comes_first_again() -> None:
    scheduler = serving(make(2, slots=1), "a", "b")
    scheduler.submit(ticket(1, "a"))
    scheduler.submit(ticket(2, "a"))
    scheduler.next(0.0)
    scheduler.finished(1, 1.0)
    scheduler.lost(0)
    scheduler.resubmit(ticket(1, "a", tries=1))
    scheduler.switched(1, "a", "", 2.0)
    (start,) = [action for action in scheduler.next(2.0) if isinstance(action, Start)]
    assert (start.ticket.number, start.engine) == (1, 1)


def test_those_who_wait_for_a_refused_variant_are_given_back() -> None:
    scheduler = make()
    scheduler.submit(ticket(1, "a"))
    scheduler.next(0.0)
    scheduler.switched(0, None, "", 1.0)
    assert [t.number for t in scheduler.withdraw_variant("a")] == [1]
    assert scheduler.next(1.0) == []


@given(
    seed=st.integers(0, 10_000),
    num_engines=st.integers(1, 3),
    num_variants=st.integers(1, 8),
    slots=st.integers(1, 6),
)
def test_under_any_load_engines_run_their_own_variant_only_and_none_waits_beyond_the_bound(
    seed: int, num_engines: int, num_variants: int, slots: int
) -> None:
    """A discrete simulation: random arrivals, durations up to 2 s, switches of 0.1 s."""
    draw = random.Random(seed)
    patience_s, longest_s, switch_s = 1.0, 2.0, 0.1
    scheduler = Scheduler(
        num_engines=num_engines, slots=slots, max_queued=10_000, patience_s=patience_s
    )
    serving(scheduler, *["v0"] * num_engines)
    serves = dict.fromkeys(range(num_engines), "v0")
    events: list[tuple[float, int, str, object]] = []
    order = iter(range(10**9))
    heavy = draw.random() < 0.5  # "v0" asks for more than everything
    for number in range(120):
        at = draw.uniform(0, 20)
        variant = "v0" if heavy and draw.random() < 0.7 else f"v{draw.randrange(num_variants)}"
        heapq.heappush(events, (at, next(order), "arrive", ticket(number, variant, at)))
    running: dict[int, int] = dict.fromkeys(range(num_engines), 0)
    waits: list[float] = []
    ended = 0
    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "arrive":
            assert isinstance(what, Ticket)
            scheduler.submit(what)
        elif kind == "end":
            assert isinstance(what, Start)
            running[what.engine] -= 1
            ended += 1
            scheduler.finished(what.ticket.number, now)
        elif kind == "switched":
            assert isinstance(what, Switch)
            serves[what.engine] = what.variant
            scheduler.switched(what.engine, what.variant, "", now)
        for action in scheduler.next(now):
            if isinstance(action, Switch):
                assert running[action.engine] == 0
                serves[action.engine] = ""
                heapq.heappush(events, (now + switch_s, next(order), "switched", action))
            else:
                assert serves[action.engine] == action.ticket.variant
                running[action.engine] += 1
                assert running[action.engine] <= slots
                waits.append(now - action.ticket.arrived_s)
                end = now + draw.uniform(0.01, longest_s)
                heapq.heappush(events, (end, next(order), "end", action))
        wake = scheduler.wake_at_s(now)
        if wake is not None:
            heapq.heappush(events, (wake, next(order), "wake", None))
    assert ended == 120
    assert scheduler.num_queued == scheduler.num_running == 0
    # The engines' own capacity bounds the rest: how often a variant's own queue needs a turn.
    turns = -(-num_variants // num_engines) * -(-120 // slots)
    assert max(waits) <= patience_s + turns * (longest_s + switch_s) + patience_s
