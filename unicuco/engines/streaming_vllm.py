"""Many answers at once from one model folder through vLLM, switched in place, checked each time.

Two processes of its own (a front that holds vLLM's `AsyncLLM`, and vLLM's core), so a dying engine
takes nothing with it. `serve` is all a caller needs: the folder (or container, which is unpacked
for as long as it is served: `unicuco.engines.holding`) is checked against its own digests
and compared in its shapes before vLLM hears of it (other shapes would kill the core), then
switched to in place or loaded anew; afterwards the weights in memory (`unicuco.engines.sketch`) and
the answer to the canary prompt must be what transformers makes of the folder (models up to
``canary_bytes``), or what they were before.

What it does not know: HTTP, queues, which folder should be served when. Weights that are split over
several GPUs are not compared in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from unicuco.engines.canary import Expectation, canary_prompt
from unicuco.engines.folder import FolderFacts, read_facts
from unicuco.engines.holding import Held, hold
from unicuco.engines.sketch import Sketch, first_difference
from unicuco.engines.streaming import CANARY_TOKENS, Checked, Delta, StreamSampling
from unicuco.engines.streaming_child import StreamingChild
from unicuco.engines.vllm_engine import VllmOptions, require_vllm
from unicuco.errors import EngineError, VariantError

_PING_S: Final = 30.0
_SWITCH_S: Final = 600.0
_LEAST_CONTEXT: Final = 128  # where a model states none


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """A folder that passed every check that needs no engine."""

    facts: FolderFacts
    digest: str
    num_bytes: int
    canary: tuple[int, ...]


class StreamingVllmEngine:
    """A `StreamingEngine` on vLLM.

    Args:
        options: how vLLM runs.
        scratch: a folder in which models are held while they are served; see `hold`.
        known: folder digest -> what its engines must show; engines may share one.
        canary_bytes: models up to this size are also run by transformers once, to know it.
        start_timeout_s: for loading; imports alone take over a minute on a cold disk.
    """

    name = "vllm"

    def __init__(
        self,
        options: VllmOptions | None = None,
        *,
        scratch: Path | None = None,
        known: dict[str, Expectation] | None = None,
        canary_bytes: int = 1 << 30,
        start_timeout_s: float = 600.0,
    ) -> None:
        self.options = options or VllmOptions()
        self._scratch = scratch
        self._known = {} if known is None else known
        self._canary_bytes = canary_bytes
        self._start_timeout_s = start_timeout_s
        self._child: StreamingChild | None = None
        self._served: _Target | None = None
        self._held: Held | None = None
        self._context = 0
        self.switch_seconds: float | None = None

    @property
    def alive(self) -> bool:
        """Whether something is loaded and its process runs."""
        return self._served is not None and self._child is not None and self._child.alive

    @property
    def pid(self) -> int | None:
        """The id of the engine's process group while something is loaded."""
        return None if self._child is None else self._child.pid

    async def serve(self, folder: Path) -> Checked:
        """See `StreamingEngine.serve`. The first takes about a minute, nearly all of it imports."""
        started = time.perf_counter()
        require_vllm()
        threads = self.options.threads
        held = await asyncio.to_thread(hold, folder, self._scratch, threads=threads)
        try:
            target = await asyncio.to_thread(self._inspect, held)
            served = self._served
            if self.alive and served is not None and served.facts.difference(target.facts) is None:
                await self._switch(target)
            else:
                await self._load(target)
        except BaseException:
            await asyncio.to_thread(held.release)
            raise
        self._held, before = held, self._held
        self._served = target
        if before is not None:
            await asyncio.to_thread(before.release)
        self.switch_seconds = time.perf_counter() - started
        return Checked(
            path=folder, digest=target.digest, context=self._context, num_bytes=target.num_bytes
        )

    async def generate(
        self, prompt: tuple[int, ...], sampling: StreamSampling
    ) -> AsyncGenerator[Delta, None]:
        """See `StreamingEngine.generate`; greedy tokens equal Hugging Face's in float32."""
        chosen = {**dataclasses.asdict(sampling), "stop": list(sampling.stop)}
        if sampling.temperature == 0:
            chosen["seed"] = None
        question = {"op": "generate", "prompt": list(prompt), "sampling": chosen}
        async with contextlib.aclosing(self._alive_child().stream(question)) as lines:
            async for line in lines:
                if "error" in line:
                    raise EngineError(str(line["error"]))
                tokens, reason = line["token_ids"], line["finish_reason"]
                assert isinstance(tokens, list)
                yield Delta(
                    text=str(line["text"]),
                    token_ids=tuple(tokens),
                    finish_reason=None if reason is None else str(reason),
                )

    async def reload(self) -> float:
        """Reload the served weights without any check; return the seconds. For measurements."""
        served = self._served
        assert served is not None
        answer = await self._ask({"op": "reload", "folder": str(served.facts.path)}, _SWITCH_S)
        return float(str(answer["seconds"]))

    async def check_health(self) -> None:
        """See `StreamingEngine.check_health`."""
        await self._ask({"op": "ping"}, _PING_S)

    async def wait_dead(self) -> None:
        """See `StreamingEngine.wait_dead`."""
        if self._child is not None:
            await self._child.died.wait()

    async def close(self) -> None:
        """See `StreamingEngine.close`."""
        child, self._child = self._child, None
        held, self._held = self._held, None
        self._served = None
        if child is not None:
            await child.aclose()
        if held is not None:
            await asyncio.to_thread(held.release)

    async def _load(self, target: _Target) -> None:
        self.options.check_context(target.facts)
        await self.close()
        self._child = StreamingChild(
            # -P: the folder that the user stands in must not shadow a module
            [sys.executable, "-P", "-m", "unicuco.engines.streaming_worker"],
            {**os.environ, **self.options.environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )
        names = ("context", "eager", "num_gpus", "memory_fraction")
        fields = {name: getattr(self.options, name) for name in names}
        fields |= target.facts.engine_flags(self.options.dtype)
        question = {"op": "load", "folder": str(target.facts.path), **fields}
        try:
            answer = await self._ask(question, self._start_timeout_s)
            self._context = int(str(answer["context"]))
            expected = await self._expected(target)
            answer = await self._ask({"op": "show", "prompt": list(target.canary)}, _SWITCH_S)
            self._compare(target, answer, expected)
        except BaseException as error:
            await self.close()
            if isinstance(error, EngineError):
                raise EngineError(f"vLLM can't serve {target.facts.path.name}: {error}") from None
            raise

    async def _switch(self, target: _Target) -> None:
        expected = await self._expected(target)
        question = {
            "op": "switch", "folder": str(target.facts.path), "prompt": list(target.canary)
        }  # fmt: skip
        try:
            self._compare(target, await self._ask(question, _SWITCH_S), expected)
        except BaseException as error:
            await self.close()  # weights may be half old, half new: nothing may come of them
            if isinstance(error, EngineError):
                raise EngineError(
                    f"switching to {target.facts.path.name} failed, and the engine was closed: "
                    f"{error}"
                ) from None
            raise

    async def _expected(self, target: _Target) -> Expectation | None:
        """Return what the engine must show of a folder; none where nothing is known yet."""
        known = self._known.get(target.digest)
        if known is None and target.num_bytes <= self._canary_bytes:
            question = {
                "op": "expect", "folder": str(target.facts.path), "prompt": list(target.canary)
            }  # fmt: skip
            known = self._known[target.digest] = _shown(await self._ask(question, _SWITCH_S))
        return known

    def _compare(
        self, target: _Target, answer: Mapping[str, object], expected: Expectation | None
    ) -> None:
        found = _shown(answer)
        expected = self._known.setdefault(target.digest, found) if expected is None else expected
        if found.tokens[: len(expected.tokens)] != expected.tokens:
            raise EngineError(
                f"the canary was answered {list(found.tokens)}, expected {list(expected.tokens)}"
            )
        differs = first_difference(expected.weights, found.weights)
        if differs is not None:
            raise EngineError(f"{differs} in memory is not what the folder holds")

    async def _ask(self, question: Mapping[str, object], timeout_s: float) -> dict[str, object]:
        if self._child is None:
            raise EngineError("nothing is loaded; call serve first")
        answer = await self._child.request(question, timeout_s=timeout_s)
        if "error" in answer:
            raise EngineError(str(answer["error"]))
        return answer

    def _alive_child(self) -> StreamingChild:
        if self._child is None or self._served is None:
            raise EngineError("nothing is loaded; call serve first")
        return self._child

    def _inspect(self, held: Held) -> _Target:
        try:
            facts = read_facts(held.folder)
        except (EngineError, VariantError) as error:
            raise type(error)(str(error).replace(str(held.folder), str(held.named))) from None
        return _Target(
            facts=facts,
            digest=held.digest(),
            num_bytes=sum(file.stat().st_size for file in held.folder.glob("*.safetensors")),
            canary=self._canary_prompt(facts),
        )

    def _canary_prompt(self, facts: FolderFacts) -> tuple[int, ...]:
        if self._served is not None and self._served.facts.tokenizer == facts.tokenizer:
            return self._served.canary
        room = (self.options.context or facts.context or _LEAST_CONTEXT) - CANARY_TOKENS
        return canary_prompt(facts.path)[: max(1, room)]


def _shown(answer: Mapping[str, Any]) -> Expectation:  # Any: JSON
    return Expectation(tuple(answer["tokens"]), Sketch(**answer["weights"]))
