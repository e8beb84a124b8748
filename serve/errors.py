"""The one error envelope: ``{"error": {"message", "type", "param", "code"}}``, for every failure.

What it does not know: routes.
"""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from unicuco.errors import (
    InfeasibleRequestError,
    RequestError,
    StorageError,
    UnicucoError,
)

_LONGEST_MESSAGE: Final = 500
_UNPARSED: Final = "There was an error parsing the body"  # FastAPI's words, e.g. for deep nesting
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]+")


class ApiError(Exception):
    """An answer that is no success: raise it anywhere under a route.

    Args:
        status: of HTTP.
        code: one word for programs, e.g. ``model_not_found``.
        message: one sentence for people.
        param: the field that is at fault, or none.
        retry_after_s: seconds after which trying again makes sense, or none.
        headers: more headers.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)


def not_found(what: str, name: str, *, param: str = "model") -> ApiError:
    """Return the answer to a name that nothing has."""
    return ApiError(404, f"{what}_not_found", f"no {what} {_shown(name)}", param=param)


def overloaded(message: str, *, retry_after_s: int = 1, status: int = 503) -> ApiError:
    """Return the answer of a full queue."""
    return ApiError(status, "overloaded", message, retry_after_s=retry_after_s)


def envelope(status: int, code: str, message: str, param: str | None = None) -> dict[str, object]:
    """Return the body of a failure."""
    return {
        "error": {
            "message": _clean(message),
            "type": error_type(status),
            "param": None if param is None else _clean(param),
            "code": code,
        }
    }


def error_type(status: int) -> str:
    """Return the class of failures that a status belongs to, in OpenAI's words."""
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 404 | 405:
            return "not_found_error"
        case 409:
            return "conflict_error"
        case 429 | 503:
            return "overloaded_error"
        case _ if status >= 500:
            return "server_error"
        case _:
            return "invalid_request_error"


def from_domain(error: UnicucoError, *, param: str | None = "request") -> ApiError:
    """Return what a failure of the method means over HTTP."""
    if isinstance(error, InfeasibleRequestError):
        return ApiError(422, "infeasible_request", str(error), param=param)
    if isinstance(error, RequestError):
        return ApiError(422, "invalid_request", str(error), param=param)
    if isinstance(error, StorageError):
        return ApiError(503, "storage_unavailable", str(error), retry_after_s=5)
    return ApiError(500, "internal_error", str(error))


def response(error: ApiError) -> JSONResponse:
    """Return the answer that an error describes."""
    content = envelope(error.status, error.code, error.message, error.param)
    return JSONResponse(content, status_code=error.status, headers=error.headers)


def install_handlers(app: FastAPI) -> None:
    """Make every failure of ``app`` answer with the envelope."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return response(error)

    async def on_domain_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, UnicucoError)
        return response(from_domain(error))

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response(_from_validation(error))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400 and error.detail == _UNPARSED:
            return response(ApiError(400, "invalid_json", "the body is no JSON that can be read"))
        if error.status_code == 413:
            return response(ApiError(413, "body_too_large", str(error.detail)))
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        message = f"{error.detail}: {request.method} {_shown(request.url.path)}"
        return response(ApiError(error.status_code, code, message, headers=error.headers))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(UnicucoError, on_domain_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


def _from_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is no JSON: {first['msg']}")
    place = [str(part) for part in first["loc"][1:]]
    param = ".".join(place) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(
        422, "invalid_request", f"{_shown(param)}: {message}" if param else message, param=param
    )


def _clean(text: str) -> str:
    # JSON may hold half a surrogate pair, which UTF-8 can't.
    sound = text.encode("utf-8", "replace").decode()
    return _UNPRINTABLE.sub(" ", sound)[:_LONGEST_MESSAGE]


def _shown(name: object) -> str:
    text = str(name)
    return repr(text if len(text) <= 120 else f"{text[:120]}…")
