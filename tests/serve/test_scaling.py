"""How many replicas a queue deserves, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.scaling import QUEUE_METRIC, QueuePolicy, is_worth_warming, newest, replicas_for


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


def context(metrics: object) -> SimpleNamespace:
    return SimpleNamespace(
        raw_metrics=metrics, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=4
    )


def test_the_policy_asks_the_reports_and_keeps_no_state() -> None:
    policy = QueuePolicy(jobs_per_replica=4)
    reported = {QUEUE_METRIC: {"one": [point(1, 0)], "two": [point(2, 9)]}, "other": {}}
    assert policy(context(reported)) == (3, {})
    assert policy(context({})) == policy(context(None)) == (1, {})
