"""Bodies as they come over HTTP, checked by pydantic; each has one `to_domain()`.

What a request may hold is said once, by `unicuco.types.Request`: this module only hands it over.
"""

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, RootModel

from serve.config import RUN_ID, SUFFIX
from unicuco.types import Request, ServedAs, Target

_TARGET_SCHEMAS: Final[dict[str, dict[str, object]]] = {
    Target.SPARSITY: {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    Target.MAX_PARAMS: {"type": "integer", "minimum": 1},
    Target.MAX_BYTES: {"type": "integer", "minimum": 1},
    Target.MAX_KL: {"type": "number", "minimum": 0},
    Target.PREFERENCE: {"type": "number", "minimum": 0, "maximum": 1},
}
_REQUEST_SCHEMA: Final[dict[str, object]] = {
    "type": "object",
    "title": "CompressRequest",
    "description": "Exactly one target, and how the variant may be served.",
    "properties": {
        **{target.value: _TARGET_SCHEMAS.get(target, {}) for target in Target},
        "served_as": {"type": "string", "enum": [*ServedAs]},
    },
    "additionalProperties": False,
    "oneOf": [{"required": [target.value]} for target in Target],
    "examples": [{"sparsity": 0.6}, {"max_kl": 0.1}],
}


class Body(BaseModel):
    """A JSON object whose every field is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CompressRequest(RootModel[dict[str, Any]]):  # Any: JSON, checked by `Request.from_dict`
    """One target and optional qualifiers, as on the command line."""

    model_config = ConfigDict(frozen=True, json_schema_extra=lambda schema: _replace(schema))

    def to_domain(self) -> Request:
        """Return the request.

        Raises:
            RequestError: unknown names, no or two targets, or values outside their range.
        """
        return Request.from_dict(self.root)


RunName = Annotated[
    str,
    Field(
        pattern=f"^{RUN_ID.pattern}$", description="A run's id.", examples=["run"], max_length=63
    ),
]
Suffix = Annotated[
    str,
    Field(
        pattern=f"^{SUFFIX.pattern}$",
        description="What the variant is called within its run; made up if left out.",
        examples=["my-variant"],
    ),
]


class StrategiesBody(Body):
    """Requests for one run."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "run", "requests": [{"sparsity": 0.6}, {"max_kl": 0.1}]}]
        }
    )

    model: str = Field(description="A run's id.", max_length=63)
    requests: list[CompressRequest] = Field(min_length=1, description="Answered in order.")

    def to_domain(self) -> list[Request]:
        """Return the requests.

        Raises:
            RequestError: one of them means nothing; the line names its place.
        """
        return [request.to_domain() for request in self.requests]


class JobBody(Body):
    """A variant to be cut."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "run", "request": {"sparsity": 0.6}, "suffix": "my-variant"}]
        }
    )

    model: str = Field(description="A run's id.", max_length=63)
    request: CompressRequest
    suffix: Suffix | None = None

    def to_domain(self) -> Request:
        """Return the request.

        Raises:
            RequestError: it means nothing.
        """
        return self.request.to_domain()


def _replace(schema: dict[str, Any]) -> None:  # Any: a JSON schema, as pydantic gives it
    schema.clear()
    schema.update(_REQUEST_SCHEMA)
