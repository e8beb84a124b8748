"""One router per topic; `serve.api` includes all of `ROUTERS`."""

from fastapi import APIRouter

from serve.routes import completions, jobs, models, packed, page, strategies, system

ROUTERS: tuple[APIRouter, ...] = (
    strategies.router,
    jobs.router,
    models.router,
    packed.router,
    completions.router,
    page.router,
    system.router,
)

__all__ = ["ROUTERS"]
