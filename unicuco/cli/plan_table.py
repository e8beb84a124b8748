"""Plans as a table for people and as documents for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unicuco.errors import InfeasibleRequestError, UnicucoError
from unicuco.types import Plan, Request

if TYPE_CHECKING:
    from rich.table import Table


def answer_document(answer: Plan | UnicucoError) -> dict[str, object]:
    """Return the plan document, or ``{"error": {...}}`` for a request that can't be met."""
    if isinstance(answer, Plan):
        return answer.to_dict()
    infeasible = isinstance(answer, InfeasibleRequestError)
    error: dict[str, object] = {
        "message": str(answer),
        "type": "infeasible_request" if infeasible else "error",
        "code": answer.exit_code,
    }
    if isinstance(answer, InfeasibleRequestError):
        error["nearest"] = answer.nearest
    return {"error": error}


def plan_table(requests: Sequence[Request], answers: Sequence[Plan | UnicucoError]) -> Table:
    """Return one row per request: what was asked, what it becomes, what it is predicted to cost."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("request", no_wrap=True)
    names = ["sparsity", "kept params", "bytes", "predicted KL", "95% interval"]
    if any(isinstance(answer, Plan) and answer.latency for answer in answers):
        names.append("ms per token")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, Plan):
            table.add_row(escape(describe_request(request)), *_cells(answer))
        else:
            table.add_row(escape(describe_request(request)), "[red]none[/red]")
    return table


def refusals(answers: Sequence[Plan | UnicucoError]) -> list[str]:
    """Return a line of markup for every request that can't be met, with its place, from 1."""
    from rich.markup import escape

    return [
        f"[red]request {number}[/red]: {escape(str(answer))}"
        for number, answer in enumerate(answers, start=1)
        if isinstance(answer, UnicucoError)
    ]


def describe_request(request: Request) -> str:
    """Return a request as it would be typed, without the dashes: ``max_kl 0.1``."""
    fields = request.to_dict()
    return ", ".join(f"{name} {_number(value)}" for name, value in fields.items())


def _cells(plan: Plan) -> tuple[str, ...]:
    kl, latency = plan.kl, plan.latency
    times = [] if latency is None else [f"{latency.ms:.4g} of {latency.dense_ms:.4g}"]
    return (
        f"{plan.sparsity:.4f}",
        f"{plan.kept_params:,}",
        f"{plan.num_bytes:,}",
        f"{kl.mean:.4g}",
        f"{kl.lo95:.4g} … {kl.hi95:.4g}",
        *times,
    )


def _number(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={weight:g}" for name, weight in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
