"""What every text engine offers, and what it answers. What it does not know: vLLM, models, HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from unicuco.errors import RequestError

FINISH_REASONS: Final = ("stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt's answer.

    ``text`` excludes the prompt; ``token_ids`` are the new tokens; ``finish_reason`` is "stop" when
    the model ended the text itself and "length" when ``max_tokens`` or the model's context ended
    it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str

    def to_dict(self) -> dict[str, object]:
        """Return the document that ``unicuco generate --json`` prints."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to continue a prompt.

    ``max_tokens``: new tokens at most, >= 1. ``temperature``: in [0, 100], 0 = greedy. ``seed``
    decides what is drawn at temperatures above 0.

    Raises:
        RequestError: a value outside its range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= 100:  # also refuses NaN
            raise RequestError(f"temperature must be in [0, 100], got {self.temperature:g}")


@runtime_checkable
class TextEngine(Protocol):
    """Serves the text of one model folder at a time."""

    name: str

    @property
    def folder(self) -> Path | None:
        """The folder being served, or none."""
        ...

    def load(self, folder: Path) -> None:
        """Serve a Hugging Face folder with safetensors weights, in place where shapes allow it.

        Raises:
            EngineError: the folder holds no model, or the engine can't serve it. What was served
                before is still served when the folder itself was refused.
            VariantError: the folder is a variant with a missing or altered file; likewise.
        """
        ...

    def switch(self, folder: Path) -> None:
        """Serve another folder of equal shapes without a restart.

        Raises:
            EngineError: nothing is loaded, or the folder differs in more than the values of its
                weights.
        """
        ...

    def generate(
        self, prompts: Sequence[str], sampling: Sampling | None = None
    ) -> list[Generation]:
        """Continue every prompt; answers stand in the prompts' order. Default: 64 tokens, greedy.

        Raises:
            RequestError: a prompt is empty or longer than the context.
            EngineError: nothing is loaded, or the engine died.
        """
        ...

    def check_health(self) -> None:
        """Return when the engine can answer now.

        Raises:
            EngineError: it can't.
        """
        ...

    def close(self) -> None:
        """Give back every process and byte; closing twice is allowed, and loading again too."""
        ...


def check_prompt_lengths(lengths: Sequence[int], *, context: int) -> None:
    """Refuse prompts that leave no room for one new token.

    Args:
        lengths: tokens in each prompt.
        context: tokens that the engine holds per prompt and answer together.

    Raises:
        RequestError: one line that names the first such prompt.
    """
    for index, length in enumerate(lengths):
        if length == 0:
            raise RequestError(f"prompt {index} is empty; give at least one token of text")
        if length >= context:
            raise RequestError(
                f"prompt {index} has {length} tokens, but prompt and answer share a context of "
                f"{context}; shorten the prompt"
            )
