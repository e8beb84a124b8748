"""How long does `make demo` take after set-up, and how much memory beside vLLM?

Runs the demo in a process of its own and samples, a few times a second, the proportional set size
(PSS: memory that processes share is counted once) of it and of all that it starts. vLLM's worker
and its children are counted apart.

``python -m benchmarks.demo``; results go to ``benchmarks/results/demo.json``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from benchmarks.common import save, table

_EVERY_S = 0.3
_VLLM = "vllm"


def main() -> None:
    """Run, print and save."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "unicuco.cli.demo", "--out", str(Path(folder) / "demo")]
        demo = subprocess.Popen(command)
        peaks = _Peaks(demo.pid)
        code = demo.wait()
        peaks.stop()
        seconds = time.perf_counter() - started
    if code:
        sys.exit(code)
    figures = {
        "seconds": seconds,
        "peak_gib_beside_vllm": peaks.beside_vllm / 2**30,
        "peak_gib_of_vllm": peaks.vllm / 2**30,
        "processes_at_peak": peaks.num_processes,
    }
    print(table(["what", "figure"], list(figures.items())))
    for name, num_bytes in peaks.shares:
        print(f"  {num_bytes / 2**20:7.0f} MiB  {name}")
    print("saved to", save("demo", {"figures": figures}))


class _Peaks:
    """The largest sums seen so far, in bytes; samples in a thread until stopped."""

    def __init__(self, pid: int) -> None:
        self.beside_vllm = 0
        self.vllm = 0
        self.num_processes = 0
        self.shares: list[tuple[str, int]] = []
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        engines = {p.pid for p in processes if _VLLM in _command(p)}
        # vLLM's own helpers carry other names.
        inside = engines | {
            p.pid for p in processes if engines & {parent.pid for parent in _parents(p)}
        }
        shares = [(_command(p), _pss(p)) for p in processes if p.pid not in inside]
        total = sum(num_bytes for _, num_bytes in shares)
        self.vllm = max(self.vllm, sum(_pss(p) for p in processes if p.pid in inside))
        if total > self.beside_vllm:
            self.beside_vllm, self.num_processes = total, len(shares)
            self.shares = sorted(shares, key=lambda share: -share[1])


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:70]
    except psutil.Error:
        return ""


def _parents(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.parents())
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
