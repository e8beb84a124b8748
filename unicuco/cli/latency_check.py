"""What is said of a variant's latency after it was cut, predicted beside measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicuco.errors import EngineError

if TYPE_CHECKING:
    from unicuco.pipeline import LatencyCheck, Run
    from unicuco.types import Plan

CheckOption = Annotated[
    bool,
    typer.Option(
        "--check/--no-check",
        help="Time a variant cut for --max-latency-ms in vLLM; takes a minute or two.",
    ),
]


def latency_check(run: Run, plan: Plan, out: Path) -> tuple[dict[str, object], list[str]]:
    """Time a variant whose request was of latency.

    Returns:
        The document of ``measured``, and lines for people; both empty for other requests. Where
        it can't be timed, they say why: the variant is there all the same.
    """
    from rich.markup import escape

    from unicuco.cli.waiting import waiting
    from unicuco.pipeline import check_cut

    try:
        with waiting("timing the variant"):
            check = check_cut(run, plan, out)
    except EngineError as error:
        line = f"latency was not checked: {error}"
        return {"latency": {"error": str(error)}}, [f"[yellow]{escape(line)}"]
    if check is None:
        return {}, []
    return {"latency": check.to_dict()}, [describe_check(check)]


def describe_check(check: LatencyCheck) -> str:
    """Return one line for people."""
    return (
        f"time per token at batch {check.batch}: predicted {check.predicted_ratio:.3f} of the "
        f"dense model's, measured {check.measured_ratio:.3f} ({check.ms:.4g} of "
        f"{check.dense_ms:.4g} ms)"
    )
