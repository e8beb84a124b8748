"""The ASGI application of one ingress replica: routers, error envelope, OpenAPI, gate.

What it does not know: where handles come from.
"""

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve.errors import install_handlers, overloaded, response
from serve.gate import Gate
from serve.routes import ROUTERS
from serve.schema import ErrorBody
from serve.service import Service


def build_api(service: Service) -> Gate:
    """Return the application whose routes use ``service``."""
    return Gate(
        build_routes(service), service.config, service.metrics, on_arrival=service.arrivals.note
    )


def build_routes(service: Service) -> FastAPI:
    """Return the application without its gate."""
    api = FastAPI(
        title="UniCuCo",
        summary="Strategies, compression jobs and variants of language models.",
        version="1",
        openapi_url="/openapi.json",
        responses={status: {"model": ErrorBody} for status in ("4XX", "422", "5XX")},
    )
    api.state.service = service
    install_handlers(api)
    for kind in (RayError, RayServeException):
        api.add_exception_handler(kind, _on_lost_replica)
    for router in ROUTERS:
        api.include_router(router)
    return api


async def _on_lost_replica(request: Request, error: Exception) -> JSONResponse:
    # A full queue, a replica that died, or one that is not there yet: all pass.
    return response(overloaded("a part of the service is busy or restarting; try again"))
