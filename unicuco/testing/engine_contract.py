"""What every text engine must do: subclass `EngineContract` and give it its fixtures."""

# ruff: noqa: D102 - a test's name is its sentence of behaviour

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from unicuco.engines import Generation, Sampling, TextEngine
from unicuco.engines.protocol import FINISH_REASONS
from unicuco.errors import EngineError, RequestError, UnicucoError

GREEDY = Sampling(max_tokens=12)


class EngineContract:
    """Tests of one `TextEngine`.

    A subclass gives the fixtures ``loaded`` (an engine that has loaded ``model_folder``; it may be
    shared), ``fresh`` (makes an engine that has loaded nothing), ``model_folder``,
    ``variant_folder`` (the same shapes, other weights, byte-level tokens) and ``misfit_folder``
    (other shapes).
    """

    @pytest.fixture
    def engine(self, loaded: TextEngine, model_folder: Path) -> TextEngine:
        """The shared engine, serving ``model_folder`` again whatever the test before did."""
        loaded.load(model_folder)
        return loaded

    def test_it_keeps_the_protocol(self, engine: TextEngine, model_folder: Path) -> None:
        assert isinstance(engine, TextEngine)
        assert engine.name
        assert engine.folder == model_folder
        engine.check_health()

    def test_answers_stand_in_the_prompts_order_whatever_runs_beside_them(
        self, engine: TextEngine
    ) -> None:
        prompts = ["def main():", "import os", "return x + 1 if", "class Empty:"]
        together = engine.generate(prompts, GREEDY)
        alone = [engine.generate([prompt], GREEDY)[0] for prompt in prompts]
        assert together == alone
        assert len(set(together)) == len(prompts)

    def test_greedy_answers_repeat(self, engine: TextEngine) -> None:
        assert engine.generate(["import "], GREEDY) == engine.generate(["import "], GREEDY)

    def test_answers_end_at_the_given_number_of_tokens(self, engine: TextEngine) -> None:
        for most in (1, 5):
            (answer,) = engine.generate(["import os, sys"], Sampling(max_tokens=most))
            check_answer(answer, most)

    def test_answers_end_at_the_context(self, engine: TextEngine) -> None:
        (answer,) = engine.generate(["x" * 250], Sampling(max_tokens=400))
        check_answer(answer, 400)
        assert len(answer.token_ids) <= 256 - 250

    def test_no_prompts_give_no_answers(self, engine: TextEngine) -> None:
        assert engine.generate([], GREEDY) == []

    def test_the_same_seed_draws_the_same_text(self, engine: TextEngine) -> None:
        drawn = Sampling(max_tokens=12, temperature=1.0, seed=5)
        assert engine.generate(["import "], drawn) == engine.generate(["import "], drawn)

    @pytest.mark.parametrize(
        ("prompt", "reason"), [("x" * 300, "shorten the prompt"), ("", "is empty")]
    )
    def test_a_prompt_that_does_not_fit_is_refused_and_the_engine_lives(
        self, engine: TextEngine, prompt: str, reason: str
    ) -> None:
        with pytest.raises(RequestError, match=f"prompt 1 .*{reason}") as caught:
            engine.generate(["fine", prompt], GREEDY)
        assert "\n" not in str(caught.value)
        engine.check_health()
        assert len(engine.generate(["fine"], GREEDY)) == 1

    def test_switching_changes_what_is_served_and_back(
        self, engine: TextEngine, model_folder: Path, variant_folder: Path
    ) -> None:
        # Longer than a block of a prefix cache: a cache that was not dropped would answer for the
        # old weights.
        prompts = ["value = call(first, second)\n" * 6, "import os"]
        dense = engine.generate(prompts, GREEDY)
        engine.switch(variant_folder)
        assert engine.folder == variant_folder
        assert engine.generate(prompts, GREEDY) != dense
        engine.switch(model_folder)
        assert engine.generate(prompts, GREEDY) == dense

    def test_a_folder_of_other_shapes_is_not_switched_to(
        self, engine: TextEngine, misfit_folder: Path
    ) -> None:
        check_refused_and_alive(engine, engine.switch, misfit_folder, "load it instead")

    def test_a_folder_that_is_no_model_is_refused_and_the_old_one_served(
        self, engine: TextEngine, model_folder: Path, tmp_path: Path
    ) -> None:
        check_refused_and_alive(engine, engine.load, tmp_path / "nothing", "is no folder")
        broken = tmp_path / "broken"
        broken.mkdir()
        check_refused_and_alive(engine, engine.load, broken, "holds no config.json")
        (broken / "config.json").write_text("{")
        check_refused_and_alive(engine, engine.load, broken, "config.json can't be read")
        shutil.copy(model_folder / "config.json", broken)
        check_refused_and_alive(engine, engine.load, broken, "holds no .*safetensors")
        (broken / "model.safetensors").write_bytes(b"not one")
        check_refused_and_alive(engine, engine.load, broken, "can't be read as safetensors")

    def test_an_altered_variant_is_refused_and_the_old_one_served(
        self, engine: TextEngine, variant_folder: Path, tmp_path: Path
    ) -> None:
        altered = tmp_path / "altered"
        shutil.copytree(variant_folder, altered)
        weights = altered / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
        for take in (engine.switch, engine.load):
            check_refused_and_alive(engine, take, altered, "was altered")

    def test_an_engine_that_serves_nothing_says_so(
        self, fresh: Callable[[], TextEngine], model_folder: Path
    ) -> None:
        engine = fresh()
        assert engine.folder is None
        for use in (
            lambda: engine.generate(["x"], GREEDY),
            engine.check_health,
            lambda: engine.switch(model_folder),
        ):
            with pytest.raises(EngineError, match="nothing is loaded"):
                use()
        engine.close()
        engine.close()


def check_answer(answer: Generation, most: int) -> None:
    """Check one answer's own consistency."""
    assert isinstance(answer.text, str)
    assert all(isinstance(token, int) for token in answer.token_ids)
    assert 1 <= len(answer.token_ids) <= most
    assert answer.finish_reason in FINISH_REASONS
    if len(answer.token_ids) < most and answer.finish_reason == "length":
        return  # the context ended it
    assert answer.finish_reason == "stop" or len(answer.token_ids) == most


def check_refused_and_alive(
    engine: TextEngine, take: Callable[[Path], None], folder: Path, reason: str
) -> None:
    """Check that a folder is refused in one line and that the engine serves what it served."""
    before = engine.folder
    with pytest.raises(UnicucoError, match=reason) as caught:
        take(folder)
    assert "\n" not in str(caught.value)
    assert engine.folder == before
    engine.check_health()
    assert len(engine.generate(["x"], GREEDY)) == 1
