from __future__ import annotations

import pytest

from unicuco.engines import DecodeLoad, DecodeTimer, VllmOptions, compare_decoding
from unicuco.engines.decoding import median_ms
from unicuco.errors import EngineError

LOADS = [DecodeLoad(batch=batch, prompt_tokens=4, steps=2, vocabulary=9) for batch in (1, 8)]


class Machine:
    """Two decoders on a machine that gets slower and slower, and stumbles now and then."""

    def __init__(self) -> None:
        self.asked = 0

    def decoder(self, ms: float) -> _Decoder:
        return _Decoder(self, ms)

    def slowness(self) -> float:
        self.asked += 1
        turn = (self.asked - 1) // 2
        return (1 + turn) * (50.0 if turn == 0 or self.asked == 8 else 1.0)


class _Decoder:
    def __init__(self, machine: Machine, ms: float) -> None:
        self.machine = machine
        self.ms = ms

    def step_ms(self, load: DecodeLoad) -> float:
        return self.ms * load.batch * self.machine.slowness()


def test_what_slows_both_engines_changes_no_ratio() -> None:
    machine = Machine()
    ratios, dense_ms = compare_decoding(machine.decoder(2.0), machine.decoder(1.0), LOADS, 5)
    assert ratios == [0.5, 0.5]
    assert machine.asked == 2 * 2 * 6
    assert dense_ms == [2.0 * 4, 2.0 * 8 * 10]  # the middle of turns 1 to 5, and of 7 to 11


def test_a_worker_s_answer_is_the_median_of_its_steps_in_milliseconds() -> None:
    assert median_ms({"seconds": [0.5, 0.001, 0.003]}) == 3.0


def test_nothing_is_timed_before_something_is_loaded() -> None:
    timer = DecodeTimer(VllmOptions(), max_batch=8, context=16)
    with pytest.raises(EngineError, match="nothing is loaded"):
        timer.step_ms(LOADS[0])
    timer.close()
    timer.close()
