"""How many replicas a queue deserves, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.scaling import QUEUE_METRIC, QueuePolicy, newest, replicas_for


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
