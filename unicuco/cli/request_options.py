"""A request on the command line: as options, or as one JSON object per line.

What it does not know: runs and models; whether a request can be met is answered elsewhere.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.shared_options import with_fields
from unicuco.errors import RequestError, TextError
from unicuco.types import Request

_PANEL = "Request (exactly one target)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestChoices:
    """A request as options; not yet checked."""

    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            help="Fraction of site weights dropped, in [0, 1).",
            rich_help_panel=_PANEL,
        ),
    ] = None
    max_params: Annotated[
        float | None,
        typer.Option(
            "--max-params", help="Parameters kept at most, whole model.", rich_help_panel=_PANEL
        ),
    ] = None
    max_bytes: Annotated[
        float | None,
        typer.Option(
            "--max-bytes", help="Tensor bytes at most, as stored.", rich_help_panel=_PANEL
        ),
    ] = None
    max_total_bytes: Annotated[
        float | None,
        typer.Option(
            "--max-total-bytes",
            help="Bytes of weights, and of keys and values of --context x --batch, at most.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    max_packed_bytes: Annotated[
        float | None,
        typer.Option(
            "--max-packed-bytes",
            help="Bytes at most in a lossless form, where zeros take a bit.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl", help="KL(dense‖variant) at most, nats per token.", rich_help_panel=_PANEL
        ),
    ] = None
    max_latency_ms: Annotated[
        float | None,
        typer.Option(
            "--max-latency-ms",
            help="Milliseconds per token at most, decoding --batch sequences.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    preference: Annotated[
        float | None,
        typer.Option(
            "--preference", help="0 = quality only … 1 = size only.", rich_help_panel=_PANEL
        ),
    ] = None
    served_as: Annotated[
        str | None,
        typer.Option(
            "--served-as",
            help="mask, shrink or quantised; any if left out.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    task_weights: Annotated[
        str | None,
        typer.Option(
            "--task-weights",
            help="What KL means in a run of several tasks, e.g. code=0.7,prose=0.3.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Tokens per sequence that --max-total-bytes counts; the model's if left out.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            help="Sequences at a time: those that --max-total-bytes counts, or --max-latency-ms "
            "decodes.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    @property
    def is_empty(self) -> bool:
        """Whether no option was given."""
        return all(getattr(self, field.name) is None for field in fields(self))

    def to_domain(self) -> Request:
        """Return the request that the options describe.

        Raises:
            RequestError: no or two targets, or a value outside its range.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.task_weights is not None:
            given["task_weights"] = _read_task_weights(self.task_weights)
        return Request.from_dict(given)


with_request_options = with_fields("asked", RequestChoices)


def _read_task_weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, _, number = item.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError as error:
            raise RequestError(
                f"task-weights must be like code=0.7,prose=0.3, got {item.strip()!r}"
            ) from error
    return weights


def read_requests_file(path: Path) -> list[Request]:
    """Read one request per line, as JSON; ``-`` reads standard input; blank lines are skipped.

    Raises:
        TextError: the file can't be read or is not UTF-8.
        RequestError: a line that is no request, with its number.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"can't read the requests {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"the requests {path} are not UTF-8 text") from error
    lines = text.split("\n")
    return [
        _read_line(line, f"{path} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _read_line(line: str, place: str) -> Request:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(
            f'{place} must be an object like {{"sparsity": 0.6}}, got {line.strip()[:60]}'
        )
    try:
        return Request.from_dict(fields)
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from error


def parse_numbers(option: str, words: str) -> tuple[float, ...]:
    """Read numbers with commas between.

    Raises:
        RequestError: a word is no number.
    """
    try:
        return tuple(float(word) for word in words.split(","))
    except ValueError:
        raise RequestError(
            f"{option} takes numbers with commas between, such as 0.5,0.6; got {words!r}"
        ) from None


def parse_whole_numbers(option: str, words: str) -> tuple[int, ...]:
    """Read whole numbers with commas between.

    Raises:
        RequestError: a word is none.
    """
    numbers = parse_numbers(option, words)
    if any(not number.is_integer() for number in numbers):
        raise RequestError(f"{option} takes whole numbers, got {words!r}")
    return tuple(map(int, numbers))
