"""Options that several commands share, declared once as the fields of a dataclass.

A command that takes them has one parameter of the dataclass' type; Typer sees the fields as options
in its place. Also how options are read that must name a folder here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import typer

from unicuco.remote import local_path

Command = Callable[..., None]


def folder_here(text: str) -> Path:
    """Read an option that names a folder of this machine.

    Raises:
        typer.BadParameter: it names a URL.
    """
    path = local_path(text)
    if path is None:
        raise typer.BadParameter("it must be a folder here, not a URL")
    return path


# Any: commands have signatures of their own, and dataclasses share no type.
def with_fields(
    parameter: str, kind: Any, *, without: tuple[str, ...] = ()
) -> Callable[[Command], Command]:
    """Let Typer see the fields of ``kind`` where a command takes them as one ``parameter``.

    Args:
        parameter: of the command.
        kind: a dataclass whose fields are annotated as options.
        without: fields that stay at their defaults and are no options.
    """
    chosen = [field for field in fields(kind) if field.name not in without]

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        types = get_type_hints(kind, include_extras=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(f.name, keyword, default=f.default, annotation=types[f.name])
            for f in chosen
        ]
        parameters: list[inspect.Parameter] = []
        for name, given in own.parameters.items():
            parameters += shared if name == parameter else [given.replace(kind=keyword)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            value = kind(**{field.name: given.pop(field.name) for field in chosen})
            command(**given, **{parameter: value})

        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
