"""Text from variants, in OpenAI's shapes: ``/v1/completions`` and ``/v1/chat/completions``.

The status is decided when the first piece is there, so a full queue, an unknown variant or an
engine that could not be had is an error and no broken stream. A failure after that is one event
with the error envelope, and no ``[DONE]``.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve.catalogue import ModelId, UnknownModelError
from serve.errors import ApiError, envelope, not_found
from serve.models import Began, Failed, Said, TalkCall, TalkEvent
from serve.openai import Answer, ChatBody, CompletionBody, TextBody
from serve.service import Service, ServiceDependency
from unicuco.errors import RequestError

router = APIRouter(prefix="/v1", tags=["text"])

_STREAMS: Final[dict[int | str, dict[str, Any]]] = {  # Any: OpenAPI
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


@router.post("/completions", summary="Continue texts", responses=_STREAMS)
async def create_completion(
    body: CompletionBody, service: ServiceDependency, http: Request
) -> Response:
    """Continue every prompt with the model that is named, whole or as a stream."""
    return await _answer(body, _call(body, service), service, http)


@router.post("/chat/completions", summary="Answer a conversation", responses=_STREAMS)
async def create_chat_completion(
    body: ChatBody, service: ServiceDependency, http: Request
) -> Response:
    """Answer the last message.

    The conversation is written by the model's chat template. A model without one gets a line
    `User: …` or `Assistant: …` per message, and its answer ends before the next `User:`.
    """
    return await _answer(body, _call(body, service), service, http)


def _call(body: CompletionBody | ChatBody, service: Service) -> TalkCall:
    """Check what can be checked without a model's tokenizer."""
    try:
        call = body.to_domain()
    except RequestError as error:
        raise ApiError(422, "invalid_request", str(error)) from error
    options = service.config.engines
    if call.max_tokens is not None and call.max_tokens > options.max_tokens:
        raise ApiError(
            400,
            "max_tokens_too_large",
            f"an answer may have {options.max_tokens} tokens at most",
            param="max_tokens",
        )
    if max(1, len(call.prompts)) * call.copies > options.max_sequences:
        raise ApiError(
            413,
            "list_too_long",
            f"prompts times n may be {options.max_sequences} at most",
            param="prompt",
        )
    try:
        name = ModelId.parse(call.model)
        service.catalogue.find(name)
    except UnknownModelError:
        raise not_found("model", call.model) from None
    return call


async def _answer(body: TextBody, call: TalkCall, service: Service, http: Request) -> Response:
    if service.models is None:
        raise ApiError(503, "no_engine", "this service was started without text engines")
    request_id = http.headers.get("x-request-id", "unknown")
    events = _events(service, call)
    try:
        began = _checked(await anext(events))
        assert isinstance(began, Began)
        answer = Answer(request_id, body, began)
        first = _checked(await anext(events))
        assert isinstance(first, Said)
        if body.stream:
            stream = _stream(answer, first, events)
            return StreamingResponse(
                stream,
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        answer.add(first)
        async for event in events:
            said = _checked(event)
            assert isinstance(said, Said)
            answer.add(said)
        return JSONResponse(answer.whole())
    except BaseException:
        await events.aclose()
        raise


async def _events(service: Service, call: TalkCall) -> AsyncGenerator[TalkEvent, None]:
    """Yield what the models say; leaving early, for whatever reason, aborts the call."""
    assert service.models is not None
    response = service.models.options(stream=True).talk.remote(call)
    finished = False
    try:
        async for event in response:
            yield event
        finished = True
    finally:
        if not finished:
            response.cancel()


async def _stream(
    answer: Answer, first: Said, events: AsyncGenerator[TalkEvent, None]
) -> AsyncIterator[bytes]:
    try:
        yield b"".join(map(_sse, answer.chunks(first)))
        async for event in events:
            if isinstance(event, Failed):
                yield _sse(envelope(event.status, event.code, event.message, event.param))
                return
            assert isinstance(event, Said)
            yield b"".join(map(_sse, answer.chunks(event)))
        for chunk in answer.last_chunks():
            yield _sse(chunk)
        yield b"data: [DONE]\n\n"
    except (RayError, RayServeException):
        yield _sse(envelope(503, "engine_lost", "the part of the service that talks was lost"))
    finally:
        await events.aclose()


def _checked(event: TalkEvent) -> TalkEvent:
    if not isinstance(event, Failed):
        return event
    raise ApiError(
        event.status,
        event.code,
        event.message,
        param=event.param,
        retry_after_s=event.retry_after_s,
    )


# Any: a JSON document
def _sse(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n".encode()
