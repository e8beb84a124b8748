"""The tables of a run's database, and rows to value objects and back.

Timestamps are seconds since 1970 (UTC). JSON is text, so that `sqlite3 evaluations.db` shows it.
What this module does not know: transactions, leases and files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from unicuco.errors import RunError
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome, Strategy, TaskValue

SCHEMA_VERSION: Final = 1

METADATA: Final = MetaData()

ASKS: Final = Table(
    "asks",
    METADATA,
    Column("strategy_key", String(64), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("settings", Text, nullable=False),
    Column("derivatives", Boolean, nullable=False),
    UniqueConstraint("round", "position", name="asks_round_position"),
)

EVALUATIONS: Final = Table(
    "evaluations",
    METADATA,
    Column("strategy_key", String(64), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("settings", Text, nullable=False),
    Column("derivatives", Boolean, nullable=False),
    Column("status", String(8), nullable=False),
    Column("kl", Double),
    Column("kept_fraction", Double),
    Column("gradient", Text),
    Column("tokens", BigInteger),
    Column("text_digest", String(64)),
    Column("cost_units", Double),
    Column("seconds", Double, nullable=False),
    Column("error", Text),
    Column("finished_at", Double, nullable=False),
    Index("evaluations_round_position", "round", "position"),
)

# What a search asked on part of the search text, to decide what deserves all of it.
SCREENING_ASKS: Final = Table(
    "screening_asks",
    METADATA,
    Column("strategy_key", String(64), primary_key=True),
    Column("asked_tokens", BigInteger, primary_key=True),
    Column("round", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("settings", Text, nullable=False),
    Column("derivatives", Boolean, nullable=False),
    UniqueConstraint("round", "position", name="screening_asks_round_position"),
)

SCREENINGS: Final = Table(
    "screenings",
    METADATA,
    Column("strategy_key", String(64), primary_key=True),
    Column("asked_tokens", BigInteger, primary_key=True),
    *(
        Column(column.name, column.type, nullable=column.nullable)
        for column in EVALUATIONS.columns
        if not column.primary_key
    ),
    Index("screenings_round_position", "round", "position"),
)

# What evaluations of `evaluations` measured on each of several search texts.
TASK_VALUES: Final = Table(
    "task_values",
    METADATA,
    Column("strategy_key", String(64), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("task", String(64), nullable=False),
    Column("kl", Double, nullable=False),
    Column("gradient", Text),
)

MEASUREMENTS: Final = Table(
    "measurements",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("purpose", String(64), nullable=False),
    Column("strategy_key", String(64), nullable=False),
    Column("kl", Double),
    Column("tokens", BigInteger, nullable=False),
    Column("cost_units", Double, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("text_digest", String(64), nullable=False),
    Column("finished_at", Double, nullable=False),
    UniqueConstraint(
        "purpose", "strategy_key", "text_digest", "tokens", name="measurements_measured_once"
    ),
)

META: Final = Table(
    "meta",
    METADATA,
    Column("key", String(128), primary_key=True),
    Column("value", Text, nullable=False),
)

LEASE: Final = Table(
    "lease",
    METADATA,
    Column("name", String(32), primary_key=True),
    Column("token", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_mark", Text, nullable=False),
    Column("expires_at", Double, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Work on the model that is no asked evaluation but costs units, e.g. the dense model's pass.

    ``purpose`` is a word such as "validation", "dense" or "calibration"; ``strategy_key`` is
    empty where no strategy is measured; ``kl`` in nats per token or none; ``cost_units`` counts
    forward passes over the run's search tokens.
    """

    purpose: str
    strategy_key: str = ""
    kl: float | None = None
    tokens: int
    cost_units: float
    seconds: float
    text_digest: str = ""


def ask_row(ask: Ask) -> dict[str, object]:
    """Return the row of table `asks` for one ask, or of `screening_asks` where it names tokens."""
    fidelity = {} if ask.tokens is None else {"asked_tokens": ask.tokens}
    return fidelity | {
        "strategy_key": ask.strategy.key,
        "round": ask.round,
        "position": ask.position,
        "settings": json.dumps(dict(ask.strategy.settings), allow_nan=False),
        "derivatives": ask.derivatives,
    }


def outcome_row(ask: Ask, outcome: Outcome, *, finished_at: float) -> dict[str, object]:
    """Return the row of table `evaluations` or `screenings` for one finished ask.

    Raises:
        ValueError: the outcome belongs to another strategy than the ask.
    """
    if outcome.strategy_key != ask.strategy.key:
        raise ValueError(
            f"outcome of strategy {outcome.strategy_key[:12]} given for {ask.strategy.key[:12]}"
        )
    row = ask_row(ask) | {"seconds": outcome.wall_s, "finished_at": finished_at}
    if isinstance(outcome, FailedEvaluation):
        return row | {
            "status": "failed",
            "kl": None,
            "kept_fraction": None,
            "gradient": None,
            "tokens": None,
            "text_digest": None,
            "cost_units": None,
            "error": f"{outcome.kind}: {outcome.message}",
        }
    return row | {
        "status": "ok",
        "kl": outcome.kl,
        "kept_fraction": outcome.kept_fraction,
        "gradient": None if outcome.gradient is None else json.dumps(outcome.gradient),
        "tokens": outcome.tokens,
        "text_digest": outcome.text_digest,
        "cost_units": outcome.cost_units,
        "error": None,
    }


def task_rows(outcome: Outcome) -> list[dict[str, object]]:
    """Return the rows of table `task_values` for one outcome, in task order."""
    return [
        {
            "strategy_key": outcome.strategy_key,
            "position": position,
            "task": value.task,
            "kl": value.kl,
            "gradient": None if value.gradient is None else json.dumps(value.gradient),
        }
        for position, value in enumerate(outcome.tasks if isinstance(outcome, Evaluation) else ())
    ]


def row_task(row: RowMapping) -> TaskValue:
    """Read a task's value back from a row of `task_values`."""
    gradient = None if row["gradient"] is None else tuple(json.loads(row["gradient"]))
    return TaskValue(task=row["task"], kl=row["kl"], gradient=gradient)


def row_ask(row: RowMapping) -> Ask:
    """Read an ask back from a row of any of the tables of asks and outcomes.

    Raises:
        RunError: the settings are not the ones that the key was made from.
    """
    strategy = Strategy(settings=tuple(_json_object(row["settings"], row).items()))
    if strategy.key != row["strategy_key"]:
        raise _altered(row)
    return Ask(
        round=row["round"],
        position=row["position"],
        strategy=strategy,
        derivatives=bool(row["derivatives"]),
        tokens=row.get("asked_tokens"),
    )


def row_outcome(row: RowMapping, tasks: tuple[TaskValue, ...] = ()) -> Outcome:
    """Read an outcome back from a row of `evaluations` or `screenings`.

    Raises:
        RunError: the row has values that no evaluation has.
    """
    key = row["strategy_key"]
    if row["status"] == "failed":
        kind, _, message = str(row["error"]).partition(": ")
        return FailedEvaluation(strategy_key=key, kind=kind, message=message, wall_s=row["seconds"])
    try:
        gradient = None if row["gradient"] is None else tuple(json.loads(row["gradient"]))
        return Evaluation(
            strategy_key=key,
            kl=row["kl"],
            kept_fraction=row["kept_fraction"],
            gradient=gradient,
            tokens=row["tokens"],
            text_digest=row["text_digest"],
            cost_units=row["cost_units"],
            wall_s=row["seconds"],
            tasks=tasks,
        )
    except (TypeError, ValueError) as error:
        raise _altered(row) from error


# Any: the values of a JSON object; the caller compares their digest with the recorded key.
def _json_object(text: str, row: RowMapping) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _altered(row) from error
    if not isinstance(value, dict):
        raise _altered(row)
    return value


def _altered(row: RowMapping) -> RunError:
    return RunError(
        f"the record of strategy {str(row['strategy_key'])[:12]} was altered: restore the run's"
        " database from a copy, or learn anew into another folder"
    )
