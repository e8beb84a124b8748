"""The benchmark of 64 requests: its targets, its table, and one tool in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import requests
from benchmarks.requests import Outcome, describe, measure, targets


def outcome(method: str, learning_s: float, seconds: list[float]) -> Outcome:
    return Outcome(
        method=method,
        learning_s=learning_s,
        seconds=seconds,
        cpu_s=seconds,
        imported_bytes=2**20,
        peak_bytes=3 * 2**20,
        kl={"0.5": 0.25},
    )


def test_targets_are_distinct_and_the_first_eight_span_the_range() -> None:
    wanted = targets(64)
    assert len(set(wanted)) == 64
    assert (min(wanted), max(wanted)) == (0.3, 0.8)
    assert max(wanted[:8]) - min(wanted[:8]) > 0.4


def test_what_was_not_measured_has_no_figure() -> None:
    text = describe(
        {
            "stratnet": outcome("stratnet", 10.0, 64 * [0.5]),
            "evopress": outcome("evopress", 0.0, 8 * [100.0]),
        }
    )
    own, rival, ratio = text.splitlines()[2:]
    assert own == (
        "| stratnet | 64 | 0.500 | 0.500 | 0.500 | 4.000 | 32.000 | 10.500 | 14.000 | 42.000 "
        "| 0.250 | 3 (1) |"
    )
    assert "| 100.000 | 800.000 | – | 100.000 | 800.000 | – |" in rival
    assert ratio.startswith("evopress: 200 times")


@pytest.mark.slow
def test_a_tool_answers_in_its_own_process_and_its_checkpoints_are_judged(tiny_llama: Path) -> None:
    found = measure("owl", tiny_llama, 2, 256, 256)
    assert len(found.seconds) == len(found.cpu_s) == 2
    assert found.learning_s < min(found.seconds)
    assert 0 < found.imported_bytes <= found.peak_bytes
    assert 0 < found.kl["0.3"] < found.kl["0.8"]


def test_an_unknown_method_is_one_line() -> None:
    with pytest.raises(SystemExit, match="no method sparta; there are stratnet"):
        requests.main(["sparta"])
