"""What the parts share: a prepared model with its judges, tables, and a file of results."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch

from unicuco.evaluate import LocalEvaluator
from unicuco.models import load_tokenizer
from unicuco.pipeline import LearnOptions
from unicuco.pipeline.preparation import Prepared, allocation_context, prepare
from unicuco.pipeline.texts import test_windows
from unicuco.space import StrategySpace
from unicuco.types import Plan, Prediction, Request, ServedAs, Strategy, Target

RESULTS = Path(__file__).parent / "results"


_RELATIONS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One acceptance test as measured: ``bound`` is a relation and a number, or empty."""

    method: str
    test: str
    figure: float
    bound: str

    @property
    def passed(self) -> bool | None:
        """Whether the bound is met; none where there is none."""
        if not self.bound:
            return None
        relation, limit = self.bound.split()
        return _RELATIONS[relation](self.figure, float(limit))

    @property
    def verdict(self) -> str:
        """The table's last column."""
        return {None: "", True: "met", False: "MISSED"}[self.passed]


class Bench:
    """A prepared model with its judges; preparation costs 5 units (ranks 1, Fisher 3, dense 1).

    Args:
        model: any name a command takes.
        tokens: per evaluation.
        test_tokens: of the test text.
        seed: of the labels that the Fisher pass draws.
        preset: whose search is configured.
    """

    preparation_units = 5.0

    def __init__(
        self, model: str, *, tokens: int = 3072, test_tokens: int = 16_384, seed: int = 0
    ) -> None:
        self.model = model
        with tempfile.TemporaryDirectory() as folder:
            options = LearnOptions(model=model, out=Path(folder), tokens=tokens, seed=seed)
            self.prepared: Prepared = prepare(options, Path(folder), lambda _: None)
        self.arrays = self.prepared.model_arrays()
        evaluator, self.search_arrays = self.prepared.judging(self.prepared.texts.search)
        self.search_judge = LocalEvaluator(evaluator, self.search_arrays)
        tokenizer = load_tokenizer(self.prepared.loaded.folder)
        test = test_windows(tokenizer, None, tokens=test_tokens, context=self.prepared.context)
        evaluator, self.test_arrays = self.prepared.judging(test)
        self.test_judge = LocalEvaluator(evaluator, self.test_arrays)
        self.test_tokens = test.num_tokens
        self.space = self.prepared.space
        self.context = allocation_context(self.prepared)

    def test_kl(self, strategies: Sequence[Strategy]) -> list[float]:
        """Return the KL of strategies on the test text."""
        return [self.test_judge.evaluate(strategy).kl for strategy in strategies]


def unpredicted_plan(space: StrategySpace, strategy: Strategy, sparsity: float) -> Plan:
    """Return the plan of a masked variant whose KL nobody predicted, so that it can be written."""
    cost = space.cost
    return Plan(
        request=Request(target=Target.SPARSITY, value=sparsity),
        strategy=strategy,
        sparsity=sum(cost.site_drops(strategy.values).values()) / cost.num_site_weights,
        kept_params=cost.kept_params(strategy.values),
        total_params=cost.total_params,
        num_bytes=cost.num_bytes(strategy.values),
        served_as=ServedAs.MASK,
        kl=Prediction(mean=0.0, lo95=0.0, hi95=0.0),
    )


def careful_copy(source: Path, target: Path) -> None:
    """Copy a file as a variant's must be written: hashed on the way, synced, renamed."""
    staged, digest, buffer = target.with_name("staged"), hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    with source.open("rb", buffering=0) as read, staged.open("wb", buffering=0) as written:
        while count := read.readinto(buffer):
            digest.update(view[:count])
            written.write(view[:count])
        os.fsync(written.fileno())
    staged.replace(target)


def provenance() -> dict[str, object]:
    """Return what a reader needs to place the numbers."""
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "revision": revision,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "gpytorch": version("gpytorch"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def status_bytes(name: str) -> int:
    """Return a figure of this process' memory: ``VmRSS``, or ``VmHWM``, the peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def save(name: str, document: dict[str, object]) -> Path:
    """Write results to ``benchmarks/results/NAME.json``, and where the newest come from."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**document, "provenance": provenance()}, indent=1) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; floats with three decimals."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])
