from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unicuco.engines.test_vllm_engine import PROMPTS, hugging_face_greedy
from unicuco.engines import StreamingEngine, StreamingVllmEngine, StreamSampling, VllmOptions
from unicuco.errors import ContainerError, EngineError, RequestError, VariantError
from unicuco.models import load_tokenizer
from unicuco.pipeline import PackOptions, pack

# Under pytest-xdist these share the one engine of one worker.
pytestmark = [pytest.mark.xdist_group("streaming-vllm"), pytest.mark.timeout(900)]

Talk = tuple[asyncio.Runner, StreamingVllmEngine]


@pytest.fixture(scope="module")
def talk(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """The one engine of this module, with the loop that it lives on."""
    scratch = tmp_path_factory.mktemp("scratch")
    with asyncio.Runner() as runner:
        engine = StreamingVllmEngine(VllmOptions(threads=1), scratch=scratch)
        runner.run(engine.serve(model_folder))
        yield runner, engine
        runner.run(engine.close())
    assert list(scratch.iterdir()) == []


async def answers(engine: StreamingVllmEngine, folder: Path, count: int) -> list[list[int]]:
    """Greedy tokens of all prompts, which run at once."""
    tokenizer = load_tokenizer(folder)

    async def one(prompt: str) -> list[int]:
        ids = tuple(tokenizer(prompt)["input_ids"])
        pieces = engine.generate(ids, StreamSampling(max_tokens=count))
        return [token async for piece in pieces for token in piece.token_ids]

    return list(await asyncio.gather(*map(one, PROMPTS)))


@pytest.mark.slow
def test_tokens_equal_hugging_faces_through_switches_and_the_variant_may_be_deleted_meanwhile(
    talk: Talk, model_folder: Path, variant_folder: Path, tmp_path: Path
) -> None:
    runner, engine = talk
    assert isinstance(engine, StreamingEngine)
    mine = tmp_path / "mine"
    shutil.copytree(variant_folder, mine)
    packed = tmp_path / "mine.pack"
    pack(PackOptions(model=str(mine), out=packed))
    pid, digests = engine.pid, set()
    for served, folder in ((mine, mine), (model_folder, model_folder), (packed, mine)):
        checked = runner.run(engine.serve(served))
        digests.add(checked.digest)
        assert (checked.path, checked.context) == (served, 256)
        assert runner.run(answers(engine, folder, 16)) == hugging_face_greedy(folder, PROMPTS, 16)
    assert (engine.pid, len(digests)) == (pid, 3)  # in place
    shutil.rmtree(mine)
    packed.unlink()
    assert runner.run(answers(engine, model_folder, 16)) == hugging_face_greedy(
        variant_folder, PROMPTS, 16
    )
    runner.run(engine.check_health())


@pytest.mark.slow
def test_a_switch_waits_for_what_runs_and_no_answer_changes_in_the_middle(
    talk: Talk, model_folder: Path, variant_folder: Path
) -> None:
    runner, engine = talk
    runner.run(engine.serve(model_folder))

    async def both() -> list[list[int]]:
        running = asyncio.create_task(answers(engine, model_folder, 24))
        await asyncio.sleep(0.02)
        await engine.serve(variant_folder)
        return await running

    assert runner.run(both()) == hugging_face_greedy(model_folder, PROMPTS, 24)


@pytest.mark.slow
def test_an_altered_variant_is_refused_and_the_old_one_served_on(
    talk: Talk, model_folder: Path, variant_folder: Path, tmp_path: Path
) -> None:
    runner, engine = talk
    runner.run(engine.serve(model_folder))
    altered = tmp_path / "altered"
    shutil.copytree(variant_folder, altered)
    weights = altered / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(VariantError, match=r"altered/.*was altered"):
        runner.run(engine.serve(altered))
    packed = tmp_path / "altered.pack"
    pack(PackOptions(model=str(variant_folder), out=packed))
    packed.write_bytes(packed.read_bytes()[:-1] + b"\1")
    with pytest.raises(ContainerError, match=r"altered.pack was altered: model\."):
        runner.run(engine.serve(packed))
    with pytest.raises(EngineError, match=r"is no folder|can.t be read"):
        runner.run(engine.serve(tmp_path / "nothing"))
    assert runner.run(answers(engine, model_folder, 8)) == hugging_face_greedy(
        model_folder, PROMPTS, 8
    )


@pytest.mark.slow
def test_all_weights_in_memory_are_compared_and_wrong_ones_close_the_engine(
    talk: Talk, model_folder: Path, variant_folder: Path
) -> None:
    runner, engine = talk
    dense = runner.run(engine.serve(model_folder)).digest
    digest = runner.run(engine.serve(variant_folder)).digest
    shown = runner.run(engine._ask({"op": "show", "prompt": [1]}, 60))["weights"]
    true = engine._known[digest]
    assert set(shown["sums"]) == set(true.weights.sums)
    runner.run(engine.serve(model_folder))
    engine._known[digest] = replace(true, weights=engine._known[dense].weights)
    with pytest.raises(EngineError, match=r"engine was closed: .*_proj.weight in memory is not"):
        runner.run(engine.serve(variant_folder))
    assert not engine.alive
    assert engine.pid is None
    engine._known[digest] = true
    with pytest.raises(EngineError, match="nothing is loaded"):
        runner.run(engine.check_health())


def test_a_wrong_answer_to_the_canary_is_refused_and_the_first_remembered() -> None:
    engine = StreamingVllmEngine()
    target = SimpleNamespace(digest="d")
    answer = {"tokens": [1, 2, 3], "weights": {"precision": 0.0, "sums": {}}}
    engine._compare(target, answer, None)  # type: ignore[arg-type]
    assert engine._known["d"].tokens == (1, 2, 3)
    engine._compare(target, {**answer, "tokens": [1, 2, 3, 4]}, engine._known["d"])  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"the canary was answered \[1, 2\]"):
        engine._compare(target, {**answer, "tokens": [1, 2]}, engine._known["d"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"stop": ("",)},
        {"stop": ("a",) * 5},
        {"presence_penalty": 3.0},
        {"frequency_penalty": float("inf")},
    ],
)
def test_sampling_outside_its_range_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        StreamSampling(**values)  # type: ignore[arg-type]
