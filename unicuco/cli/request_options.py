"""A request on the command line: as options, or as one JSON object per line.

What it does not know: runs and models; whether a request can be met is answered elsewhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from unicuco.errors import RequestError, TextError
from unicuco.types import Request

_PANEL = "Request (exactly one target)"

SparsityOption = Annotated[
    float | None,
    typer.Option(
        "--sparsity", help="Fraction of site weights dropped, in [0, 1).", rich_help_panel=_PANEL
    ),
]
MaxParamsOption = Annotated[
    float | None,
    typer.Option(
        "--max-params", help="Parameters kept at most, whole model.", rich_help_panel=_PANEL
    ),
]
MaxBytesOption = Annotated[
    float | None,
    typer.Option("--max-bytes", help="Tensor bytes at most, as stored.", rich_help_panel=_PANEL),
]
MaxKlOption = Annotated[
    float | None,
    typer.Option(
        "--max-kl", help="KL(dense‖variant) at most, nats per token.", rich_help_panel=_PANEL
    ),
]
PreferenceOption = Annotated[
    float | None,
    typer.Option("--preference", help="0 = quality only … 1 = size only.", rich_help_panel=_PANEL),
]
ServedAsOption = Annotated[
    str | None,
    typer.Option(
        "--served-as", help="mask, shrink or quantised; any if left out.", rich_help_panel=_PANEL
    ),
]
TaskWeightsOption = Annotated[
    str | None,
    typer.Option(
        "--task-weights",
        help="What KL means in a run of several tasks, e.g. code=0.7,prose=0.3.",
        rich_help_panel=_PANEL,
    ),
]


def read_request(
    *,
    sparsity: float | None,
    max_params: float | None,
    max_bytes: float | None,
    max_kl: float | None,
    preference: float | None,
    served_as: str | None,
    task_weights: str | None = None,
) -> Request:
    """Make the request that the options describe.

    Raises:
        RequestError: no or two targets, or a value outside its range.
    """
    return Request.from_dict(
        {
            "sparsity": sparsity,
            "max_params": max_params,
            "max_bytes": max_bytes,
            "max_kl": max_kl,
            "preference": preference,
            "served_as": served_as,
            "task_weights": None if task_weights is None else _read_task_weights(task_weights),
        }
    )


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
