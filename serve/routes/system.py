"""Whether the service lives, whether it can answer, and what it has done."""

import asyncio
from typing import Any, Final

from fastapi import APIRouter, Response

from serve.errors import ApiError
from serve.handles import Handle
from serve.metrics import CONTENT_TYPE
from serve.service import Service, ServiceDependency
from unicuco.errors import UnicucoError

router = APIRouter(tags=["system"])

_PATIENCE_S: Final = 3.0


@router.get("/health", summary="Whether the process lives; asks nothing of anybody")
async def health() -> dict[str, str]:
    """Answer at once."""
    return {"status": "ok"}


@router.get("/ready", summary="Whether every part can answer")
async def ready(service: ServiceDependency) -> dict[str, str]:
    """Ask every part; 503 names the first that can't answer."""
    parts = await asyncio.gather(
        _is_there(service.strategies.ping), _is_there(service.pruning.ping), _has_store(service),
        _talks(service),
    )  # fmt: skip
    for name, is_there in zip(("strategies", "pruning", "store", "models"), parts, strict=True):
        if not is_there:
            raise ApiError(503, "not_ready", f"{name} can't answer yet", retry_after_s=1)
    return {"status": "ready"}


@router.get("/metrics", summary="Counters in Prometheus' text form", response_class=Response)
async def metrics(service: ServiceDependency) -> Response:
    """Return the counters of the replica that answers, and how the queue stands."""
    counts = await service.store(lambda jobs: jobs.counts())
    num_variants = await asyncio.to_thread(lambda: sum(1 for _ in service.catalogue.variants()))
    content = service.metrics.exposition(
        jobs={status.value: count for status, count in counts.items()}, num_variants=num_variants
    )
    return Response(content, media_type=CONTENT_TYPE)


async def _is_there(method: Handle) -> bool:
    try:
        return bool(await asyncio.wait_for(_called(method), _PATIENCE_S))
    except Exception:  # whatever keeps it from answering, it can't answer
        return False


# Any: a deployment's answer
async def _called(method: Handle) -> Any:
    return await method.remote()


async def _has_store(service: Service) -> bool:
    try:
        await service.store(lambda jobs: jobs.num_active())
    except UnicucoError:
        return False
    return True


async def _talks(service: Service) -> bool:
    return service.models is None or await _is_there(service.models.ready)
