from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from serve.fleet import AnswerError, Fleet, Prompt, Target
from serve.scheduler import QueueFullError
from unicuco.engines import Checked, StreamingEngine, StreamSampling
from unicuco.testing.streaming_echo import StreamingEcho


@pytest.fixture
def targets(tmp_path: Path) -> list[Target]:
    """Eight variants."""
    made = []
    for number in range(8):
        folder = tmp_path / f"v{number}"
        folder.mkdir()
        (folder / "digest").write_text(f"digest-{number}")
        made.append(Target(folder=folder, digest=f"digest-{number}", family="f"))
    return made


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(bounded())


async def answer(
    fleet: Fleet, target: Target, text: str = "hi", *, tokens: int = 12, copies: int = 1
) -> list[str]:
    prompt = Prompt(tokens=tuple(text.encode()), sampling=StreamSampling(max_tokens=tokens))
    texts = [""] * copies
    async for pieces in fleet.generate(target, [prompt] * copies):
        for piece in pieces:
            texts[piece.index] += piece.delta.text
    return texts


def expected(target: Target, text: str = "hi", tokens: int = 12) -> str:
    whole = f"{target.folder.name}: {text}"
    return (whole * tokens)[:tokens]


def test_echo_keeps_the_protocol() -> None:
    async def work() -> None:
        assert isinstance(StreamingEcho(), StreamingEngine)

    run(work)


def test_an_answer_comes_from_the_variant_that_was_asked(targets: list[Target]) -> None:
    async def work() -> None:
        fleet = Fleet([StreamingEcho()])
        for target in (targets[0], targets[1], targets[0]):
            assert await answer(fleet, target, copies=2) == [expected(target)] * 2
        await fleet.close()

    run(work)


def test_eight_variants_on_two_engines_under_load_and_kills_are_never_mixed(
    targets: list[Target],
) -> None:
    async def work() -> None:
        draw = random.Random(1)
        engines = [StreamingEcho(token_s=0.001, switch_s=0.005, start_s=0.05) for _ in range(2)]
        fleet = Fleet(engines, slots=4, patience_s=0.05, first_pause_s=0.01)
        lost: list[str] = []

        async def client(number: int) -> None:
            for turn in range(12):
                target = targets[draw.randrange(8)]
                text = f"{number}-{turn}"
                try:
                    assert await answer(fleet, target, text, tokens=20) == [
                        expected(target, text, 20)
                    ]
                except AnswerError as error:
                    lost.append(error.kind)

        async def killer() -> None:
            for _ in range(4):
                await asyncio.sleep(0.15)
                engines[draw.randrange(2)].kill()

        await asyncio.gather(killer(), *(client(number) for number in range(16)))
        assert all(engine.broken_promises == [] for engine in engines)
        assert set(lost) <= {"lost"}
        assert len(lost) <= 4 * 4  # what had begun on the engine that was killed, and nothing else
        turns = sum(len(engine.switches) for engine in engines)
        assert turns < 16 * 12 / 2  # grouped: far fewer switches than requests
        assert fleet.num_queued == 0
        await fleet.close()

    run(work)


def test_a_request_whose_engine_dies_before_its_first_token_is_tried_again(
    targets: list[Target],
) -> None:
    async def work() -> None:
        engine = StreamingEcho(token_s=0.2)
        fleet = Fleet([engine], first_pause_s=0.01)
        waiting = asyncio.create_task(answer(fleet, targets[0], tokens=3))
        await asyncio.sleep(0.1)
        assert engine.num_running == 1
        engine.kill()
        assert await waiting == [expected(targets[0], tokens=3)]
        assert engine.starts == 2
        await fleet.close()

    run(work)


def test_one_that_has_begun_ends_with_a_clear_error(targets: list[Target]) -> None:
    async def work() -> None:
        engine = StreamingEcho(token_s=0.05)
        fleet = Fleet([engine], first_pause_s=0.01)
        prompt = Prompt(tokens=(1, 2), sampling=StreamSampling(max_tokens=20))
        pieces = fleet.generate(targets[0], [prompt])
        assert (await anext(pieces))[0].delta.text
        engine.kill()
        with pytest.raises(AnswerError, match="died in the middle of the answer"):
            await anext(pieces)
        await fleet.close()

    run(work)


def test_a_request_that_kills_every_engine_is_given_up(targets: list[Target]) -> None:
    async def work() -> None:
        class Poisoned(StreamingEcho):
            async def generate(self, prompt, sampling):  # type: ignore[no-untyped-def, override]
                if prompt[0] == 0:
                    self.kill()
                async for delta in super().generate(prompt, sampling):
                    yield delta

        engine = Poisoned()
        fleet = Fleet([engine], max_tries=3, first_pause_s=0.01)
        with pytest.raises(AnswerError, match="3 engines died"):
            await answer(fleet, targets[0], "\0")
        assert await answer(fleet, targets[0]) == [expected(targets[0])]
        await fleet.close()

    run(work)


def test_an_engine_that_dies_with_nothing_to_do_is_started_again(targets: list[Target]) -> None:
    async def work() -> None:
        engine = StreamingEcho()
        fleet = Fleet([engine], first_pause_s=0.01)
        await answer(fleet, targets[0])
        engine.kill()
        while engine.starts < 2:
            await asyncio.sleep(0.01)
        assert [status.digest for status in fleet.status] == [targets[0].digest]
        await fleet.close()

    run(work)


def test_an_engine_that_nobody_needs_is_stopped_and_started_again_by_the_next_request(
    targets: list[Target],
) -> None:
    async def work() -> None:
        engines = [StreamingEcho(), StreamingEcho()]
        fleet = Fleet(engines, slots=1, first_pause_s=0.01, min_engines=1, idle_stop_s=0.1)
        fleet.warm(targets[0])
        await asyncio.sleep(0.05)
        assert [engine.starts for engine in engines] == [1, 0]
        assert await asyncio.gather(*(answer(fleet, t) for t in targets[:2])) == [
            [expected(target)] for target in targets[:2]
        ]
        await asyncio.sleep(0.4)
        assert sum(engine.alive for engine in engines) == 1
        assert sum(status.digest is not None for status in fleet.status) == 1
        starts = sum(engine.starts for engine in engines)
        assert await answer(fleet, targets[0]) == [expected(targets[0])]
        assert sum(engine.starts for engine in engines) == starts  # a switch is cheaper
        fleet = Fleet([StreamingEcho()], idle_stop_s=0.05)
        for number in (1, 2):
            assert await answer(fleet, targets[0]) == [expected(targets[0])]
            assert fleet.status[0].digest is not None
            await asyncio.sleep(0.2)
            assert fleet.status[0].digest is None, number
        await fleet.close()

    run(work)


def test_a_failed_switch_takes_the_engine_out_starts_it_again_and_nobody_notices(
    targets: list[Target],
) -> None:
    async def work() -> None:
        engine = StreamingEcho()
        fleet = Fleet([engine], first_pause_s=0.01)
        await answer(fleet, targets[0])
        engine.fail_next_switch = True
        assert await answer(fleet, targets[1]) == [expected(targets[1])]
        assert engine.starts == 2
        await fleet.close()

    run(work)


@pytest.mark.parametrize("runs_already", [True, False])
def test_a_bug_while_switching_ends_the_answer_and_is_not_tried_for_ever(
    targets: list[Target], runs_already: bool
) -> None:
    class Buggy(StreamingEcho):
        tries = 0

        async def serve(self, folder: Path) -> Checked:
            if folder == targets[1].folder:
                self.tries += 1
                raise KeyError("a bug")
            return await super().serve(folder)

    async def work() -> None:
        engine = Buggy()
        fleet = Fleet([engine], first_pause_s=0.01)
        if runs_already:
            await answer(fleet, targets[0])
        with pytest.raises(AnswerError, match="unexpected KeyError"):
            await answer(fleet, targets[1])
        assert engine.tries <= 3
        assert await answer(fleet, targets[0]) == [expected(targets[0])]
        await fleet.close()

    run(work)


def test_an_altered_variant_is_refused_and_the_engine_serves_on(targets: list[Target]) -> None:
    async def work() -> None:
        engine = StreamingEcho()
        fleet = Fleet([engine])
        await answer(fleet, targets[0])
        (targets[1].folder / "digest").write_text("broken")
        with pytest.raises(AnswerError, match="altered") as caught:
            await answer(fleet, targets[1])
        assert caught.value.kind == "refused"
        (targets[2].folder / "digest").write_text("another")
        with pytest.raises(AnswerError, match="replaced meanwhile"):
            await answer(fleet, targets[2])
        assert await answer(fleet, targets[0]) == [expected(targets[0])]
        assert engine.starts == 1
        await fleet.close()

    run(work)


def test_what_is_there_together_is_yielded_together_and_in_order(targets: list[Target]) -> None:
    async def work() -> None:
        fleet = Fleet([StreamingEcho(token_s=0.01)])
        prompt = Prompt(tokens=(65,), sampling=StreamSampling(max_tokens=6))
        texts = [""] * 8
        num_yields = 0
        async for pieces in fleet.generate(targets[0], [prompt] * 8):
            num_yields += 1
            await asyncio.sleep(0.03)  # as one who can't keep up
            for piece in pieces:
                texts[piece.index] += piece.delta.text
        assert texts == [expected(targets[0], "A", 6)] * 8
        assert num_yields <= 6  # one by one they would have been 48
        await fleet.close()

    run(work)


def test_the_pieces_before_a_failure_are_yielded_before_it(targets: list[Target]) -> None:
    async def work() -> None:
        engine = StreamingEcho(token_s=0.01)
        fleet = Fleet([engine], first_pause_s=0.01)
        prompt = Prompt(tokens=(65,), sampling=StreamSampling(max_tokens=50))
        answers = fleet.generate(targets[0], [prompt])
        text = (await anext(answers))[0].delta.text
        await asyncio.sleep(0.05)
        engine.kill()
        await asyncio.sleep(0.05)
        text += "".join(piece.delta.text for piece in await anext(answers))
        with pytest.raises(AnswerError, match="died in the middle of the answer"):
            await anext(answers)
        assert len(text) > 1
        assert expected(targets[0], "A", 50).startswith(text)
        await fleet.close()

    run(work)


def test_a_caller_who_leaves_aborts_the_request_running_or_waiting(targets: list[Target]) -> None:
    async def work() -> None:
        engine = StreamingEcho(token_s=0.01)
        fleet = Fleet([engine], slots=1)
        running = asyncio.create_task(answer(fleet, targets[0], tokens=1000))
        waiting = asyncio.create_task(answer(fleet, targets[0], tokens=1000))
        await asyncio.sleep(0.1)
        assert (engine.num_running, fleet.num_queued) == (1, 1)
        waiting.cancel()
        await asyncio.sleep(0)
        assert fleet.num_queued == 0
        running.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert (engine.num_running, engine.aborted) == (0, 1)
        assert await answer(fleet, targets[1]) == [expected(targets[1])]
        await fleet.close()

    run(work)


def test_a_full_queue_refuses_and_serves_what_it_took(targets: list[Target]) -> None:
    async def work() -> None:
        fleet = Fleet([StreamingEcho(token_s=0.005)], slots=1, max_queued=2)
        taken = [asyncio.create_task(answer(fleet, targets[0])) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await answer(fleet, targets[0], copies=2)
        assert await asyncio.gather(*taken) == [[expected(targets[0])]] * 2
        await fleet.close()

    run(work)


def test_a_starving_variant_gets_its_turn_under_a_constant_stream_of_another(
    targets: list[Target],
) -> None:
    async def work() -> None:
        fleet = Fleet([StreamingEcho(token_s=0.002)], slots=4, patience_s=0.2)

        async def hog() -> None:
            while True:
                await answer(fleet, targets[0], tokens=20)

        hogs = [asyncio.create_task(hog()) for _ in range(8)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(30):
            await answer(fleet, targets[1], tokens=5)
        for task in hogs:
            task.cancel()
        await asyncio.gather(*hogs, return_exceptions=True)
        await fleet.close()

    run(work)


def test_closing_ends_what_runs_and_waits_with_an_error(targets: list[Target]) -> None:
    async def work() -> None:
        fleet = Fleet([StreamingEcho(token_s=0.01)], slots=1)
        tasks = [asyncio.create_task(answer(fleet, targets[0], tokens=500)) for _ in range(2)]
        await asyncio.sleep(0.1)
        await fleet.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, AnswerError)

    run(work)
