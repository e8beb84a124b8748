"""A helper process that answers JSON lines, one at a time, and never outlives its owner.

Why a process of its own: an engine must have its environment set before its first import, replaces
global state (``torch.set_num_threads``, loggers, signal handlers) and can die of a bad checkpoint;
none of that may reach the caller. What it does not know: what the questions mean.

Ends: the child leaves when its standard input closes, so also when the owner is killed; `close`
asks, waits, then kills the child's whole process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import unicuco
from unicuco.errors import EngineError

_GRACE_S: Final = 10.0
_POLL_S: Final = 0.5
_TAIL_BYTES: Final = 4000


class ChildProcess:
    """One running helper.

    Args:
        command: program and arguments.
        environment: the helper's whole environment; the folder that holds ``unicuco`` is put on its
            path.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_with_own_path(environment),
            # Ctrl-C reaches the owner alone, and the group can be killed as one
            start_new_session=True,
        )
        self._buffer = b""
        self._finalizer = weakref.finalize(self, _end, self._process, self._log, 0.0)

    @property
    def pid(self) -> int:
        """The process id, which is also its group's."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the helper still runs."""
        return self._finalizer.alive and self._process.poll() is None

    def ask(
        self, question: Mapping[str, object], *, timeout_s: float | None = None
    ) -> dict[str, object]:
        """Send one question and wait for its answer.

        Args:
            question: a JSON object.
            timeout_s: seconds to wait; none waits as long as the helper lives.

        Raises:
            EngineError: the helper died (the line carries its last words) or did not answer in
                time; it is ended then, since a late answer would be taken for the next question's.
        """
        if not self._finalizer.alive:
            raise EngineError("the engine's process is gone; load again")
        done = False
        try:
            self._send(json.dumps(question).encode() + b"\n")
            answer = self._receive(timeout_s)
            done = True
            return answer
        finally:
            if not done:  # also on KeyboardInterrupt: question and answer are out of step
                self.close(grace_s=0.0)

    def close(self, *, grace_s: float = _GRACE_S) -> None:
        """End the helper and all that it started, after at most ``grace_s`` seconds of grace."""
        if self._finalizer.detach() is not None:
            _end(self._process, self._log, grace_s)

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise EngineError(f"the engine's process ended: {self._last_words()}") from None

    def _receive(self, timeout_s: float | None) -> dict[str, object]:
        assert self._process.stdout is not None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if deadline is not None and time.monotonic() > deadline:
                raise EngineError(
                    f"the engine did not answer within {timeout_s:g} s: {self._last_words()}"
                )
            ready, _, _ = select.select([descriptor], [], [], _POLL_S)
            if not ready:
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise EngineError(f"the engine's process ended: {self._last_words()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _last_words(self) -> str:
        """The last line of the helper's log, with its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL_BYTES))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "it said nothing")
        return f"{last[:300]} (exit status {self._process.poll()})"


def _with_own_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Let the helper import this very ``unicuco``, also from a checkout that is not installed."""
    root = str(Path(unicuco.__file__).resolve().parent.parent)
    if root == sysconfig.get_paths()["purelib"]:
        return dict(environment)
    path = [root, *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}


def _end(process: subprocess.Popen[bytes], log: IO[bytes], grace_s: float) -> None:
    """Close the helper's input, wait, then kill its group; works on one that is already gone."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    if grace_s > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
    log.close()
