"""``unicuco doctor``: what is installed, what will work, and what to do about the rest.

Looks without importing what is slow to import; a package that is there but broken is recognised
where its trouble is known. What it does not know: models and runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from unicuco.cli.checks import Check, command_verdicts, run_checks
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

if TYPE_CHECKING:
    from rich.table import Table


def doctor(ctx: typer.Context, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check this machine: which commands will work, and what to do about those that will not."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        checks = run_checks()
        verdicts = command_verdicts(checks)
        terminal.show(
            {
                "checks": [check.to_dict() for check in checks],
                "commands": {
                    name: {"works": not troubles, "because": troubles}
                    for name, troubles in verdicts.items()
                },
            },
            _checks_table(checks),
            "",
            _commands_table(verdicts),
        )


def _checks_table(checks: list[Check]) -> Table:
    from rich.markup import escape

    table = _table("", "check", "found", "what to do")
    for check in checks:
        sign = "[green]ok[/green]" if check.ok else "[red]no[/red]"
        table.add_row(sign, check.name, escape(check.found), escape(check.advice))
    return table


def _commands_table(verdicts: dict[str, list[str]]) -> Table:
    table = _table("", "command", "because")
    for name, troubles in verdicts.items():
        sign = "[red]no[/red]" if troubles else "[green]ok[/green]"
        table.add_row(sign, f"unicuco {name}", ", ".join(troubles))
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table
