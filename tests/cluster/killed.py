"""A driver that is killed in the middle of its work, with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run_and_kill(words: Sequence[str], notes: Path, variable: str, *, after: int) -> dict[str, str]:
    """Run a command until ``notes``, which the variable names to it, has so many lines; kill it.

    Returns:
        The environment to run it in again.
    """
    notes.touch()
    environment = os.environ | {
        variable: str(notes),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TUNE_GLOBAL_CHECKPOINT_S": "0",
    }
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    while len(notes.read_text().splitlines()) < after:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return environment
