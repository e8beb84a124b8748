"""The simulation of many replicas against what can be reckoned by hand."""

from __future__ import annotations

import pytest

from benchmarks.scale_model import Result, Times, Trouble, simulate, stops_at

FREE = Times(
    evaluation_s=1.0, hand_over_s=0.0, restart_s=0.0, commit_s=0.0, row_s=0.0, fits=((1, 0.0),)
)


def run(replicas: int, times: Times = FREE, round_size: int = 16, **options: object) -> Result:
    return simulate(
        replicas=replicas, evaluations=64, round_size=round_size, times=times, **options
    )  # type: ignore[arg-type]


def changed(**changes: object) -> Times:
    return Times(**{**{name: getattr(FREE, name) for name in FREE.__slots__}, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("replicas", "seconds"), [(1, 64), (2, 32), (16, 4), (32, 2), (64, 2)])
def test_where_nothing_else_takes_time_two_rounds_are_under_way(
    replicas: int, seconds: float
) -> None:
    result = run(replicas)
    assert result.seconds == seconds
    assert result.replicas_busy == pytest.approx(64 / (seconds * replicas))


def test_rounds_of_three_feed_six_replicas() -> None:
    times = [(r, run(r, round_size=3).seconds) for r in (1, 2, 4, 8, 16)]
    assert times[-1][1] == times[-2][1]
    assert stops_at(times) == 8


def test_a_fit_that_is_shorter_than_a_round_hides_behind_it_and_a_longer_one_does_not() -> None:
    shorter, longer = changed(fits=((1, 0.9),)), changed(fits=((1, 30.0),))
    assert run(16, shorter).seconds == pytest.approx(4, abs=1.0)
    # Rounds 2 and 3 are each asked after the last one was.
    assert run(16, longer).seconds == pytest.approx(1 + 30 + 30 + 1)
    assert run(16, longer).learner_busy > 0.95


def test_hand_over_and_commits_take_their_time() -> None:
    assert run(1, changed(hand_over_s=0.5)).seconds == pytest.approx(64 * 1.5 - 0.5, abs=0.6)
    slow = run(64, changed(row_s=1.0), round_size=64)
    assert slow.seconds == pytest.approx(64 + 1 + 64)
    assert slow.driver_busy > 0.9


def test_what_dies_is_done_again_and_what_straggles_takes_longer() -> None:
    calm = run(8)
    deaths = run(8, changed(restart_s=2.0), trouble=Trouble(deadly=0.2))
    slow = run(8, trouble=Trouble(straggling=0.2, factor=5.0))
    assert calm.seconds < deaths.seconds
    assert calm.seconds < slow.seconds
    assert deaths == run(8, changed(restart_s=2.0), trouble=Trouble(deadly=0.2))
    assert deaths.replicas_busy * deaths.seconds * 8 == pytest.approx(64)


def test_asks_are_interpolated_between_what_was_measured() -> None:
    times = changed(fits=((10, 1.0), (20, 3.0)))
    assert [times.ask_s(n) for n in (0, 5, 10, 15, 20, 99)] == [0.0, 1.0, 1.0, 2.0, 3.0, 3.0]
