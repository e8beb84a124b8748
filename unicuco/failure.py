"""What a failed command or job says: one line and an exit code for every exception.

What it does not know: where the line is printed, and whether a traceback goes with it.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import typer

from unicuco.errors import UnicucoError
from unicuco.memory import is_lack_of_memory

_DISK_FULL = "No space left on device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a command ends: its exit code, the line on stderr, and usage lines before it, if any."""

    exit_code: int
    line: str
    usage: str = ""


def describe_failure(error: BaseException) -> Failure:
    """Return the line and the exit code for whatever a command raised."""
    if isinstance(error, UnicucoError):
        return Failure(exit_code=error.exit_code, line=_line(str(error)))
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        usage = "" if context is None else str(context.get_usage())
        return Failure(exit_code=error.exit_code, line=_line(error.format_message()), usage=usage)
    if isinstance(error, KeyboardInterrupt):
        return Failure(exit_code=1, line=_line("interrupted; what was recorded is kept"))
    if is_lack_of_memory(error):
        return Failure(
            exit_code=1,
            line=_line("out of memory; use more shards, fewer replicas or a smaller model"),
        )
    if isinstance(error, OSError):
        return Failure(exit_code=1, line=_line(_describe_os_error(error)))
    if _DISK_FULL in str(error):  # libraries wrap ENOSPC in errors of their own
        return Failure(exit_code=1, line=_line("the disk is full; free some space and try again"))
    text = f"unexpected {type(error).__name__}: {error} (--debug shows where)"
    return Failure(exit_code=1, line=_line(text))


def _describe_os_error(error: OSError) -> str:
    place = f" {error.filename}" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            writing = f", writing{place}" if place else ""
            return f"the disk is full{writing}; free some space and try again"
        case errno.EROFS:
            return f"can't write{place}: the file system is read-only; choose another place"
        case errno.EACCES | errno.EPERM:
            return f"no permission for{place}; choose another place or change its owner"
        case errno.ENOENT:
            return f"no such file or folder:{place}"
        case errno.ENOTDIR | errno.EISDIR:
            return f"{error.strerror}:{place}; check the path"
        case errno.EPIPE:
            return "the reader of the output went away"
        case _:
            return f"{error.strerror or error}{':' if place else ''}{place}"


def _line(text: str) -> str:
    return "error: " + " ".join(text.split())
