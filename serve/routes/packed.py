"""Variants in their packed form, as one file."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from serve.catalogue import ModelId, UnknownModelError
from serve.errors import ApiError, not_found, overloaded
from serve.files import PACKED, file_answer
from serve.routes.models import ModelPath
from serve.service import ServiceDependency
from unicuco.errors import ModelError, VariantError

router = APIRouter(prefix="/v1", tags=["models"])

_FILE: Final = {"content": {"application/octet-stream": {"schema": {"format": "binary"}}}}
_FILES: Final[dict[int | str, dict[str, Any]]] = {  # Any: OpenAPI
    200: _FILE,
    206: {**_FILE, "description": "The range that was asked for."},
    304: {"description": "The caller has it."},
}


@router.get(
    f"/models/{{model_id}}{PACKED}",
    summary="A variant as one packed file",
    response_class=Response,
    responses=_FILES,
)
async def get_packed(
    model_id: ModelPath,
    service: ServiceDependency,
    http: Request,
    link_mbps: Annotated[
        float | None,
        Query(
            gt=0,
            allow_inf_nan=False,
            description="Megabits per second of the caller's link: what decodes more slowly than "
            "it saves there travels as it is. Left out: as small as it gets.",
        ),
    ] = None,
) -> Response:
    """Send what `unicuco pack` makes of it, lossless; `unicuco unpack` gives the folder back.

    It is packed when it is first asked for, which takes its time. Ranges and `If-None-Match` are
    understood. A link's speed is taken for the nearest power of two.
    """
    try:
        name = ModelId.parse(model_id)
        service.catalogue.find(name)
        if name.suffix is None:
            message = f"{name} is a run, and only its variants are sent: ask for {name}:SUFFIX"
            raise ApiError(404, "not_a_variant", message, param="model_id")
        file = await service.packing.form(name, link_mbps)
        return await run_in_threadpool(
            file_answer, file, name=f"{name.suffix}.pack", asked=http.headers
        )
    except UnknownModelError:
        raise not_found("model", model_id, param="model_id") from None
    except FileNotFoundError:
        raise overloaded("what was packed was removed just now; ask again") from None
    except (VariantError, ModelError) as error:
        raise ApiError(500, "variant_damaged", str(error), param="model_id") from error
