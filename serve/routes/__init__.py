"""One router per topic; `serve.api` includes all of `ROUTERS`."""

from fastapi import APIRouter

from serve.routes import completions, page, system

ROUTERS: tuple[APIRouter, ...] = (
    completions.router,
    page.router,
    system.router,
)

__all__ = ["ROUTERS"]
