from __future__ import annotations

import errno

import pytest

from unicuco.errors import InfeasibleRequestError, ModelError, RequestError, RunError
from unicuco.failure import describe_failure


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RequestError("sparsity must be in [0, 1), got 2"), 2, "got 2"),
        (InfeasibleRequestError("too small", nearest=7.0), 3, "too small"),
        (ModelError("no model"), 1, "no model"),
        (RunError("broken\nrun"), 1, "broken run"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "full, writing /x/y"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "no permission for /x"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 1, "read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1, "no such file or folder: /x"),
        (OSError("odd"), 1, "odd"),
        (ValueError("Io: No space left on device (os error 28)"), 1, "disk is full"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("[alloc_cpu] can't allocate memory: 9 bytes"), 1, "out of memory"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (KeyError("axis"), 1, "unexpected KeyError"),
    ],
)
def test_every_error_becomes_one_line_and_a_code(error, code: int, words: str) -> None:
    failure = describe_failure(error)
    assert failure.exit_code == code
    assert words in failure.line
    assert failure.line.startswith("error: ")
    assert "\n" not in failure.line
