"""Runs every dense pass over a model and says by how much this process' own memory grew at most.

``python -m tests.unicuco.shards.memory_probe FOLDER whole|blockwise``: bytes, as the operating
system gives them, of memory that is no file's.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from pathlib import Path

from unicuco.importance import METRICS
from unicuco.pipeline.dense import open_dense
from unicuco.testing.cases import random_tokens
from unicuco.testing.tiny import build_tiny


def own_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found.group(1))


class Peak:
    """Looks every few milliseconds."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> int:
        self._is_over.set()
        self._thread.join()
        return self.num_bytes

    def _look(self) -> None:
        while not self._is_over.wait(0.003):
            self.num_bytes = max(self.num_bytes, own_bytes())


def main(folder: str, kind: str) -> None:
    tokens = random_tokens(seed=1, num_windows=2, context=32)
    model, _ = build_tiny()
    model(input_ids=tokens.ids)  # what the library needs for itself is there from here on
    before = own_bytes()
    peak = Peak()
    with (
        tempfile.TemporaryDirectory() as run,
        open_dense(folder, Path(run), whole=kind == "whole") as dense,
    ):
        ranks = dense.build_ranks(METRICS["wanda"], tokens)
        ranks.save(Path(run, "ranks"))
        dense.fisher_rank_sums(ranks.ranks, tokens, seed=0)
        dense.dense_reference(tokens.ids)
    print(peak.stop() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
