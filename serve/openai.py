"""OpenAI's shapes: bodies of the two text routes, and the documents that answer them.

What is not offered (tools, images, logprobs, …) is an unknown field and refused as everywhere.
``return_token_ids`` is vLLM's extension: each choice then carries the ids of its tokens. What this
module does not know: models, engines.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, model_validator

from serve.fleet import Piece
from serve.models import Began, Said, TalkCall
from serve.schema import Body
from serve.texts import ChatMessage
from unicuco.engines import StreamSampling
from unicuco.errors import RequestError

_DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's
_LONGEST_PROMPT: Final = 1 << 19
_MOST_PARTS: Final = 256
_MOST_COPIES: Final = 32

Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=_LONGEST_PROMPT)]
Text = Annotated[str, Field(max_length=_LONGEST_PROMPT)]
Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool = False


class TextBody(Body):
    """What both routes take."""

    model: str = Field(
        max_length=128, description="`RUN_ID:suffix`, or `RUN_ID` for the run's dense model."
    )
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=_MOST_COPIES)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63 - _MOST_COPIES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = 0.0
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    return_token_ids: bool | None = False

    def sampling(self) -> StreamSampling:
        """Return how to continue.

        Raises:
            RequestError: a value outside its range.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return StreamSampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stop,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the count of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_copies(self) -> int:
        """Answers to each prompt."""
        return self.n or 1


class CompletionBody(TextBody):
    """A text to be continued."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "run:my-variant", "prompt": "def main():", "max_tokens": 32}]
        }
    )

    prompt: Text | Tokens | Annotated[list[Text | Tokens], Field(max_length=_MOST_PARTS)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = _DEFAULT_COMPLETION_TOKENS

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The texts, each as it came: text or token ids."""
        given = self.prompt
        if isinstance(given, str):
            return (given,)
        if given and isinstance(given[0], int):
            return (tuple(token for token in given if isinstance(token, int)),)
        return tuple(p if isinstance(p, str) else tuple(p) for p in given if not isinstance(p, int))

    def to_domain(self) -> TalkCall:
        """Return the call.

        Raises:
            RequestError: nothing to continue, or a value outside its range.
        """
        if not self.prompts:
            raise RequestError("prompt: give at least one text")
        return TalkCall(
            model=self.model,
            prompts=self.prompts,
            copies=self.num_copies,
            max_tokens=self.max_tokens,
            sampling=self.sampling(),
        )


class ContentPart(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class MessageBody(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(max_length=_MOST_PARTS)]
    name: Annotated[str, Field(max_length=64)] | None = None

    def to_domain(self) -> ChatMessage:
        """Return the message, its parts put together."""
        given = self.content
        text = given if isinstance(given, str) else "".join(part.text for part in given)
        return ChatMessage(role=self.role, content=text)


class ChatBody(TextBody):
    """A conversation to be answered."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "run:my-variant",
                    "messages": [{"role": "user", "content": "What does main() do?"}],
                    "max_completion_tokens": 64,
                }
            ]
        }
    )

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=_MOST_PARTS)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _has_one_limit(self) -> "ChatBody":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or the older max_tokens, not both")
        return self

    def to_domain(self) -> TalkCall:
        """Return the call.

        Raises:
            RequestError: a value outside its range.
        """
        return TalkCall(
            model=self.model,
            messages=tuple(message.to_domain() for message in self.messages),
            copies=self.num_copies,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            sampling=self.sampling(),
        )


class Answer:
    """One call's answer, as documents: whole, or chunk by chunk.

    Args:
        request_id: ends up in ``id``.
        body: what was asked.
        began: what the engine said first.
    """

    def __init__(self, request_id: str, body: TextBody, began: Began) -> None:
        self._is_chat = isinstance(body, ChatBody)
        self._body = body
        self._began = began
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{request_id}",
            "object": "",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": began.fingerprint,
        }
        prompts = 1 if isinstance(body, ChatBody) else len(getattr(body, "prompts", ()))
        num_choices = prompts * body.num_copies
        self._texts = [""] * num_choices
        self._tokens: list[list[int]] = [[] for _ in range(num_choices)]
        self._reasons: list[str | None] = [None] * num_choices
        self._greeted: set[int] = set()

    # Any: JSON documents
    def add(self, said: Said) -> None:
        """Take the next pieces into the whole answer."""
        for piece in said.pieces:
            index, delta = piece.index, piece.delta
            self._texts[index] += delta.text
            self._tokens[index].extend(delta.token_ids)
            self._reasons[index] = delta.finish_reason or self._reasons[index]

    def whole(self) -> dict[str, Any]:
        """Return the answer when all is said."""
        choices = [
            self._choice(index, text, reason, tokens, is_whole=True)
            for index, (text, reason, tokens) in enumerate(
                zip(self._texts, self._reasons, self._tokens, strict=True)
            )
        ]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    def chunks(self, said: Said) -> Iterator[dict[str, Any]]:
        """Return the chunks of the next pieces; a chat's first one names who speaks."""
        self.add(said)
        for piece in said.pieces:
            yield from self._piece_chunks(piece)

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """Return what follows the last piece: the usage, if it was asked for."""
        if self._body.includes_usage:
            yield {**self._chunk([]), "usage": self._usage()}

    def _piece_chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        index, delta = piece.index, piece.delta
        if self._is_chat and index not in self._greeted:
            self._greeted.add(index)
            first = {"index": index, "delta": {"role": "assistant", "content": ""}}
            yield self._chunk([{**first, "logprobs": None, "finish_reason": None}])
        yield self._chunk([self._choice(index, delta.text, delta.finish_reason, delta.token_ids)])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        usage = {"usage": None} if self._body.includes_usage else {}
        return {**self._head, "object": kind, "choices": choices, **usage}

    def _choice(
        self,
        index: int,
        text: str,
        reason: str | None,
        tokens: Iterable[int],
        *,
        is_whole: bool = False,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
        if not self._is_chat:
            choice["text"] = text
        elif is_whole:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["delta"] = {"content": text}
        if self._body.return_token_ids:
            choice["token_ids"] = list(tokens)
        return choice

    def _usage(self) -> dict[str, int]:
        asked, said = self._began.prompt_tokens, sum(map(len, self._tokens))
        return {
            "prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said
        }  # fmt: skip
