"""When an evaluation is late, and when its replica hangs: multiples of what is measured."""

from __future__ import annotations

from dataclasses import replace

from cluster.lateness import Lateness
from tests.cluster.synthetic import make_ask

ASK = make_ask(b"12345678", position=1)


def measured(*seconds: float) -> Lateness:
    lateness = Lateness()
    for own in seconds:
        lateness.finished(ASK, own)
    return lateness


def test_late_is_a_multiple_of_the_usual_time_of_its_kind() -> None:
    lateness = measured(10, 2, 11, 30, 9)
    assert not lateness.is_late(ASK, 39)
    assert lateness.is_late(ASK, 41)
    assert not lateness.is_hung(ASK, 159)
    assert lateness.is_hung(ASK, 161)
    costly = replace(ASK, derivatives=True)
    assert not lateness.is_late(costly, 1e6), "nobody knows how long those take"
    lateness.finished(costly, 30)
    assert not lateness.is_late(costly, 119)
    assert lateness.is_late(costly, 121)


def test_short_evaluations_are_not_late_within_a_busy_machine_s_noise() -> None:
    lateness = measured(0.01)
    assert not lateness.is_late(ASK, 2.9)
    assert lateness.is_late(ASK, 3.1)
    assert not lateness.is_hung(ASK, 14)
    assert lateness.is_hung(ASK, 16)


def test_what_all_replicas_are_slow_at_is_waited_for_longer_every_time() -> None:
    lateness = measured(0.01)
    lateness.gave_up()
    assert not lateness.is_hung(ASK, 59)
    assert lateness.is_hung(ASK, 61)
    lateness.gave_up()
    assert not lateness.is_hung(ASK, 239)
    lateness.finished(ASK, 0.01)
    assert lateness.is_hung(ASK, 16)
