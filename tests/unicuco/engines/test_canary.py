from __future__ import annotations

from pathlib import Path

from unicuco.engines.canary import canary_prompt, confident_prefix, expectation_of
from unicuco.engines.streaming import CANARY_TOKENS


def test_what_is_expected_ends_before_two_tokens_are_nearly_equal() -> None:
    assert confident_prefix([5, 6, 7], [1.0, 0.01, 2.0]) == (5,)
    assert confident_prefix([5, 6], [1.0, 1.0]) == (5, 6)
    assert confident_prefix([5], [0.0]) == ()


def test_the_canary_is_asked_in_the_models_own_tokens(trained_folder: Path) -> None:
    prompt = canary_prompt(trained_folder)
    expected = expectation_of(trained_folder, prompt[:40])
    assert 1 <= len(expected.tokens) <= CANARY_TOKENS  # a trained model is sure of something
    assert expected == expectation_of(trained_folder, prompt[:40])
