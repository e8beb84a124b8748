"""Strategies and fronts: answered from what was learned, without touching a weight."""

import json
from typing import Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from serve.asks import Answer, Ask
from serve.errors import ApiError, envelope, from_domain
from serve.routes.names import served_run
from serve.schema import StrategiesBody, StrategyList
from serve.service import ServiceDependency
from unicuco.errors import UnicucoError

router = APIRouter(prefix="/v1", tags=["strategies"])


@router.post(
    "/strategies",
    summary="Strategies and predictions for many requests",
    response_model=StrategyList,
)
async def create_strategies(body: StrategiesBody, service: ServiceDependency) -> Response:
    """Answer every request by its plan, in order.

    One that can't be met has an `error` at its place; if none can be met, the answer is 422.
    """
    run_id = served_run(service, body.model)
    bound = service.config.bounds.max_requests
    if len(body.requests) > bound:
        raise ApiError(
            413, "list_too_long", f"at most {bound} requests fit into one call", param="requests"
        )
    requests = tuple(body.to_domain())
    answers = await service.planning.ask(Ask(run=run_id, requests=requests))
    errors = [answer for answer in answers if isinstance(answer, UnicucoError)]
    if len(errors) == len(answers):
        raise from_domain(errors[0], param="requests")
    content = b'{"object":"list","data":[' + b",".join(map(_written, answers)) + b"]}"
    return Response(content, media_type="application/json")


@router.get("/front", summary="A run's trade-off front, predicted and measured")
async def get_front(
    service: ServiceDependency,
    model: str = Query(description="A run's id.", examples=["run"], max_length=63),
) -> JSONResponse:
    """Return the front's points, and what rivals measured on validation text."""
    run_id = served_run(service, model)
    # Any: JSON
    document: dict[str, Any] = await service.strategies.front.remote(run_id)
    return JSONResponse({"object": "front", "model": run_id, **document})


def _written(answer: Answer) -> bytes:
    if isinstance(answer, bytes):
        return answer
    error = from_domain(answer)
    return json.dumps(envelope(error.status, error.code, error.message, error.param)).encode()
