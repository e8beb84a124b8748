"""When an actor hangs: what it does between looks, and a multiple of what is measured."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest

from cluster.pulse import GivenUpError, Pulse, Stillness, thread_clock


class Actor:
    """Answers what it is told to answer; none: it does not."""

    def __init__(self, *answers: float | None) -> None:
        self._answers = list(answers)
        self.num_asked = 0

    def beat(self) -> Future[float]:
        future: Future[float] = Future()
        answer = self._answers[min(self.num_asked, len(self._answers) - 1)]
        self.num_asked += 1
        if answer is not None:
            future.set_result(answer)
        return future


def test_looks_that_see_nothing_done_are_counted_since_the_last_work() -> None:
    stillness = Stillness(Actor(1.0, 2.0, 2.0, 2.0, 2.5, 2.5).beat)
    assert [stillness.num_looks() for _ in range(6)] == [0, 0, 1, 2, 0, 1]


def test_work_in_steps_too_small_to_see_adds_up() -> None:
    stillness = Stillness(Actor(*(0.0004 * k for k in range(60))).beat)
    assert max(stillness.num_looks() for _ in range(60)) == 2


def test_one_that_answers_no_more_is_asked_once_and_still() -> None:
    actor = Actor(1.0, None)
    stillness = Stillness(actor.beat)
    assert [stillness.num_looks() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert actor.num_asked == 2


def test_one_that_never_answered_is_no_judge_s_matter() -> None:
    stillness = Stillness(Actor(None).beat)
    assert {stillness.num_looks() for _ in range(99)} == {0}


def test_patience_is_a_multiple_of_the_usual_time_of_a_call_and_grows_until_one_is_done() -> None:
    pulse = Pulse(0.02)
    assert pulse.limit_s("ask") == 0.02
    for seconds in (10, 2, 11, 30, 9):
        pulse.finished("ask", seconds)
    assert pulse.limit_s("ask") == 160
    assert pulse.limit_s("tell") == 0.02
    with pytest.raises(GivenUpError):
        pulse.wait("tell", Future(), Stillness(Actor(1.0).beat))
    assert pulse.limit_s("ask") == 640
    pulse.finished("ask", 10)
    assert pulse.limit_s("ask") == 160


def test_what_nobody_wants_is_waited_for_no_more() -> None:
    pulse = Pulse(0.02)
    pulse.close()
    with pytest.raises(GivenUpError):
        pulse.wait("ask", Future(), Stillness(Actor(None).beat))


def test_the_clock_of_a_thread_tells_its_work_in_another() -> None:
    clock = thread_clock()
    before = clock()
    others: list[float] = []
    while time.thread_time() < before + 0.02:
        pass
    thread = threading.Thread(target=lambda: others.append(clock()))
    thread.start()
    thread.join()
    assert others[0] >= before + 0.02
