"""64 requests, to saved checkpoints: one learned run beside tools that prune anew every time.

All get the same targets, model and calibration tokens, in turn, each in a process of its own with
one thread. Rivals start from the model's folder every time, as their users do; what a process
imports is not counted. ``llmcompressor`` is the package as published, in an environment of its own
under ``out/benchmarks`` (made on the first call, minutes). The search is asked for 8 requests only
and the table has no figure for more. KL is measured on test text, from the checkpoints.

``python -m benchmarks.requests [METHOD …] [--requests 64] [--model reference]``; results go to
``benchmarks/results/requests.json``, written after every method and kept where one is not asked
for again.

Two methods show what the figures mean: ``copy`` prunes nothing and copies the model's files as
carefully as variants are written, the least that any checkpoint costs; ``llmcompressor-wanda-128``
calibrates on as many windows as Wanda's authors do (PAPERS.md 12: 128 samples of the context's
length), not on the run's few.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.common import RESULTS, save, table
from benchmarks.ledger import WORK
from unicuco.models import load_model, load_tokenizer, resolve_model
from unicuco.pipeline import evaluate_variant
from unicuco.pipeline.texts import learning_texts, window_length

SEARCH: Final = "evopress"
LLMCOMPRESSOR: Final = "llmcompressor==0.14.0"
_CALIBRATED_LONGER: Final = "llmcompressor-wanda-128"
METHODS: Final = (
    "stratnet", "copy", "wanda", "owl", "llmcompressor-wanda", _CALIBRATED_LONGER,
    "llmcompressor-sparsegpt", SEARCH,
)  # fmt: skip
_AT: Final = (1, 8, 64)
_SEARCHED: Final = 8
_JUDGED: Final = 4
_RANGE: Final = (0.3, 0.8)
_TEST_TOKENS: Final = 8192
_TOOLS: Final = Path(__file__).parent / "request_tools"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a method's process reported.

    ``learning_s`` before the first request; ``seconds`` of wall time and ``cpu_s`` per request;
    ``peak_bytes`` resident at most, of which ``imported_bytes`` before it began; ``kl`` by target,
    in nats per token.
    """

    method: str
    learning_s: float
    seconds: list[float]
    cpu_s: list[float]
    imported_bytes: int
    peak_bytes: int
    kl: dict[str, float]

    def total_s(self, requests: int, *, learning: bool) -> float | str:
        """Return the time of the first requests; a dash where fewer were measured."""
        if requests > len(self.seconds):
            return "–"
        return sum(self.seconds[:requests]) + (self.learning_s if learning else 0.0)


def targets(count: int) -> list[float]:
    """Return distinct sparsities, and so that the first eight already span the range."""
    low, high = _RANGE
    order = sorted(range(count), key=lambda k: (k % max(1, count // _SEARCHED), k))
    return [round(low + (high - low) * k / max(1, count - 1), 4) for k in order]


def measure(
    method: str, model: Path, count: int, tokens: int, test_tokens: int = _TEST_TOKENS
) -> Outcome:
    """Run a method's process and judge some of what it wrote."""
    wanted = targets(count)[: _SEARCHED if method == SEARCH else count]
    with tempfile.TemporaryDirectory(prefix="uc-requests-") as name:
        folder = Path(name)
        task = {
            "method": method,
            "model": str(model),
            "targets": wanted,
            "out": str(folder),
            "tokens": tokens,
            "windows": _calibration(model, tokens, 128 if method == _CALIBRATED_LONGER else None),
        }
        (folder / "task.json").write_text(json.dumps(task))
        report = _run(method, folder)
        judged = sorted(wanted)[:: max(1, len(wanted) // _JUDGED)]
        kl = {f"{target:g}": _kl(folder / f"{target:g}", model, test_tokens) for target in judged}
    return Outcome(method=method, kl=kl, **report)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Measure 64 requests, to saved checkpoints.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--model", default="reference")
    parser.add_argument("--requests", type=int, default=_AT[-1])
    parser.add_argument("--tokens", type=int, default=3072, help="of calibration")
    values = parser.parse_args(arguments)
    unknown = [name for name in values.methods if name not in METHODS]
    if unknown:
        raise SystemExit(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    setting = {"model": values.model, "requests": values.requests, "tokens": values.tokens}
    outcomes = _known(setting)
    for method in values.methods or METHODS:
        outcomes[method] = measure(
            method, resolve_model(values.model), values.requests, values.tokens
        )
        rows = [asdict(outcome) for outcome in outcomes.values()]
        print("saved to", save("requests", {"setting": setting, "outcomes": rows}), flush=True)
    print(describe(outcomes))


def describe(outcomes: dict[str, Outcome]) -> str:
    """Return the table, and how many times faster the run is per request."""
    rows = [
        [
            outcome.method,
            len(outcome.seconds),
            statistics.median(outcome.seconds),
            statistics.median(outcome.cpu_s),
            *(outcome.total_s(n, learning=False) for n in _AT),
            *(outcome.total_s(n, learning=True) for n in _AT),
            statistics.median(outcome.kl.values()),
            f"{outcome.peak_bytes / 2**20:.0f} ({outcome.imported_bytes / 2**20:.0f})",
        ]
        for outcome in outcomes.values()
    ]
    header = ["method", "requests measured", "s per request, median", "CPU s"]
    header += [f"s for {n}" for n in _AT] + [f"s for {n} with learning" for n in _AT]
    header += ["median KL of those judged", "peak MiB (imports)"]
    lines = [table(header, rows)]
    if "stratnet" in outcomes:
        own, mean = outcomes["stratnet"], statistics.fmean
        lines += [
            f"{name}: {_times(mean(outcome.seconds) / mean(own.seconds))} times the run's seconds"
            f" per request, learning not counted, {_times(mean(outcome.cpu_s) / mean(own.cpu_s))}"
            " times its CPU seconds"
            for name, outcome in outcomes.items()
            if name != "stratnet"
        ]
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _known(setting: dict[str, object]) -> dict[str, Outcome]:
    path = RESULTS / "requests.json"
    if not path.exists():
        return {}
    document = json.loads(path.read_text())
    if document["setting"] != setting:
        return {}
    return {row["method"]: Outcome(**row) for row in document["outcomes"]}


def _calibration(model: Path, tokens: int, count: int | None = None) -> list[list[int]]:
    """Return the windows of the run's calibration text, or so many."""
    context = window_length(load_model(model).profile.max_context, None)
    wanted = tokens if count is None else count * context
    texts = learning_texts(load_tokenizer(model), None, tokens=wanted, context=context)
    return texts.calibration.ids.tolist()


# Any: JSON, the fields of an `Outcome`
def _run(method: str, folder: Path) -> dict[str, Any]:
    task = str(folder / "task.json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if method.startswith("llmcompressor"):
        environment.pop("PYTHONPATH", None)  # nothing of this project but the one script
        command = [str(_environment()), str(_TOOLS / "foreign.py"), task]
    else:
        command = [sys.executable, "-m", "benchmarks.request_tools.ours", task]
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, cwd=_TOOLS.parents[1]
    )
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads((folder / "report.json").read_text()))


def _environment() -> Path:
    """Return the Python that has llmcompressor, making its environment on the first call."""
    folder = WORK / "llmcompressor"
    python = folder / "bin" / "python"
    stamp = folder / "made"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "--no-input", "install", "-qq"]
        subprocess.run([*pip, "torch==2.13.0", LLMCOMPRESSOR], check=True)
        stamp.touch()
    return python


def _kl(folder: Path, model: Path, tokens: int) -> float:
    kl = evaluate_variant(folder, reference=str(model), tokens=tokens).kl
    assert kl is not None
    return kl


if __name__ == "__main__":
    main()
