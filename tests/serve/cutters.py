"""Cutters that take their time, or take their process with them: what happens is in the target.

The thousandths of a sparsity say it: 0.601 dies once before writing, 0.602 once after writing and
before the commit, 0.603 at every attempt; what ends in 5 is slow, and what ends in 6 waits until it
is let go.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import ray

from serve.catalogue import Catalogue
from serve.worker import RunCutter
from unicuco.types import Request

SLOW_S = 1.0
NOTES = "cuts.txt"
LET_GO = "let-go.txt"  # lies in the service's data when those who wait may go on
DIES_BEFORE, DIES_AFTER, DIES_ALWAYS, SLOW, WAITS = 1, 2, 3, 5, 6


class ChaosCutter:
    """The real cutter, and then some."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._real = RunCutter(catalogue)
        self._staging = catalogue.staging_place(".")

    def cut(self, run_id: str, request: Request, out: Path) -> Mapping[str, object]:
        """Cut, slowly or to the death."""
        kind = round(request.value * 1000) % 10
        if kind == SLOW:
            time.sleep(SLOW_S)
        while kind == WAITS and not (self._staging.parent / LET_GO).exists():
            time.sleep(0.05)
        if kind == DIES_BEFORE:
            self._die_once(request)
        if kind == DIES_ALWAYS:
            os.kill(os.getpid(), signal.SIGKILL)
        document = self._real.cut(run_id, request, out)
        if kind == DIES_AFTER:
            self._die_once(request)
        return document

    def _die_once(self, request: Request) -> None:
        mark = self._staging.parent / f"died-{request.value}"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class NotingCutter(ChaosCutter):
    """Notes which node cut what, one line each: node, job, token."""

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__(catalogue)
        self._notes = self._staging.parent / NOTES

    def cut(self, run_id: str, request: Request, out: Path) -> Mapping[str, object]:
        """Cut and note."""
        document = super().cut(run_id, request, out)
        job_id, _, token = out.name.rpartition(".")
        node = ray.get_runtime_context().get_node_id()
        with self._notes.open("a", encoding="utf-8") as notes:  # one short write: whole lines
            notes.write(f"{node} {job_id} {token}\n")
        return document
