"""Bodies as they come over HTTP, checked by pydantic; each has one `to_domain()`.

What a request may hold is said once, by `unicuco.types.Request`: this module only hands it over.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from serve.config import RUN_ID, SUFFIX
from unicuco.store import JobStatus
from unicuco.types import Request, ServedAs, Target

_TARGET_SCHEMAS: Final[dict[str, dict[str, object]]] = {
    Target.SPARSITY: {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    Target.MAX_PARAMS: {"type": "integer", "minimum": 1},
    Target.MAX_BYTES: {"type": "integer", "minimum": 1},
    Target.MAX_TOTAL_BYTES: {"type": "integer", "minimum": 1},
    Target.MAX_PACKED_BYTES: {"type": "integer", "minimum": 1},
    Target.MAX_KL: {"type": "number", "minimum": 0},
    Target.MAX_LATENCY_MS: {"type": "number", "exclusiveMinimum": 0},
    Target.PREFERENCE: {"type": "number", "minimum": 0, "maximum": 1},
}
_REQUEST_SCHEMA: Final[dict[str, object]] = {
    "type": "object",
    "title": "CompressRequest",
    "description": "Exactly one target, and how the variant may be served.",
    "properties": {
        **{target.value: _TARGET_SCHEMAS.get(target, {}) for target in Target},
        "served_as": {"type": "string", "enum": [*ServedAs]},
        "context": {
            "type": "integer",
            "description": "With max_total_bytes: tokens of a sequence that are cached.",
            "minimum": 1,
        },
        "batch": {
            "type": "integer",
            "description": "Sequences at a time: cached with max_total_bytes, or decoded with "
            "max_latency_ms.",
            "minimum": 1,
        },
        "task_weights": {
            "type": "object",
            "description": "Of a run that learned several texts: their weights, which sum to 1.",
            "minProperties": 1,
            "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1},
        },
    },
    "additionalProperties": False,
    "oneOf": [{"required": [target.value]} for target in Target],
    "examples": [{"sparsity": 0.6}, {"max_kl": 0.1}],
}


_KL_EXAMPLE: Final = {"mean": 0.11, "lo95": 0.08, "hi95": 0.15}
_SIZE_EXAMPLE: Final[dict[str, Any]] = {
    "sparsity": 0.6,
    "kept_params": 3_700_000,
    "total_params": 7_000_000,
    "bytes": 14_000_000,
    "served_as": "mask",
}
_STRATEGIES_EXAMPLE: Final[dict[str, Any]] = {
    "object": "list",
    "data": [
        {
            "request": {"sparsity": 0.6},
            "strategy": {"settings": {"sparsity/model.layers.0.mlp.up_proj": 0.64}},
            **_SIZE_EXAMPLE,
            "predicted": {"kl": _KL_EXAMPLE},
        }
    ],
}
_JOB_EXAMPLE: Final[dict[str, Any]] = {
    "id": "cjob-0123456789abcdef01234567",
    "object": "compression.job",
    "created_at": 1.7e9,
    "started_at": None,
    "finished_at": None,
    "status": "queued",
    "model": "run",
    "compressed_model": "run:my-variant",
    "request": {"sparsity": 0.6},
    "prediction": {**_SIZE_EXAMPLE, "kl": _KL_EXAMPLE},
    "result": None,
    "error": None,
    "progress": {"stage": "queued", "done": 0, "total": 0},
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


class StrategyList(BaseModel):
    """Plan documents in the order of the requests; an `error` stands for what can't be met."""

    model_config = ConfigDict(json_schema_extra={"examples": [_STRATEGIES_EXAMPLE]})

    object: Literal["list"]
    data: list[dict[str, Any]]


class JobProgress(BaseModel):
    """How far a job is."""

    stage: str
    done: int
    total: int


class JobObject(BaseModel):
    """A compression job."""

    model_config = ConfigDict(json_schema_extra={"examples": [_JOB_EXAMPLE]})

    id: str
    object: Literal["compression.job"]
    created_at: float
    started_at: float | None
    finished_at: float | None
    status: JobStatus
    model: str
    compressed_model: str
    request: dict[str, Any]
    prediction: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    progress: JobProgress


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"]
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EventObject(BaseModel):
    """Something that happened to a job."""

    id: int
    object: Literal["compression.job.event"]
    type: str
    created_at: float
    data: dict[str, Any]


class EventList(BaseModel):
    """A page of events."""

    object: Literal["list"]
    data: list[EventObject]
    first_id: int | None
    last_id: int | None
    has_more: bool


class ModelObject(BaseModel):
    """A run or a variant."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["run", "variant"]
    run: str
    plan: dict[str, Any] | None = None


class ModelList(BaseModel):
    """Runs and variants."""

    object: Literal["list"]
    data: list[ModelObject]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every failure."""

    error: ErrorDetail


def _replace(schema: dict[str, Any]) -> None:  # Any: a JSON schema, as pydantic gives it
    schema.clear()
    schema.update(_REQUEST_SCHEMA)
