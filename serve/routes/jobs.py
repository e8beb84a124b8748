"""Compression jobs: asked for, watched, cancelled."""

import asyncio
import hashlib
import json
import re
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from serve.asks import Ask
from serve.errors import ApiError, from_domain, not_found, overloaded
from serve.routes.names import conflict, served_run
from serve.schema import EventList, JobBody, JobList, JobObject
from serve.service import Service, ServiceDependency
from unicuco.errors import UnicucoError
from unicuco.store import (
    JobConflictError,
    JobEvent,
    JobStatus,
    JobStore,
    NewJob,
    QueueFullError,
    UnknownJobError,
)
from unicuco.types import Request as CompressRequest

router = APIRouter(prefix="/v1/compression", tags=["jobs"])

_JOB_ID: Final = re.compile(r"cjob-[0-9a-f]{24}")
_POLL_S: Final = 0.25
_BEAT_EVERY: Final = 40  # polls between comments that keep idle connections open
_FINAL: Final = frozenset(status.value for status in JobStatus if status.is_final)


@router.post(
    "/jobs",
    status_code=202,
    summary="Ask for a variant",
    response_model=JobObject,
)
async def create_job(
    body: JobBody,
    service: ServiceDependency,
    http: Request,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=255, description="Asked again, it is the same job."),
    ] = None,
) -> Response:
    """Plan the variant, queue its job and answer with both; the same key and body give one job."""
    run_id = served_run(service, body.model)
    request = body.to_domain()
    suffix = body.suffix or f"v-{secrets.token_hex(8)}"
    new = NewJob(
        model=run_id,
        compressed_model=f"{run_id}:{suffix}",
        request=request,
        prediction=await _prediction(service, run_id, request),
        idempotency_key=None if idempotency_key is None else _scoped(http, idempotency_key),
        body_digest=_digest(run_id, request, body.suffix),
    )
    bound = service.config.bounds.max_active_jobs
    try:
        job = await service.store(lambda jobs: jobs.submit(new, max_active=bound))
    except JobConflictError as error:
        param = "suffix" if error.code == "name_taken" else "Idempotency-Key"
        raise conflict(error.code, str(error), param) from error
    except QueueFullError as error:
        raise overloaded(str(error), retry_after_s=5, status=429) from error
    headers = {"Location": f"/v1/compression/jobs/{job.id}"}
    return JSONResponse(job.to_dict(), status_code=202, headers=headers)


@router.get("/jobs", summary="Jobs, newest first", response_model=JobList)
async def list_jobs(
    service: ServiceDependency,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """Return a page; `has_more` says whether another follows."""
    try:
        cursor = None if after is None else _checked(after)
        found = await service.store(lambda jobs: jobs.page(after=cursor, limit=limit + 1))
    except UnknownJobError:
        raise not_found("job", str(after), param="after") from None
    data = [job.to_dict() for job in found[:limit]]
    return JSONResponse(_page(data, has_more=len(found) > limit))


@router.get("/jobs/{job_id}", summary="One job", response_model=JobObject)
async def get_job(job_id: str, service: ServiceDependency) -> Response:
    """Return the job as it stands."""
    try:
        job = await service.store(lambda jobs: jobs.get(_checked(job_id)))
    except UnknownJobError:
        raise not_found("job", job_id, param="job_id") from None
    return JSONResponse(job.to_dict())


@router.post("/jobs/{job_id}/cancel", summary="Cancel a job", response_model=JobObject)
async def cancel_job(job_id: str, service: ServiceDependency) -> Response:
    """Cancel it: at once while it is queued, soon while it runs; 409 once it is finished."""
    try:
        job = await service.store(lambda jobs: jobs.cancel(_checked(job_id)))
    except UnknownJobError:
        raise not_found("job", job_id, param="job_id") from None
    except JobConflictError as error:
        raise conflict(error.code, str(error), "job_id") from error
    return JSONResponse(job.to_dict())


@router.get(
    "/jobs/{job_id}/events",
    summary="What happened to a job: a list, or a stream that ends with the job",
    response_model=EventList,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def list_events(
    job_id: str,
    service: ServiceDependency,
    http: Request,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="An event's id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
    last_event_id: Annotated[
        str | None, Header(max_length=20, description="Where a stream goes on.")
    ] = None,
) -> Response:
    """Return events after the one named, in order."""
    try:
        await service.store(lambda jobs: jobs.get(_checked(job_id)))
    except UnknownJobError:
        raise not_found("job", job_id, param="job_id") from None
    if "text/event-stream" in http.headers.get("accept", ""):
        return _stream(service, job_id, _event_id(last_event_id) or after)
    found = await service.store(lambda jobs: jobs.events(job_id, after=after, limit=limit + 1))
    data = [event.to_dict() for event in found[:limit]]
    return JSONResponse(_page(data, has_more=len(found) > limit))


def _stream(service: Service, job_id: str, after: int) -> Response:
    bound = service.config.bounds.max_streams
    if service.num_streams >= bound:
        raise overloaded(f"{bound} streams are open", retry_after_s=5, status=429)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _told(service, job_id, after), media_type="text/event-stream", headers=headers
    )


async def _told(service: Service, job_id: str, after: int) -> AsyncIterator[bytes]:
    def news(jobs: JobStore) -> list[JobEvent]:
        return jobs.events(job_id, after=after)

    service.num_streams += 1
    try:
        polls = 0
        while not service.is_draining:  # whoever listens comes back with the last id
            events = await service.store(news)
            for event in events:
                after = event.id
                yield _sse(event)
                if event.type in _FINAL:
                    return
            polls += 1
            if polls % _BEAT_EVERY == 0:
                yield b": still here\n\n"
            await asyncio.sleep(_POLL_S)
    finally:
        service.num_streams -= 1


def _sse(event: JobEvent) -> bytes:
    data = json.dumps(event.to_dict(), separators=(",", ":"))
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n".encode()


async def _prediction(service: Service, run_id: str, request: CompressRequest) -> dict[str, object]:
    (answer,) = await service.planning.ask(Ask(run=run_id, requests=(request,)))
    if isinstance(answer, UnicucoError):
        raise from_domain(answer)
    plan = json.loads(answer)
    kept = ("sparsity", "kept_params", "total_params", "bytes", "served_as")
    return {**{name: plan[name] for name in kept}, **plan["predicted"]}


def _digest(run_id: str, request: CompressRequest, suffix: str | None) -> str:
    document = [run_id, request.to_dict(), suffix]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _scoped(http: Request, key: str) -> str:
    """Tell the keys of different callers apart, without keeping who they are."""
    caller = http.headers.get("authorization", "").encode("utf-8", "surrogateescape")
    return f"{hashlib.sha256(caller).hexdigest()[:16]}:{key}"


def _checked(job_id: str) -> str:
    if not _JOB_ID.fullmatch(job_id):
        raise UnknownJobError(f"no job is called {job_id[:80]!r}")
    return job_id


def _event_id(text: str | None) -> int:
    if text is None:
        return 0
    if not text.isdecimal() or not text.isascii() or int(text) >= 2**31:
        raise ApiError(
            422, "invalid_request", "Last-Event-ID must be an event's id", param="Last-Event-ID"
        )
    return int(text)


def _page(data: list[dict[str, object]], *, has_more: bool) -> dict[str, object]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
