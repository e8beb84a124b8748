"""The reference corpus: Python's standard library, as the running interpreter carries it.

Four disjoint texts are held out of training (DESIGN.md section 2 of the project's design):
calibration (ranks, Fisher), search (the KL that learning sees), validation (calibrating intervals)
and test (reported numbers). Each is a fixed list of modules; everything else that is no test
package is training text.

The text is read from the interpreter and never copied, so it differs a little between patch
releases of Python. What this module does not know: which release the committed weights were trained
on; the model card says so, and every result carries the digest of the text it was measured on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Final, Literal, get_args

from unicuco.errors import TextError

TextName = Literal["calibration", "search", "validation", "test"]
TEXT_NAMES: Final[tuple[TextName, ...]] = get_args(TextName)

HELD_OUT: Final[dict[TextName, tuple[str, ...]]] = {
    "calibration": (
        "shutil.py", "dataclasses.py", "contextlib.py", "queue.py", "sched.py", "unittest/case.py",
        "logging/handlers.py", "urllib/robotparser.py", "copy.py", "string.py", "poplib.py",
        "imaplib.py",
    ),
    "search": (
        "difflib.py", "zipfile.py", "fractions.py", "threading.py", "tempfile.py", "http/server.py",
        "email/header.py", "random.py", "selectors.py", "json/__init__.py",
        "concurrent/futures/thread.py",
    ),
    "validation": (
        "configparser.py", "pathlib.py", "calendar.py", "json/encoder.py", "json/decoder.py",
        "csv.py",
        "urllib/parse.py", "traceback.py", "concurrent/futures/process.py", "asyncio/streams.py",
        "html/parser.py", "wsgiref/validate.py",
    ),
    "test": (
        "argparse.py", "tarfile.py", "statistics.py", "http/client.py", "heapq.py", "textwrap.py",
        "asyncio/queues.py", "email/message.py", "logging/config.py", "shelve.py",
    ),
}  # fmt: skip

# Not prose that a language model should spend capacity on: test packages, generated tables,
# vendored wheels.
_LEFT_OUT_PARTS: Final = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "encodings",
        "__pycache__",
    }
)
_LEFT_OUT_PREFIXES: Final = ("_sysconfigdata", "config-")


def standard_library() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def held_out_text(name: TextName) -> str:
    """Return one of the four held-out texts.

    Args:
        name: calibration, search, validation or test.

    Returns:
        The modules' source, joined by blank lines, in the fixed order of `HELD_OUT`.

    Raises:
        TextError: a module is missing from this Python (a stripped-down distribution).
    """
    root = standard_library()
    missing = [module for module in HELD_OUT[name] if not (root / module).is_file()]
    if missing:
        raise TextError(
            f"the {name} text needs {', '.join(missing)} under {root}, which this Python lacks; "
            "use a complete Python 3.11 or give your own text"
        )
    return "\n\n".join(_read(root / module) for module in HELD_OUT[name])


def training_texts() -> list[str]:
    """Return every training module's source in path order: none held out, no test package."""
    root = standard_library()
    held_out = {module for modules in HELD_OUT.values() for module in modules}
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [
        _read(root / path)
        for path in files
        if path.as_posix() not in held_out and _is_training(path)
    ]


def digest(text: str) -> str:
    """Return the sha256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _is_training(path: Path) -> bool:
    return not any(
        part in _LEFT_OUT_PARTS or part.startswith(_LEFT_OUT_PREFIXES) for part in path.parts
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
