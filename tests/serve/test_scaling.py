"""How many replicas a queue deserves, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.scaling import (
    QUEUE_METRIC,
    QueuePolicy,
    is_worth_warming,
    newest,
    replicas_for,
    replicas_now,
)


@pytest.mark.parametrize(
    ("num_active", "wanted"), [(0, 1), (1, 1), (4, 1), (5, 2), (8, 2), (13, 4), (64, 4), (1e9, 4)]
)
def test_one_replica_for_every_four_jobs_within_the_bounds(num_active: float, wanted: int) -> None:
    assert replicas_for(num_active, jobs_per_replica=4, lowest=1, highest=4) == wanted


@given(st.integers(0, 10_000), st.integers(0, 100), st.integers(1, 50), st.integers(1, 50))
def test_a_longer_queue_never_gets_fewer(jobs: int, more: int, each: int, highest: int) -> None:
    few = replicas_for(jobs, jobs_per_replica=each, lowest=1, highest=highest)
    many = replicas_for(jobs + more, jobs_per_replica=each, lowest=1, highest=highest)
    assert 1 <= few <= many <= highest


@pytest.mark.parametrize(
    ("active", "running", "finished", "seconds", "idle_s", "is_worth"),
    [
        (0, 0, 0, 0.0, 0.0, True),  # the service has just started: at once
        (64, 0, 0, 0.0, 0.0, True),  # there is work, and nobody at it
        (64, 1, 0, 0.0, 0.0, False),  # another is at work, how fast is not known yet
        (64, 1, 0, 1.0, 0.0, True),  # too slow
        (64, 1, 5, 1.0, 0.0, True),  # 13 seconds more
        (64, 1, 10, 1.0, 0.0, False),  # 6.4 seconds more: they will be done before this one starts
        (0, 0, 64, 8.0, 3.0, False),  # a burst is over, and this replica perhaps too
        (0, 0, 64, 20.0, 15.0, True),  # it stays
    ],
)
def test_a_replica_warms_up_unless_the_others_are_done_sooner(
    active: int, running: int, finished: int, seconds: float, idle_s: float, is_worth: bool
) -> None:
    decided = is_worth_warming(
        active, running, num_finished=finished, seconds=seconds, idle_s=idle_s
    )
    assert decided is is_worth


def point(timestamp: float, value: float) -> SimpleNamespace:
    return SimpleNamespace(timestamp=timestamp, value=value)


def test_the_latest_report_counts_whoever_made_it() -> None:
    assert newest([[point(1, 9), point(3, 2)], [point(2, 7)]]) == 2
    assert newest([[], []]) == newest([]) == 0


def decisions(
    queue: list[int], *, jobs: list[int] | None = None, every_s: float = 0.5, present: int = 1
) -> list[int]:
    """What is decided while the wanted number changes, every so often; the jobs may stay many."""
    burst, told = None, []
    for step, (wanted, num_active) in enumerate(zip(queue, jobs or [64] * len(queue), strict=True)):
        now_s = 100 + step * every_s
        present, burst = replicas_now(
            burst, num_active=num_active, wanted=wanted, present=present, now_s=now_s
        )
        told.append(present)
    return told


def test_a_queue_that_stays_is_given_replicas_after_three_seconds() -> None:
    assert decisions([1, 4, 4, 4, 4, 4, 4, 4, 4]) == [1] * 7 + [4] * 2


def test_a_queue_that_is_gone_sooner_than_replicas_start_is_left_to_those_there_are() -> None:
    soon_gone = [64, 56, 48, 40, 32, 24, 16, 8, 4, 0]
    wanted = [4, 4, 4, 4, 4, 4, 4, 2, 1, 1]
    assert decisions(wanted, jobs=soon_gone) == [1] * 8 + [4, 1]
    slow = [64, 62, 60, 58, 56, 54, 52, 50]
    assert decisions([4] * 8, jobs=slow) == [1] * 6 + [4] * 2


def test_a_queue_that_begins_to_stay_is_given_replicas_then() -> None:
    assert decisions([4] * 14, jobs=[64, 44, 24, *[20] * 11]) == [1] * 12 + [4] * 2


def test_replicas_that_a_burst_deserved_are_started_after_it() -> None:
    assert decisions([1, 3, 4, 2, 1, 1]) == [1, 1, 1, 1, 4, 1]


def test_a_burst_that_is_gone_at_once_starts_nothing() -> None:
    assert decisions([1, 2, 1, 1, 1]) == [1] * 5


def test_two_bursts_are_two() -> None:
    assert decisions([1, 4, 1, 4, 4, 4, 1]) == [1, 1, 1, 1, 1, 1, 4]


def test_fewer_are_wanted_at_once_and_left_to_serve_to_delay() -> None:
    assert decisions([4, 2, 1], present=4) == [4, 2, 1]


def context(metrics: object, at_s: float = 0, state: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        raw_metrics=metrics,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        target_num_replicas=1,
        current_time=at_s,
        policy_state=state or {},
    )


def test_the_policy_asks_the_reports_and_remembers_the_burst() -> None:
    policy = QueuePolicy(jobs_per_replica=4)
    reported = {QUEUE_METRIC: {"one": [point(1, 0)], "two": [point(2, 9)]}, "other": {}}
    replicas, state = policy(context(reported, 10))
    assert replicas == 1
    assert policy(context(reported, 13, state))[0] == 3
    assert policy(context({}, 10))[0] == policy(context(None, 10))[0] == 1
