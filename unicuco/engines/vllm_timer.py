"""How long vLLM's decoding takes for a shape: of ``config.json`` alone, weights are made up.

The engine runs in a process of its own, with the options of the one that serves. What it does not
know: what is compared with what.
"""

from __future__ import annotations

from pathlib import Path

from unicuco.engines.decoding import DecodeLoad, median_ms, step_question
from unicuco.engines.vllm_engine import START_S, VllmChild, VllmOptions, require_vllm
from unicuco.errors import EngineError, RequestError


class DecodeTimer(VllmChild):
    """A `Decoder` of one shape at a time. One process while something is loaded, none otherwise.

    Args:
        options: of the engine.
        max_batch: sequences that are decoded at a time, at most.
        context: tokens of each, at most.
    """

    def __init__(self, options: VllmOptions, *, max_batch: int, context: int) -> None:
        super().__init__(options)
        self._max_batch = max_batch
        self._context = context

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
            self._start("unicuco.engines.vllm_timer_worker")
        question = {
            "op": "load",
            "folder": str(folder.resolve()),
            "context": self._context,
            "max_batch": self._max_batch,
            "eager": self.options.eager,
            "memory_fraction": self.options.memory_fraction,
        }
        try:
            answer = self._ask(question, timeout_s=START_S)
        except (EngineError, RequestError) as error:
            self.close()
            raise EngineError(f"vLLM can't run {folder / 'config.json'}: {error}") from None
        return {name: str(value) for name, value in answer.items()}

    def step_ms(self, load: DecodeLoad) -> float:
        """See `Decoder.step_ms`."""
        return median_ms(self._ask(step_question(load), timeout_s=START_S))
