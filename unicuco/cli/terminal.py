"""What a command prints and where: its result on stdout, everything else on stderr.

Libraries and the processes that they start print what they like; while a command runs, file
descriptor 1 leads to stderr, and only the result goes to the real stdout. So ``--json`` gives
exactly one document. What it does not know: any command, any document.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and libraries' messages.")
]

_PLAIN_WIDTH = 120
# Read by libraries when they are imported, and inherited by the processes that they start.
_QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONWARNINGS": "ignore",
    "OMP_WAIT_POLICY": "passive",  # spinning threads take cores from Ray's actors and from vLLM
}


@dataclass(slots=True)
class Invocation:
    """What the running command leaves for its error line: usage, and whether to show tracebacks."""

    usage: str = ""
    debug: bool = False


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where one command prints its result."""

    as_json: bool
    stdout: TextIO

    def show(self, document: Mapping[str, object], *renderables: RenderableType) -> None:
        """Print the result: the document with ``--json``, else what is meant for people.

        Args:
            document: plain JSON values; numbers that are not finite become null.
            renderables: Rich tables or markup, printed below one another.
        """
        if self.as_json:
            text = json.dumps(_finite(document), allow_nan=False, ensure_ascii=False)
            self.stdout.write(text + "\n")
        else:
            console = make_console(self.stdout)
            for renderable in renderables:
                console.print(renderable)
        self.stdout.flush()


def make_console(file: TextIO) -> Console:
    """Return a console for results; where no terminal says how wide it is, rows stay whole."""
    from rich.console import Console

    width = None if file.isatty() else _PLAIN_WIDTH
    return Console(file=file, highlight=False, soft_wrap=True, width=width)


@contextmanager
def open_terminal(context: typer.Context, *, as_json: bool, debug: bool) -> Iterator[Terminal]:
    """Give a command its terminal, with everybody else's stdout led to stderr until it ends."""
    invocation = context.obj
    if isinstance(invocation, Invocation):
        invocation.usage, invocation.debug = context.get_usage(), debug
    if not debug:
        silence_libraries()
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            os.fdopen(os.dup(real), "w", encoding="utf-8", errors="replace") as stdout,
            redirect_stdout(sys.stderr),
        ):
            yield Terminal(as_json=as_json, stdout=stdout)
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def silence_libraries() -> None:
    """Keep warnings, bars and notices of libraries off this process and those that it starts."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(name): _finite(item) for name, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
