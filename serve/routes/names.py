"""Names in bodies and paths, looked up."""

from serve.catalogue import ModelId, UnknownModelError
from serve.errors import ApiError, not_found
from serve.service import Service


def served_run(service: Service, name: str) -> str:
    """Return a run's id.

    Raises:
        ApiError: 404, no run has it.
    """
    if name not in service.catalogue.run_ids:
        raise not_found("model", name)
    return name


def served_variant(service: Service, name: str) -> ModelId:
    """Return the id of a variant that is there.

    Raises:
        ApiError: 404, none has it.
    """
    try:
        variant = ModelId.parse(name)
        service.catalogue.variant_folder(variant)
    except UnknownModelError:
        raise not_found("model", name) from None
    return variant


def conflict(code: str, message: str, param: str | None = None) -> ApiError:
    """Return the answer to what contradicts the state of things."""
    return ApiError(409, code, message, param=param)
