"""A `StreamingEngine` without a model: it answers with the folder's name and the prompt.

It keeps the promises that a fleet relies on and notes when one is broken: a switch while something
runs, or a token of another folder in the middle of an answer. It can be killed. What it does not
know: weights; it only checks that they are there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

from unicuco.engines import Checked, Delta, StreamSampling
from unicuco.engines.folder import FolderFacts, read_facts
from unicuco.engines.holding import hold
from unicuco.errors import EngineError, VariantError

_CONTEXT: Final = 2048


class StreamingEcho:
    """Serves any model folder or container, each by its own digest, checked as by any engine.

    Like any engine it starts anew for what can't be switched to in place. A folder that holds a
    file ``digest`` is served by that, unchecked; one whose digest is "broken" is refused.

    Args:
        token_s: seconds per token.
        switch_s: seconds per switch.
        start_s: seconds per start.
    """

    name = "echo"

    def __init__(
        self, *, token_s: float = 0.0, switch_s: float = 0.0, start_s: float = 0.0
    ) -> None:
        self._token_s = token_s
        self._switch_s = switch_s
        self._start_s = start_s
        self._folder: Path | None = None
        self._facts: FolderFacts | None = None
        self._died = asyncio.Event()
        self.num_running = 0
        self.switches: list[str] = []
        self.starts = 0
        self.aborted = 0
        self.broken_promises: list[str] = []
        self.fail_next_switch = False

    @property
    def alive(self) -> bool:
        """Whether something is loaded."""
        return self._folder is not None

    @property
    def pid(self) -> int | None:
        """None: it has no process."""
        return None

    def kill(self) -> None:
        """End as a process that is killed: every stream fails."""
        self._folder = None
        self._died.set()

    async def serve(self, folder: Path) -> Checked:
        """See `StreamingEngine.serve`."""
        if self.num_running:
            self.broken_promises.append(f"switched to {folder.name} while something ran")
        digest, facts = _inspect(folder)
        starts = not self.alive or _differ(self._facts, facts)
        await asyncio.sleep(self._start_s if starts else self._switch_s)
        if self.fail_next_switch:
            self.fail_next_switch = False
            self.kill()
            raise EngineError("the switch failed, and the engine was closed")
        if starts:
            self.starts += 1
            self._died = asyncio.Event()
        self._folder, self._facts = folder, facts
        self.switches.append(folder.name)
        return Checked(path=folder, digest=digest, context=_CONTEXT, num_bytes=1)

    async def generate(
        self, prompt: tuple[int, ...], sampling: StreamSampling
    ) -> AsyncGenerator[Delta, None]:
        """See `StreamingEngine.generate`: the folder's name, a colon, and the prompt again."""
        folder = self._folder
        if folder is None:
            raise EngineError("nothing is loaded; call serve first")
        answer = [*f"{folder.name}: ".encode(), *prompt]
        answer = (answer * (sampling.max_tokens // len(answer) + 1))[: sampling.max_tokens]
        self.num_running += 1
        finished = False
        try:
            for place, token in enumerate(answer, start=1):
                await asyncio.sleep(self._token_s)
                if self._died.is_set():
                    finished = True
                    raise EngineError("the engine's process ended")
                if self._folder != folder:
                    self.broken_promises.append(f"{folder.name} was switched in mid-answer")
                finished = place == len(answer)
                reason = "length" if finished else None
                yield Delta(text=chr(token), token_ids=(token,), finish_reason=reason)
        finally:
            self.num_running -= 1
            self.aborted += not finished

    async def check_health(self) -> None:
        """See `StreamingEngine.check_health`."""
        if self._folder is None:
            raise EngineError("the engine's process ended")

    async def wait_dead(self) -> None:
        """See `StreamingEngine.wait_dead`."""
        await self._died.wait()

    async def close(self) -> None:
        """See `StreamingEngine.close`."""
        self.kill()


def _inspect(model: Path) -> tuple[str, FolderFacts | None]:
    """Return what names the contents, and what decides whether they can be switched to."""
    held = hold(model, None)
    note = held.folder / "digest"
    try:
        if note.is_file():
            if note.read_text() == "broken":
                raise VariantError(f"{model} was altered")
            return held.packed_digest or note.read_text(), None
        if not (held.folder / "config.json").is_file():
            raise VariantError(f"{model} is no variant")
        return held.digest(), read_facts(held.folder)
    finally:
        held.release()


def _differ(before: FolderFacts | None, after: FolderFacts | None) -> bool:
    return before is not None and after is not None and before.difference(after) is not None
