"""A real text engine without a model: it answers with the prompt, so a test knows what it must say.

Tokens are bytes, so every model folder fits. What it does not know: weights; it only checks that
they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from unicuco.engines.folder import FolderFacts, read_facts
from unicuco.engines.protocol import Generation, Sampling, check_prompt_lengths
from unicuco.errors import EngineError

_CONTEXT: Final = 2048  # where a model states none


class EchoEngine:
    """A `TextEngine` that answers ``FOLDER: PROMPT``, then stops, at any temperature.

    ``FOLDER`` is the name of the folder being served, so that answers show which variant gave them.
    """

    name = "echo"

    def __init__(self) -> None:
        self._facts: FolderFacts | None = None

    @property
    def folder(self) -> Path | None:
        """The folder being served, or none."""
        return None if self._facts is None else self._facts.path

    def load(self, folder: Path) -> None:
        """See `TextEngine.load`."""
        self._facts = read_facts(folder)

    def switch(self, folder: Path) -> None:
        """See `TextEngine.switch`."""
        self._facts = self._loaded().replaced_by(read_facts(folder))

    def generate(
        self, prompts: Sequence[str], sampling: Sampling | None = None
    ) -> list[Generation]:
        """See `TextEngine.generate`."""
        facts = self._loaded()
        lengths = [len(prompt.encode()) for prompt in prompts]
        context = facts.context or _CONTEXT
        check_prompt_lengths(lengths, context=context)
        most = (sampling or Sampling()).max_tokens
        return [
            _echo(f"{facts.path.name}: {prompt}".encode(), min(most, context - length))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]

    def check_health(self) -> None:
        """See `TextEngine.check_health`."""
        self._loaded()

    def close(self) -> None:
        """See `TextEngine.close`."""
        self._facts = None

    def _loaded(self) -> FolderFacts:
        if self._facts is None:
            raise EngineError("nothing is loaded; call load first")
        return self._facts


def _echo(answer: bytes, most: int) -> Generation:
    tokens = answer[:most]
    return Generation(
        text=tokens.decode(errors="ignore"),
        token_ids=tuple(tokens),
        finish_reason="stop" if len(answer) <= most else "length",
    )
