"""Runs and variants: listed, described, deleted."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import JSONResponse

from serve.catalogue import ModelId, UnknownModelError
from serve.errors import ApiError, not_found
from serve.routes.names import conflict
from serve.schema import ModelList, ModelObject
from serve.service import Service, ServiceDependency
from unicuco.errors import ContainerError, VariantError
from unicuco.export.document import DOCUMENT_NAME

router = APIRouter(prefix="/v1", tags=["models"])

ModelPath = Annotated[str, Path(description="`RUN_ID` or `RUN_ID:suffix`.", examples=["run"])]


@router.get("/models", summary="Runs and variants", response_model=ModelList)
async def list_models(service: ServiceDependency) -> Response:
    """Return every run and every variant that is there."""
    data = await asyncio.to_thread(_all_models, service)
    return JSONResponse({"object": "list", "data": data})


@router.get("/models/{model_id}", summary="One run or variant", response_model=ModelObject)
async def get_model(model_id: ModelPath, service: ServiceDependency) -> Response:
    """Return it, a variant with its plan."""
    try:
        name = ModelId.parse(model_id)
        document = await asyncio.to_thread(_described, service, name)
    except UnknownModelError:
        raise not_found("model", model_id, param="model_id") from None
    return JSONResponse(document)


@router.delete("/models/{model_id}", status_code=204, summary="Delete a variant")
async def delete_model(model_id: ModelPath, service: ServiceDependency) -> Response:
    """Delete it; 409 while it is made or served, 403 for a run."""
    try:
        name = ModelId.parse(model_id)
        if name.suffix is None:
            service.catalogue.run_folder(name.run)
            raise ApiError(403, "run_is_kept", "a run can't be deleted over HTTP", param="model_id")
        await _check_idle(service, name)
        await asyncio.to_thread(_delete, service, name)
    except UnknownModelError:
        raise not_found("model", model_id, param="model_id") from None
    return Response(status_code=204)


async def _check_idle(service: Service, name: ModelId) -> None:
    job = await service.store(lambda jobs: jobs.job_of_name(str(name)))
    if job is not None and not job.status.is_final:
        raise conflict(
            "variant_in_the_making", f"job {job.id} makes it; cancel that first", "model_id"
        )
    if service.models is not None and await service.models.in_use.remote(str(name)):
        raise conflict("variant_in_use", f"{name} is being served; try again later", "model_id")


def _delete(service: Service, name: ModelId) -> None:
    held = service.jobs.job_of_name(str(name)) is not None
    try:
        service.catalogue.remove(name)
    except UnknownModelError:
        if not held:  # else a deletion that was cut off half way: the name is still to be freed
            raise
    service.jobs.free_name(str(name))


def _all_models(service: Service) -> list[dict[str, object]]:
    catalogue = service.catalogue
    runs = [_described(service, ModelId(run=run_id)) for run_id in catalogue.run_ids]
    return runs + [_summary(service, variant) for variant in catalogue.variants()]


def _summary(service: Service, name: ModelId) -> dict[str, object]:
    found = service.catalogue.find(name)
    is_folder = name.suffix is not None and found.is_dir()
    try:  # a variant's folder is touched when it is packed, its document never
        created = int((found / DOCUMENT_NAME if is_folder else found).stat().st_mtime)
    except FileNotFoundError:  # deleted just now
        raise UnknownModelError(f"no model is called {str(name)!r}") from None
    return {
        "id": str(name),
        "object": "model",
        "created": created,
        "owned_by": "unicuco",
        "kind": "run" if name.suffix is None else "variant",
        "run": name.run,
    }


def _described(service: Service, name: ModelId) -> dict[str, object]:
    summary = _summary(service, name)
    if name.suffix is None:
        return summary
    try:
        document = service.catalogue.document(name)
    except UnknownModelError:
        raise
    except (VariantError, ContainerError) as error:
        raise ApiError(500, "variant_damaged", str(error), param="model_id") from error
    return {**summary, "plan": document.plan.to_dict()}
