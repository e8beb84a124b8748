"""The FastAPI application of one ingress replica: routers, error envelope, OpenAPI.

What it does not know: Ray.
"""

from fastapi import FastAPI

from serve.errors import install_handlers
from serve.routes import ROUTERS
from serve.service import Service


def build_api(service: Service) -> FastAPI:
    """Return the application whose routes use ``service``."""
    api = FastAPI(
        title="UniCuCo",
        summary="Strategies, compression jobs and variants of language models.",
        version="1",
        openapi_url="/openapi.json",
    )
    api.state.service = service
    install_handlers(api)
    for router in ROUTERS:
        api.include_router(router)
    return api
