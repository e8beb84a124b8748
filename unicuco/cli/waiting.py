"""A sign of life in a long step of unknown length: a spinner, or a line where no terminal is."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LINE_AFTER_S: Final = 5.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on stderr that ``what`` is going on, with the time it has taken."""
    if not sys.stderr.isatty():
        timer = threading.Timer(_LINE_AFTER_S, print, (f"{what} …",), {"file": sys.stderr})
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        progress.add_task(what, total=None)
        yield
