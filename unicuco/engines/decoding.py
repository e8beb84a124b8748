"""How long a step of decoding takes: what is decoded, and two engines compared in turns.

What else the machine does meanwhile slows both, so what is kept is their ratio; turns are short,
for it changes from one second to the next. What this module does not know: vLLM, and what is
measured what for.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLoad:
    """What is decoded: ``batch`` sequences at a time, ``steps`` tokens after ``prompt_tokens``.

    ``vocabulary``: tokens that prompts may be made of.
    """

    batch: int
    prompt_tokens: int
    steps: int
    vocabulary: int


class Decoder(Protocol):
    """An engine that has something loaded."""

    def step_ms(self, load: DecodeLoad) -> float:
        """Return the median milliseconds of a step, which gives every sequence a token.

        Raises:
            EngineError: nothing is loaded, or the engine died.
        """
        ...


def compare_decoding(
    dense: Decoder, other: Decoder, loads: Sequence[DecodeLoad], rounds: int
) -> tuple[list[float], list[float]]:
    """Return the ratio other / dense and the dense milliseconds per step, of every load.

    Both are medians over the rounds, in which the two take turns in going first; one more round
    comes before and is forgotten.

    Raises:
        EngineError: nothing is loaded, or an engine died.
    """
    ratios, dense_ms = [], []
    for load in loads:
        turns = [_turn(dense, other, load, other_first=k % 2 == 0) for k in range(1 + rounds)][1:]
        ratios.append(statistics.median(b / a for a, b in turns))
        dense_ms.append(statistics.median(a for a, _ in turns))
    return ratios, dense_ms


def _turn(
    dense: Decoder, other: Decoder, load: DecodeLoad, *, other_first: bool
) -> tuple[float, float]:
    if other_first:
        other_ms = other.step_ms(load)
        return dense.step_ms(load), other_ms
    return dense.step_ms(load), other.step_ms(load)


def step_question(load: DecodeLoad) -> dict[str, object]:
    """Return what a worker is asked, and answers with the seconds of every step."""
    return {
        "op": "time",
        "batch": load.batch,
        "prompt_tokens": load.prompt_tokens,
        "steps": load.steps,
        "vocabulary": load.vocabulary,
    }


def median_ms(answer: dict[str, object]) -> float:
    """Return the median of a worker's answer, in milliseconds."""
    seconds = answer["seconds"]
    assert isinstance(seconds, list)
    return 1000 * float(statistics.median(seconds))
