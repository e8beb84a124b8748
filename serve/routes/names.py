"""Names in bodies and paths, looked up."""

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


def conflict(code: str, message: str, param: str | None = None) -> ApiError:
    """Return the answer to what contradicts the state of things."""
    return ApiError(409, code, message, param=param)
