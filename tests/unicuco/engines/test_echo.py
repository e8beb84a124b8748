from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from unicuco.engines import Generation, Sampling, TextEngine
from unicuco.testing.echo import EchoEngine
from unicuco.testing.engine_contract import EngineContract


class TestEchoEngine(EngineContract):
    @pytest.fixture
    def loaded(self, model_folder: Path) -> TextEngine:
        engine = EchoEngine()
        engine.load(model_folder)
        return engine

    @pytest.fixture
    def fresh(self) -> Callable[[], TextEngine]:
        return EchoEngine


def test_the_answer_names_the_folder_and_repeats_the_prompt(model_folder: Path) -> None:
    engine = EchoEngine()
    engine.load(model_folder)
    (whole,) = engine.generate(["héllo"])
    assert whole == Generation(
        text="dense: héllo", token_ids=tuple("dense: héllo".encode()), finish_reason="stop"
    )
    (part,) = engine.generate(["héllo"], Sampling(max_tokens=9))
    assert (part.text, part.finish_reason) == ("dense: h", "length")
