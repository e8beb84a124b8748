"""Free choices of the methods that have one, made on validation text.

What a paper publishes is kept as it is. What it leaves open, or what can't be kept because a method
runs with fewer steps here than there, is one number per method: the learning rate of Lua-LLM, BESA
and AdapMTL, the first step of rank-window descent, the depth of EvoP's patterns. Each value of a
small grid answers a request or more; the one whose KL on the validation text is least, relative to
uniform and as a geometric mean over the requests, is best; a default within a hundredth of it stays
as it was. The test text is not read. A test holds the defaults in `unicuco/allocate` and
`unicuco/search` to this table.

``python -m benchmarks.rates [METHOD …]``; ``benchmarks/results/rates.json`` is written after every
value and resumed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch

from benchmarks.common import RESULTS, table
from benchmarks.jobs import cpu_seconds
from benchmarks.ledger import write
from unicuco.allocate import AdapMtl, Allocator, Besa, Lua, RowAllocator
from unicuco.allocate.adapmtl import AdapMtlOptions
from unicuco.allocate.besa import BesaOptions
from unicuco.allocate.lua import LuaOptions
from unicuco.calibration import Sampling
from unicuco.evaluate import LocalEvaluator
from unicuco.pipeline import LearnOptions
from unicuco.pipeline.contest import Contest
from unicuco.pipeline.preparation import allocation_context, prepare
from unicuco.search import RequestConfig, RequestSearch, SearchAllocator
from unicuco.search.descent import LEARNING_RATE, Descent
from unicuco.search.drive import outcome_of
from unicuco.search.evop import Evop, EvopOptions
from unicuco.search.request import run_request

PATH: Final = RESULTS / "rates.json"
_ONE: Final = (0.6,)
_ALL: Final = (0.5, 0.6, 0.7, 0.8)  # of a method that trains once for all of them
_TIE: Final = 1.01
_EVOP_UNITS: Final = 40.0  # enough to tell depths apart


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One value of one method on one request; ``seconds`` of CPU time of one thread."""

    method: str
    value: float
    sparsity: float
    kl: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A method's free choice: what it is, the values tried, how one is used, and the default."""

    what: str
    values: tuple[float, ...]
    make: Callable[[Validation, float], Allocator]
    default: float
    sparsities: tuple[float, ...] = _ONE


class Validation:
    """The reference model prepared with one seed, and its validation text."""

    def __init__(self, *, tokens: int) -> None:
        with TemporaryDirectory() as folder:
            options = LearnOptions(model="reference", out=Path(folder), tokens=tokens)
            prepared = prepare(options, Path(folder), lambda _: None)
            contest = Contest(prepared, Path(folder), seed=0, progress=lambda _: None)
        self.context = allocation_context(prepared)
        self._judge = LocalEvaluator(*prepared.judging(prepared.texts.validation))
        self._texts = {s: contest.search_text(s) for s in Sampling}
        self._prepared = prepared
        self._config = contest.config

    def search(
        self, make: Callable[[RequestConfig], RequestSearch], units: float | None = None
    ) -> SearchAllocator:
        """Return a search as an allocator, judged by this process on its own search text."""
        config = replace(self._config, units=units)
        evaluator = LocalEvaluator(*self._prepared.judging(self._texts[make(config).sampling]))
        return SearchAllocator(
            "search",
            make,
            config,
            lambda search: run_request(search, lambda ask: outcome_of(evaluator, ask)),
        )

    def kl(self, allocator: Allocator, sparsity: float) -> float:
        """Return the KL on validation text of an allocator's answer."""
        (strategy,) = allocator.allocate([sparsity])
        rows = allocator.row_rule(strategy) if isinstance(allocator, RowAllocator) else None
        return self._judge.evaluate(strategy, rows=rows).kl

    def uniform_kl(self, sparsity: float) -> float:
        """Return the KL of equal sparsity everywhere."""
        return self._judge.evaluate(self.context.space.uniform(sparsity)).kl


CHOICES: Final[dict[str, Choice]] = {
    "lua": Choice(
        what="learning rate of 100 steps (published: 1e-3 or 1e-4, and 500)",
        values=(3e-4, 1e-3, 5e-3, 1e-2, 2e-2),
        make=lambda v, rate: Lua(v.context, LuaOptions(learning_rate=rate)),
        default=LuaOptions().learning_rate,
    ),
    "besa": Choice(
        what="learning rate of Adam (published: Prodigy, which finds its own)",
        values=(0.02, 0.05, 0.1),
        make=lambda v, rate: Besa(v.context, BesaOptions(learning_rate=rate)),
        default=BesaOptions().learning_rate,
    ),
    "adapmtl": Choice(
        what="learning rate of 200 steps (published: 1e-3, and 20,000)",
        values=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
        make=lambda v, rate: AdapMtl(v.context, AdapMtlOptions(learning_rate=rate)),
        default=AdapMtlOptions().learning_rate,
        sparsities=_ALL,
    ),
    "descent": Choice(
        what="first step in logits (ours)",
        values=(0.1, 0.2, 0.4, 0.8),
        make=lambda v, rate: v.search(lambda config: Descent(config, rate)),
        default=LEARNING_RATE,
    ),
    "evop": Choice(
        what=f"depth of a pattern at {_EVOP_UNITS:.0f} units (published: 1, whole layers)",
        values=(0.1, 0.2, 0.4, 1.0),
        make=lambda v, depth: v.search(
            lambda config: Evop(config, EvopOptions(depth=depth)), _EVOP_UNITS
        ),
        default=EvopOptions().depth,
    ),
}


def ratios(entries: Sequence[Entry], method: str) -> dict[float, float]:
    """Return, per value, the geometric mean over requests of KL relative to uniform's.

    Only of values that answered as many requests as any did.
    """
    uniform = {e.sparsity: e.kl for e in entries if e.method == "uniform"}
    logs: dict[float, list[float]] = {}
    for entry in entries:
        if entry.method == method:
            logs.setdefault(entry.value, []).append(math.log(entry.kl / uniform[entry.sparsity]))
    most = max(map(len, logs.values()), default=0)
    return {value: math.exp(sum(own) / most) for value, own in logs.items() if len(own) == most}


def best(entries: Sequence[Entry], method: str) -> float:
    """Return the best value of a method."""
    found = ratios(entries, method)
    return min(found, key=lambda value: found[value])


def holds(entries: Sequence[Entry], method: str) -> bool:
    """Say whether a method's default is the best value, or as good: one seed tells no hundredth."""
    found = ratios(entries, method)
    return found[CHOICES[method].default] <= _TIE * min(found.values())


def load_entries() -> list[Entry]:
    """Return what is measured so far."""
    if not PATH.exists():
        return []
    return [Entry(**fields) for fields in json.loads(PATH.read_text())["entries"]]


def measure(methods: Sequence[str], *, tokens: int) -> list[Entry]:
    """Measure what is missing."""
    entries, validation = load_entries(), Validation(tokens=tokens)
    there = {(entry.method, entry.value, entry.sparsity) for entry in entries}

    def add(method: str, value: float, sparsity: float, kl: Callable[[], float]) -> None:
        if (method, value, sparsity) in there:
            return
        with cpu_seconds() as elapsed:
            found = kl()
        entry = Entry(method=method, value=value, sparsity=sparsity, kl=found, seconds=elapsed())
        print(entry, flush=True)
        entries.append(entry)
        _save(entries, tokens)

    for sparsity in _ALL:
        add("uniform", 0.0, sparsity, lambda s=sparsity: validation.uniform_kl(s))  # type: ignore[misc]
    for method in methods:
        for value in CHOICES[method].values:
            allocator = CHOICES[method].make(validation, value)
            for sparsity in CHOICES[method].sparsities:
                add(method, value, sparsity, lambda a=allocator, s=sparsity: validation.kl(a, s))  # type: ignore[misc]
    return entries


def _save(entries: list[Entry], tokens: int) -> None:
    methods = [m for m in CHOICES if any(entry.method == m for entry in entries)]
    write(
        PATH,
        {
            "model": "reference",
            "text": "validation",
            "tokens": tokens,
            "seed": 0,
            "best": {method: best(entries, method) for method in methods},
            "entries": [asdict(entry) for entry in entries],
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(CHOICES), metavar="METHOD")
    parser.add_argument("--tokens", type=int, default=3072)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods if name not in CHOICES]
    if unknown:
        raise SystemExit(f"no choice of {', '.join(unknown)}; there are {', '.join(CHOICES)}")
    torch.set_num_threads(1)
    entries = measure(options.methods, tokens=options.tokens)
    rows = []
    for method in options.methods:
        found, value = ratios(entries, method), best(entries, method)
        default = CHOICES[method].default
        values = ", ".join(f"{tried:g}: {ratio:.3f}" for tried, ratio in found.items())
        note = f"default {default:g}" + ("" if holds(entries, method) else ": CHANGE IT")
        rows.append((method, CHOICES[method].what, values, f"{value:g}", note))
    print(table(("method", "choice", "KL / uniform's on validation text", "best", ""), rows))


if __name__ == "__main__":
    main()
