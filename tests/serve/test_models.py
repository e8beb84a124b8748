"""The deployment that talks, in this process: without Ray, and with engines that echo."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from serve.config import EngineOptions, ServeConfig
from serve.models import Began, Failed, Models, Said, TalkCall, TalkEvent, vllm_engines
from unicuco.engines import StreamSampling
from unicuco.packing import Link, folder_drafts, read_header, write_container
from unicuco.testing.streaming_echo import StreamingEcho

Work = Callable[[Models, StreamingEcho], Awaitable[None]]


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> ServeConfig:
    """A service of one run with two variants; echo engines want a file ``digest`` in each."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "digest").write_text("dense")
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()
    manifest = {"profile": {"digest": "dense"}, "base_model": {"path": str(base)}}
    (run / "run.json").write_text(json.dumps(manifest))
    for name in ("one", "two"):
        folder = data / "variants" / "run" / name
        shutil.copytree(base, folder)
        (folder / "strategy.json").write_text(name)
        (folder / "digest").write_text(hashlib.sha256(name.encode()).hexdigest())
    engines = EngineOptions(min_engines=0, max_queued=4, slots=2, longest_wait_s=0.1)
    return ServeConfig.of_runs([run], data=data, engines=engines)


def run(config: ServeConfig, work: Work, *, token_s: float = 0.0) -> None:
    async def bounded() -> None:
        engine = StreamingEcho(token_s=token_s)
        models = Models(config, lambda config: [engine])
        async with asyncio.timeout(60):
            await work(models, engine)

    asyncio.run(bounded())


def call(model: str, prompt: str = "hi", *, tokens: int = 8, copies: int = 1) -> TalkCall:
    sampling = StreamSampling(temperature=0.0)
    return TalkCall(
        model=model, prompts=(prompt,), copies=copies, max_tokens=tokens, sampling=sampling
    )


async def talk(models: Models, asked: TalkCall) -> list[TalkEvent]:
    return [event async for event in models.talk(asked)]


def text(events: list[TalkEvent]) -> str:
    said = [event for event in events if isinstance(event, Said)]
    return "".join(piece.delta.text for event in said for piece in event.pieces)


def test_the_model_that_is_named_answers_and_the_fingerprint_names_its_contents(
    config: ServeConfig,
) -> None:
    async def work(models: Models, engine: StreamingEcho) -> None:
        fingerprints = set()
        for name, folder in (("run", "base"), ("run:one", "one"), ("run:two", "two")):
            events = await talk(models, call(name))
            assert isinstance(events[0], Began)
            assert events[0].prompt_tokens == 2
            fingerprints.add(events[0].fingerprint)
            assert text(events).startswith(folder)
        assert len(fingerprints) == 3

    run(config, work)


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (call("run:none"), 404, "model_not_found"),
        (call("other"), 404, "model_not_found"),
        (call("../run"), 404, "model_not_found"),
        (call("run", "x" * 64), 400, "context_length_exceeded"),
        (call("run", ""), 400, "invalid_request"),
        (call("run", copies=5), 429, "overloaded"),
    ],
)
def test_a_call_that_can_not_be_answered_fails_with_its_status(
    config: ServeConfig, asked: TalkCall, status: int, code: str
) -> None:
    async def work(models: Models, engine: StreamingEcho) -> None:
        failed = (await talk(models, asked))[-1]
        assert isinstance(failed, Failed)
        assert (failed.status, failed.code) == (status, code)
        assert (failed.retry_after_s is not None) == (status == 429)
        assert text(await talk(models, call("run:one"))).startswith("one")

    run(config, work)


def test_a_variant_is_in_use_while_a_call_runs_or_waits_and_not_afterwards(
    config: ServeConfig,
) -> None:
    async def work(models: Models, engine: StreamingEcho) -> None:
        running = asyncio.create_task(talk(models, call("run:one", tokens=400)))
        while not await models.in_use("run:one"):
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(talk(models, call("run:two", tokens=400)))
        while not await models.in_use("run:two"):
            await asyncio.sleep(0.01)
        assert await models.in_use("run:one")
        assert not await models.in_use("run")
        await asyncio.gather(running, waiting)
        assert not await models.in_use("run:one")
        assert engine.broken_promises == []

    run(config, work, token_s=0.01)


def test_one_who_waits_for_a_variant_that_is_deleted_hears_that_it_is_not_there(
    config: ServeConfig,
) -> None:
    async def work(models: Models, engine: StreamingEcho) -> None:
        running = asyncio.create_task(talk(models, call("run:one", tokens=40)))
        await asyncio.sleep(0.2)
        waiting = asyncio.create_task(talk(models, call("run:two")))
        await asyncio.sleep(0.1)
        shutil.rmtree(Path(config.data) / "variants" / "run" / "two")
        failed = (await waiting)[-1]
        assert isinstance(failed, Failed)
        assert (failed.status, failed.code) == (404, "model_not_found")
        assert len(text(await running)) == 40

    run(config, work, token_s=0.02)


def test_a_damaged_variant_fails_and_the_others_are_served_on(config: ServeConfig) -> None:
    async def work(models: Models, engine: StreamingEcho) -> None:
        (Path(config.data) / "variants" / "run" / "two" / "digest").write_text("broken")
        failed = (await talk(models, call("run:two")))[-1]
        assert isinstance(failed, Failed)
        assert (failed.status, failed.code) == (500, "engine_refused")
        assert text(await talk(models, call("run:one"))).startswith("one")

    run(config, work)


def test_engines_that_start_with_the_service_make_it_ready_when_one_is_there(
    config: ServeConfig,
) -> None:
    from dataclasses import replace

    eager = replace(config, engines=replace(config.engines, min_engines=1))

    async def work(models: Models, engine: StreamingEcho) -> None:
        assert not await models.ready()
        while not await models.ready():
            await asyncio.sleep(0.01)
        assert engine.switches == ["base"]
        status = await models.status()
        assert status["engines"] == [{"digest": "dense", "running": 0, "pid": None}]

    run(eager, work)


def pack_only(config: ServeConfig, *, base: str = "dense") -> Path:
    """Let variant "two" lie packed only; return the file."""
    folder = Path(config.data) / "variants" / "run" / "two"
    file = folder.with_name("two.pack")
    write_container(file, folder_drafts(folder), base_digest=base, facts={}, link=Link())
    shutil.rmtree(folder)
    return file


def test_a_variant_that_lies_packed_only_answers_as_others_do(config: ServeConfig) -> None:
    file = pack_only(config)

    async def work(models: Models, engine: StreamingEcho) -> None:
        events = await talk(models, call("run:two"))
        assert isinstance(events[0], Began)
        assert events[0].fingerprint == f"fp_{read_header(file).digest[:16]}"
        assert text(events).startswith("two.pack")
        assert text(await talk(models, call("run:one"))).startswith("one")
        failed = (await talk(models, call("run:two", "x" * 64)))[-1]
        assert isinstance(failed, Failed)
        assert failed.code == "context_length_exceeded", "its own tokenizer and context"
        file.unlink()
        failed = (await talk(models, call("run:two")))[-1]
        assert isinstance(failed, Failed)
        assert failed.code == "model_not_found"

    run(config, work)


@pytest.mark.parametrize("runs_already", [True, False])
def test_a_damaged_container_names_its_tensor_and_nothing_is_loaded(
    config: ServeConfig, runs_already: bool
) -> None:
    file = pack_only(config)
    header, data = read_header(file), bytearray(file.read_bytes())
    damaged = header.tensors[3]
    start = len(data) - header.packed_bytes + header.offsets()[header.entries.index(damaged)]
    data[start + damaged.packed_bytes // 2] ^= 1
    file.write_bytes(data)

    async def work(models: Models, engine: StreamingEcho) -> None:
        if runs_already:
            await talk(models, call("run:one"))
        failed = (await talk(models, call("run:two")))[-1]
        assert isinstance(failed, Failed)
        assert (failed.status, failed.code) == (500, "engine_refused")
        assert failed.message == f"{file} was altered: {damaged.name}; fetch it again"
        assert engine.switches == ["one"] * runs_already
        assert text(await talk(models, call("run:one"))).startswith("one")

    run(config, work)


def test_a_container_of_another_base_model_or_cut_short_is_refused_in_one_line(
    config: ServeConfig,
) -> None:
    file = pack_only(config, base="another")

    async def work(models: Models, engine: StreamingEcho) -> None:
        for reason in ("was packed from base model another, not dense", "is cut short"):
            failed = (await talk(models, call("run:two")))[-1]
            assert isinstance(failed, Failed)
            assert (failed.status, failed.code) == (500, "model_unusable")
            assert reason in failed.message
            assert "\n" not in failed.message
            file.write_bytes(file.read_bytes()[:-1])
        assert engine.switches == []

    run(config, work)


def test_what_killed_engines_held_is_removed_when_new_ones_are_made(config: ServeConfig) -> None:
    left = config.scratch_folder / "0" / "two-abc"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"unpacked")
    (engine,) = vllm_engines(config)
    assert not engine.alive
    assert not left.exists()
    assert (Path(config.data) / "variants" / "run" / "two" / "strategy.json").is_file()
