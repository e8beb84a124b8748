"""How long vLLM's decoding takes for a shape: of ``config.json`` alone, weights are made up.

The engine runs in a process of its own, with the options of the one that serves. What it does not
know: what is compared with what.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from unicuco.engines.child import ChildProcess
from unicuco.engines.decoding import DecodeLoad, median_ms, step_question
from unicuco.engines.vllm_engine import VllmOptions, require_vllm
from unicuco.errors import EngineError

_START_S: Final = 600.0  # imports alone take over a minute on a cold disk


class DecodeTimer:
    """A `Decoder` of one shape at a time. One process while something is loaded, none otherwise.

    Args:
        options: of the engine.
        max_batch: sequences that are decoded at a time, at most.
        context: tokens of each, at most.
    """

    def __init__(self, options: VllmOptions, *, max_batch: int, context: int) -> None:
        self._options = options
        self._max_batch = max_batch
        self._context = context
        self._child: ChildProcess | None = None

    def load(self, folder: Path) -> dict[str, str]:
        """Load a shape in place of what is loaded; the first takes about a minute.

        Args:
            folder: holds ``config.json``, and needs no more.

        Returns:
            What it runs on: ``device``, and vLLM's version as ``vllm``.

        Raises:
            EngineError: vLLM is not installed, or can't run the model.
        """
        require_vllm()
        if self._child is None:
            self._child = ChildProcess(
                # -P: the folder that the user stands in must not shadow a module
                [sys.executable, "-P", "-m", "unicuco.engines.vllm_timer_worker"],
                {**os.environ, **self._options.environment()},
            )
        question = {
            "op": "load",
            "folder": str(folder.resolve()),
            "context": self._context,
            "max_batch": self._max_batch,
            "eager": self._options.eager,
            "memory_fraction": self._options.memory_fraction,
        }
        try:
            answer = self._ask(question)
        except EngineError as error:
            self.close()
            raise EngineError(f"vLLM can't run {folder / 'config.json'}: {error}") from None
        return {name: str(value) for name, value in answer.items()}

    def step_ms(self, load: DecodeLoad) -> float:
        """See `Decoder.step_ms`."""
        return median_ms(self._ask(step_question(load)))

    def close(self) -> None:
        """End the process; closing twice is allowed, and loading again too."""
        if self._child is not None:
            self._child.close()
        self._child = None

    def __enter__(self) -> DecodeTimer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, question: Mapping[str, object]) -> dict[str, object]:
        if self._child is None:
            raise EngineError("nothing is loaded; call load first")
        answer = self._child.ask(question, timeout_s=_START_S)
        if "error" in answer:
            raise EngineError(str(answer["error"]))
        return answer
