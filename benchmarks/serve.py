"""How the service holds: strategies against a no-op route, a burst, jobs against copying.

``python -m benchmarks.serve``; results go to ``benchmarks/results/serve.json``. Ratios within one
run, rates interleaved, medians. The callers share the machine with the service, in both terms of
every ratio. The run is a small one that is learned first: how well it learned changes no time.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from benchmarks.common import save, table
from cluster.local_ray import local_ray
from serve.config import EngineOptions, ServeConfig
from serve.proxy import ENVIRONMENT
from serve.running import running
from unicuco.pipeline import LearnOptions, LocalBackend, learn

_CALLERS = 64
_JOBS = 64
_FEW_JOBS = 8
_OBJECTS_BYTES = 64 * 2**20


class Caller:
    """One kept-alive connection that speaks just enough HTTP to cost little itself."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    async def __aenter__(self) -> Caller:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def call(self, request: bytes, status: bytes = b"200") -> None:
        """Send one request and read its whole answer, which must have that status."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status), head
        length = next(
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        await self._reader.readexactly(length)


def bare(number: int) -> bytes:
    """Return a request of the route that does nothing and has no body."""
    return b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def no_op(number: int) -> bytes:
    """Return a request with a body like `strategy`'s that is answered without asking anybody.

    It takes the same way through proxy, gate, validation and route, which then finds no such run.
    """
    return strategy(number, model="none")


def strategy(number: int, model: str = "run") -> bytes:
    """Return a request for one strategy; no two numbers ask for the same one."""
    sparsity = 0.1 + 0.75 * ((number * 0.618033988749895) % 1.0)
    body = json.dumps({"model": model, "requests": [{"sparsity": sparsity}]}).encode()
    head = f"POST /v1/strategies HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


async def sustained(port: int, make: Callable[[int], bytes], seconds: float, offset: int) -> float:
    """Return calls per second of callers that never pause."""
    status = b"404" if make is no_op else b"200"
    count, deadline = 0, time.perf_counter() + seconds

    async def work() -> None:
        nonlocal count
        async with Caller("127.0.0.1", port) as caller:
            while time.perf_counter() < deadline:
                count += 1
                await caller.call(make(offset + count), status)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(_CALLERS)))
    return count / (time.perf_counter() - started)


async def one_call(port: int, offset: int) -> float:
    """Return the median seconds of one call on an idle service."""
    times = []
    async with Caller("127.0.0.1", port) as caller:
        for number in range(30):
            started = time.perf_counter()
            await caller.call(strategy(offset + number))
            times.append(time.perf_counter() - started)
    return statistics.median(times)


async def burst(port: int, offset: int, number: int = 64) -> float:
    """Return the seconds until all of ``number`` simultaneous callers are answered."""
    callers = [Caller("127.0.0.1", port) for _ in range(number)]
    for caller in callers:
        await caller.__aenter__()
    started = time.perf_counter()
    await asyncio.gather(*(c.call(strategy(offset + k)) for k, c in enumerate(callers)))
    seconds = time.perf_counter() - started
    for caller in callers:
        await caller.__aexit__()
    return seconds


def measure_strategies(port: int, pairs: int, seconds: float) -> dict[str, float]:
    """Measure rates in turn, and bursts between them."""
    ratios, bare_ratios, idle, busy, bursts, singles = [], [], [], [], [], []
    asyncio.run(sustained(port, strategy, 2.0, 0))
    for pair in range(pairs):
        offset = 1_000_000 * (pair + 1)
        idle.append(asyncio.run(sustained(port, no_op, seconds, 0)))
        busy.append(asyncio.run(sustained(port, strategy, seconds, offset)))
        ratios.append(busy[-1] / idle[-1])
        bodiless = asyncio.run(sustained(port, bare, seconds, 0))
        bare_ratios.append(busy[-1] / bodiless)
        singles.append(asyncio.run(one_call(port, offset + 500_000)))
        taken = asyncio.run(burst(port, offset + 600_000))
        bursts.append(taken / (64 / busy[-1] + singles[-1] / 1.3))
        rates = f"{bodiless:.0f}, {idle[-1]:.0f}, {busy[-1]:.0f} per second"
        print(f"bodiless, no-op, strategies: {rates}; burst {taken:.3f} s")
    return {
        "no_op_per_s": statistics.median(idle),
        "strategies_per_s": statistics.median(busy),
        "strategies_over_no_op": statistics.median(ratios),
        "strategies_over_bodiless_get": statistics.median(bare_ratios),
        "one_call_ms": 1000 * statistics.median(singles),
        # At most 1.3 when a burst of 64 takes 1.3 × (64 ÷ rate) plus one call.
        "burst_64_over_rate": statistics.median(bursts),
    }


def copy_checkpoints(source: Path, folder: Path, number: int) -> float:
    """Copy a checkpoint so many times with hashing and sync; return the seconds."""
    started = time.perf_counter()
    for k in range(number):
        target = folder / f"copy-{k}"
        target.mkdir()
        for path in source.iterdir():
            digest = hashlib.sha256()
            with path.open("rb") as read, (target / path.name).open("wb") as write:
                while block := read.read(1 << 20):
                    digest.update(block)
                    write.write(block)
                write.flush()
                os.fsync(write.fileno())
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    for k in range(number):
        shutil.rmtree(folder / f"copy-{k}")
    return seconds


async def run_jobs(url: str, variants: Path, number: int, name: str) -> float:
    """Ask for ``number`` different variants at once; return the seconds until all are on disk.

    Variants appear whole, by a rename; looking for them costs the service nothing.
    """
    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def ask(k: int) -> None:
            request = {"sparsity": 0.2 + 0.6 * k / number}
            body = {"model": "run", "request": request, "suffix": f"{name}-{k}"}
            (await client.post("/v1/compression/jobs", json=body)).raise_for_status()

        await asyncio.gather(*(ask(k) for k in range(number)))
    left = {variants / f"{name}-{k}" for k in range(number)}
    while left:
        await asyncio.sleep(0.01)
        left = {folder for folder in left if not folder.exists()}
    return time.perf_counter() - started


def measure_jobs(config: ServeConfig, folder: Path, rounds: int) -> dict[str, float]:
    """Measure few jobs, many jobs and copies in turn; the first jobs of all open the run."""
    few, many, copied = [], [], []
    variants = Path(config.data) / "variants" / "run"
    url = f"http://127.0.0.1:{config.port}"
    with httpx.Client(base_url=url, timeout=120) as client:
        asyncio.run(run_jobs(url, variants, _FEW_JOBS, "warm"))
        for number in range(rounds):
            few.append(asyncio.run(run_jobs(url, variants, _FEW_JOBS, f"few-{number}")))
            many.append(asyncio.run(run_jobs(url, variants, _JOBS, f"many-{number}")))
            copied.append(copy_checkpoints(variants / "warm-0", folder, _JOBS))
            print(f"8 jobs {few[-1]:.2f} s, 64 jobs {many[-1]:.2f} s, 64 copies {copied[-1]:.2f} s")
            for path in variants.glob("*-*"):
                if not path.name.startswith("warm"):
                    client.delete(f"/v1/models/run:{path.name}").raise_for_status()
            time.sleep(config.pruning.downscale_delay_s + 5)  # back to one replica
    per_copy = [many_s / copy_s for many_s, copy_s in zip(many, copied, strict=True)]
    gain = [(_JOBS / m) / (_FEW_JOBS / f) for m, f in zip(many, few, strict=True)]
    return {
        "jobs_8_s": statistics.median(few),
        "jobs_64_s": statistics.median(many),
        "copies_64_s": statistics.median(copied),
        "jobs_64_over_copies": statistics.median(per_copy),
        "throughput_64_over_8": statistics.median(gain),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Measure how the service holds.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3, help="Of jobs; 0 leaves them out.")
    parser.add_argument("--run", type=Path, help="A run called `run`; learned if left out.")
    parser.add_argument("--port", type=int, default=8765)
    values = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = values.run or folder / "run"
        if values.run is None:
            options = LearnOptions(model=values.model, out=run, evaluations=8)
            learn(options, backend=LocalBackend(), progress=lambda _: None)
        config = ServeConfig.of_runs(
            [run],
            data=folder / "data",
            port=values.port,
            engines=EngineOptions(max_engines=0),
        )
        os.environ.update(ENVIRONMENT)
        with local_ray(_OBJECTS_BYTES), running(config):
            figures = measure_strategies(values.port, values.pairs, values.seconds)
            if values.rounds:
                figures |= measure_jobs(config, folder, values.rounds)
    print(table(["what", "figure"], list(figures.items())))
    print("saved to", save("serve", {"model": values.model, "figures": figures}))


if __name__ == "__main__":
    main()
