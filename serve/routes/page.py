"""The page at ``/`` and its few files, all from this package.

The page is one template with the runs filled in; what it shows it asks of the API as anybody
would. Its policy lets the browser load and ask nothing but this service. With keys set the page is
guarded like everything else: a browser then needs a proxy that adds the key.
"""

import html
from functools import cache
from importlib.resources import files
from string import Template
from typing import Final

from fastapi import APIRouter, Response

from serve.errors import ApiError
from serve.service import ServiceDependency

router = APIRouter(include_in_schema=False)

_TYPES: Final = {
    "icon.svg": "image/svg+xml",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/")
async def page(service: ServiceDependency) -> Response:
    """Return the page."""
    names = [html.escape(run_id, quote=True) for run_id in service.catalogue.run_ids]
    runs = "".join(f'<option value="{name}">{name}</option>' for name in names)
    content = Template(_read("page.html")).substitute(runs=runs)
    return Response(content, media_type="text/html; charset=utf-8", headers=_HEADERS)


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """Return one of the page's files."""
    if name not in _TYPES:
        raise ApiError(404, "not_found", "the page has no such file", param="name")
    return Response(_read(name), media_type=_TYPES[name], headers=_HEADERS)


@cache
def _read(name: str) -> str:
    return (files("serve") / "static" / name).read_text(encoding="utf-8")
