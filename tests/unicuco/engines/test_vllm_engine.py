from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unicuco.engines import ENGINES, DecodeLoad, Sampling, TextEngine, VllmEngine, VllmOptions
from unicuco.errors import EngineError, RequestError
from unicuco.models import load_model, load_tokenizer
from unicuco.testing.engine_contract import EngineContract

# Under pytest-xdist these share the one engine of one worker.
pytestmark = pytest.mark.xdist_group("vllm")

PROMPTS = ["def main():\n", "import os", "x = [i for i in range(10)]\n" * 6, "return"]


def hugging_face_greedy(folder: Path, prompts: list[str], count: int) -> list[list[int]]:
    """The tokens of a plain greedy loop over the float32 logits of `transformers`."""
    model, tokenizer = load_model(folder).model, load_tokenizer(folder)
    answers = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        start = len(ids)
        while len(ids) < start + count:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
        answers.append(ids[start:])
    return answers


@pytest.mark.slow
class TestVllmEngine(EngineContract):
    @pytest.fixture
    def loaded(self, vllm_engine: VllmEngine) -> TextEngine:
        return vllm_engine

    @pytest.fixture
    def fresh(self) -> Callable[[], TextEngine]:
        return VllmEngine

    def test_greedy_tokens_equal_hugging_faces_for_dense_and_variant_through_switches(
        self, engine: VllmEngine, model_folder: Path, variant_folder: Path
    ) -> None:
        sampling = Sampling(max_tokens=24)
        for folder in (model_folder, variant_folder, model_folder):
            engine.switch(folder)
            answers = [list(answer.token_ids) for answer in engine.generate(PROMPTS, sampling)]
            assert answers == hugging_face_greedy(folder, PROMPTS, 24)

    def test_steps_of_decoding_are_timed_and_leave_the_engine_as_it_was(
        self, engine: VllmEngine
    ) -> None:
        before = engine.generate(PROMPTS)
        for batch in (1, 5):
            load = DecodeLoad(batch=batch, prompt_tokens=8, steps=6, vocabulary=200)
            assert engine.step_ms(load) > 0
        assert engine.generate(PROMPTS) == before

    def test_loading_equal_shapes_keeps_the_process(
        self, engine: VllmEngine, variant_folder: Path
    ) -> None:
        pid = engine.pid
        engine.load(variant_folder)
        assert engine.pid == pid


@pytest.mark.slow
def test_an_architecture_that_vllm_does_not_know_is_one_line(
    model_folder: Path, tmp_path: Path
) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["NoSuchForCausalLM"], "model_type": "no-such"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = VllmEngine()
    with pytest.raises(EngineError, match="vLLM can't serve") as caught:
        engine.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert engine.pid is None


def test_a_missing_vllm_is_one_line_that_says_what_to_install(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"install unicuco\[cpu\]"):
        VllmEngine().load(model_folder)


def test_a_context_beyond_the_models_is_refused_before_anything_starts(model_folder: Path) -> None:
    engine = VllmEngine(VllmOptions(context=257))
    with pytest.raises(EngineError, match=r"257 tokens was asked for, but .* holds 256"):
        engine.load(model_folder)
    assert engine.pid is None


@pytest.mark.parametrize(
    "values", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_sampling_outside_its_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        replace(Sampling(), **values)


@pytest.mark.parametrize("values", [{"context": 1}, {"kv_cache_gib": 0}])
def test_options_outside_their_range_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        VllmOptions(**values)  # type: ignore[arg-type]


def test_cores_bind_the_threads_and_set_their_number() -> None:
    bound = VllmOptions(cores=(2, 3)).environment()
    assert bound["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    assert bound["OMP_PLACES"] == "{2,3}"
    assert bound["OMP_NUM_THREADS"] == "2"
    free = VllmOptions(threads=1).environment()
    assert free["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert free["OMP_NUM_THREADS"] == "1"
    assert "OMP_PLACES" not in free


def test_every_engine_is_registered_under_its_own_name() -> None:
    for name, make in ENGINES.items():
        assert make().name == name
