"""Prompts and conversations -> token ids, in a model's own tokenizer.

A conversation is written by the model's chat template. A model without one (a base model) gets a
plain form: a line ``User: …`` or ``Assistant: …`` per message, and the answer ends where it would
go on as the user. What this module does not know: engines, HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jinja2 import TemplateError

from unicuco.engines.folder import read_context
from unicuco.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES: Final = {
    "system": "System",
    "developer": "System",
    "user": "User",
    "assistant": "Assistant",
    "tool": "Tool",
}
ROLES: Final = tuple(_NAMES)
_NO_CONTEXT: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message; ``role`` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A prompt in tokens, and what beside the caller's own texts ends its answer."""

    tokens: tuple[int, ...]
    stop: tuple[str, ...] = ()


class Texts:
    """One model's tokenizer and context.

    Args:
        folder: a model or variant.

    Raises:
        ModelError: it holds no tokenizer that can be read.
        EngineError: it holds no config.json that can be read.
    """

    def __init__(self, folder: Path) -> None:
        from unicuco.models import load_tokenizer

        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self.context = read_context(folder) or _NO_CONTEXT
        self.vocabulary_size = len(self._tokenizer)

    def write(self, prompt: str) -> Written:
        """Return a prompt's tokens, with what the tokenizer puts in front of every text."""
        return Written(tokens=tuple(self._tokenizer(prompt)["input_ids"]))

    def take(self, tokens: tuple[int, ...]) -> Written:
        """Return a prompt that was given as token ids.

        Raises:
            RequestError: an id that the model does not have.
        """
        if any(not 0 <= token < self.vocabulary_size for token in tokens):
            raise RequestError(f"prompt: token ids must lie in [0, {self.vocabulary_size - 1}]")
        return Written(tokens=tokens)

    def write_chat(self, messages: tuple[ChatMessage, ...]) -> Written:
        """Return a conversation's tokens, up to where the assistant's answer begins.

        Raises:
            RequestError: the model's template does not take this conversation.
        """
        if not self._tokenizer.chat_template:
            plain, stop = plain_chat(messages)
            return Written(tokens=self.write(plain).tokens, stop=stop)
        spoken = [{"role": message.role, "content": message.content} for message in messages]
        try:
            # In a sandbox of transformers' own: the template came with the model.
            text = self._tokenizer.apply_chat_template(
                spoken, tokenize=False, add_generation_prompt=True
            )
            assert isinstance(text, str)
        except TemplateError as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"the model's chat template refuses messages: {reason}") from None
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return Written(tokens=tuple(ids))


def plain_chat(messages: tuple[ChatMessage, ...]) -> tuple[str, tuple[str, ...]]:
    """Return a conversation as plain text, and what ends its answer."""
    lines = [f"{_NAMES[message.role]}: {message.content.strip()}\n" for message in messages]
    return "".join(lines) + "Assistant:", ("\nUser:",)
