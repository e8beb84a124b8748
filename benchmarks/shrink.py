"""Are shrunk variants smaller, faster, and good? Ratios within one run, dense beside shrunk.

Parts:

- ``speed``: dense and shrunk models of random weights in the same vLLM, interleaved: seconds of a
  prefill of 4 prompts, and per step of decoding a batch of 16, against the ideal ratio (matrix
  operations of a prefill, weight bytes of a step), and file size against the parameter count;
- ``quality``: KL on test text at 0.1 to 0.4 of the site weights removed from the reference model.
  Its own parts are ``depth``: StratNet of blocks and of parts against depth methods, which search
  anew for every request. EvoPress gets the units of a whole run for each; with blocks, all patterns
  are enumerated too. ``width``: StratNet of width, with depth, with low rank, against uniform.
  ``modegpt``: MoDeGPT's modules with its allocation or the same share everywhere, and one module
  alone (then shares are of that module), against plain slicing of as much and against our orders of
  channels and pairs;
- ``mixed``: StratNet of depth, width and sparsity together against StratNets of each alone and a
  fixed split (so many parts gone, such a share by uniform widths, the rest by uniform zeros), tuned
  on the search text for every budget, at three budgets;
- ``latency``: time per token of random strategies, predicted and measured, both relative to dense
  (`benchmarks.shrink_latency`).

``python -m benchmarks.shrink [PART …] [--seeds 1] [--only METHOD] [--strategies 20]``; results go
to ``benchmarks/results/shrink-PART.json``. What is measured again replaces its rows of qualities,
and the others stay; every row says at which revision it was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import RESULTS, provenance, save, table
from benchmarks.shrink_latency import measure_latency
from unicuco.allocate import AxisCurves
from unicuco.allocate.depth import DEPTH_SCORES, DepthAllocator, DepthEvidence, WindowAllocator
from unicuco.allocate.modegpt import MoDeGpt
from unicuco.dimensions import Granularity
from unicuco.engines import VllmOptions
from unicuco.evaluate import LocalEvaluator
from unicuco.evaluate.arrays import pack_model
from unicuco.importance.unit_rivals import modegpt_units, sliced_units
from unicuco.importance.units import UnitStore
from unicuco.models import load_tokenizer
from unicuco.pipeline import LatencyOptions, LearnOptions, LocalBackend, Run, learn
from unicuco.pipeline.preparation import Prepared, prepare
from unicuco.pipeline.texts import test_windows
from unicuco.search.drops import DropSearch
from unicuco.search.request import RequestConfig, run_request
from unicuco.space import StrategySpace
from unicuco.types import Request, Strategy

SPARSITIES = (0.1, 0.2, 0.3, 0.4)
MIXED = ("depth", "width", "sparsity")
BUDGETS = (0.3, 0.45, 0.6)  # of the part mixed
GONE, WIDTHS = (0, 1, 2), (0.0, 0.1, 0.2, 0.3)  # of fixed splits: parts, shares of width
# Name -> (hidden size, blocks, query heads, key and value heads, channels, vocabulary).
SHAPES = {
    "wide blocks": (1024, 8, 16, 4, 2816, 8_192),
    "large vocabulary": (512, 8, 8, 4, 1408, 128_000),
}
PREFILL = (4, 256)  # prompts, tokens of each
DECODE = (16, 24)  # batch, steps
ROUNDS = 3


# --- speed ---------------------------------------------------------------------------------------


def dense_fields(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the configuration of a dense model."""
    hidden, blocks, heads, groups, channels, vocabulary = shape
    return {
        "hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": channels, "vocab_size": vocabulary,
        "max_position_embeddings": 1024, "head_dim": hidden // heads, "tie_word_embeddings": True,
    }  # fmt: skip


def write_pair(folder: Path, shape: tuple[int, ...]) -> dict[str, Any]:
    """Write a dense model and one of half its block parameters; return what is ideal."""
    hidden, blocks, heads, groups, channels, vocabulary = shape
    common = dense_fields(shape)
    shapes = [
        {
            "attention_heads": heads // groups * kept,
            "key_value_heads": kept,
            "intermediate_size": channels * kept // groups,
        }
        for kept in (1, groups - 1) * (blocks // 2)  # half of everything, no two neighbours alike
    ]
    configs = {
        "dense": AutoConfig.for_model("llama", **common),
        "shrunk": AutoConfig.for_model("shrunk_llama", **common, block_shapes=shapes),
    }
    facts: dict[str, Any] = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        params = sum(p.numel() for p in model.parameters())
        in_blocks = sum(p.numel() for p in model.model.layers.parameters())
        file_bytes = (folder / name / "model.safetensors").stat().st_size
        prompts, tokens = PREFILL
        facts[name] = {
            "params": params,
            "block_params": in_blocks,
            "file_bytes_per_param": file_bytes / params,
            # One head row per prompt: logits are computed for the last token alone.
            "prefill_work": in_blocks * prompts * tokens + hidden * vocabulary * prompts,
            "decode_bytes": 4 * params,
        }
    return facts


def measure_speed() -> None:
    """Measure every shape in a process of its own."""
    results = {}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            facts = write_pair(Path(scratch), shape)
            question = {
                "folders": [f"{scratch}/dense", f"{scratch}/shrunk"],
                "prefill": PREFILL, "decode": DECODE, "rounds": ROUNDS, "vocabulary": shape[-1],
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.shrink_vllm"],
                input=json.dumps(question),
                env={**os.environ, **VllmOptions(threads=1).environment()},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
        dense, shrunk = json.loads(done.stdout.splitlines()[-1])
        ideal = {
            "prefill": facts["dense"]["prefill_work"] / facts["shrunk"]["prefill_work"],
            "decode": facts["dense"]["decode_bytes"] / facts["shrunk"]["decode_bytes"],
        }
        measured = {kind: dense[kind] / shrunk[kind] for kind in ideal}
        results[name] = {
            "facts": facts, "seconds": {"dense": dense, "shrunk": shrunk}, "ideal": ideal,
            "ratio": measured, "of_ideal": {kind: measured[kind] / ideal[kind] for kind in ideal},
        }  # fmt: skip
        print(name, json.dumps(results[name]["ratio"]), json.dumps(results[name]["of_ideal"]))
    print(f"written to {save('shrink-speed', {'shapes': results})}")


# --- quality -------------------------------------------------------------------------------------


class Judge:
    """The reference model prepared for some dimensions, with judges on search and test text."""

    def __init__(self, dimensions: tuple[str, ...], granularity: str, seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            options = LearnOptions(
                model="reference", out=Path(folder), dimensions=dimensions,
                granularity=granularity, seed=seed,
            )  # fmt: skip
            self.prepared: Prepared = prepare(options, Path(folder), lambda _: None)
        self.space: StrategySpace = self.prepared.space
        self.search = LocalEvaluator(*self.prepared.judging(self.prepared.texts.search))
        tokenizer = load_tokenizer(self.prepared.loaded.folder)
        text = test_windows(tokenizer, None, tokens=16_384, context=self.prepared.context)
        self._config, self._arrays = self.prepared.judging(text)
        self.test = LocalEvaluator(self._config, self._arrays)

    def test_with(self, units: UnitStore) -> LocalEvaluator:
        """Return a judge on test text that narrows by other units."""
        return LocalEvaluator(self._config, {**self._arrays, **pack_model({}, {}, {}, units)})

    def evidence(self) -> DepthEvidence:
        """Return what methods that look at the stream look at."""
        return DepthEvidence(
            loaded=self.prepared.loaded, space=self.space,
            granularity=self.prepared.search.granularity,
            calibration=self.prepared.texts.calibration,
        )  # fmt: skip


def learned(dimensions: tuple[str, ...], granularity: str, seed: int, folder: Path) -> Run:
    """Learn a run with the default number of evaluations."""
    options = LearnOptions(
        model="reference", out=folder, dimensions=dimensions, granularity=granularity, seed=seed
    )
    return learn(options, backend=LocalBackend(), progress=lambda _: None)


def stratnet(run: Run, sparsities: Sequence[float] = SPARSITIES) -> list[Strategy]:
    """Return the run's answers."""
    plans = run.plan([Request.from_dict({"sparsity": s}) for s in sparsities])
    return [plan.strategy for plan in plans]  # type: ignore[union-attr]  # all can be met


def evopress(judge: Judge, units: float, seed: int) -> list[Strategy]:
    """Return what EvoPress' drop search finds, one search per target."""
    found = []
    for sparsity in SPARSITIES:
        config = RequestConfig(
            space=judge.space, curves=AxisCurves(judge.prepared.search.curves),
            blocks=tuple(range(judge.space.num_axes)), sparsity=sparsity,
            tokens=judge.prepared.texts.search.num_tokens, seed=seed, units=units,
        )  # fmt: skip
        search = DropSearch(config)
        run_request(search, lambda ask: judge.search.evaluate(ask.strategy, tokens=ask.tokens))
        found.append(search.best)
    return found


def enumerated(judge: Judge) -> list[Strategy]:
    """Return the best of all patterns of as many blocks as each target asks for."""
    found, d = [], judge.space.num_axes
    for sparsity in SPARSITIES:
        count = round(sum(judge.space.uniform(sparsity).values))
        best = min(
            (
                Strategy(settings=tuple((n, float(a in gone)) for a, n in enumerate(names)))
                for names in [judge.space.names]
                for gone in combinations(range(d), count)
            ),
            key=lambda strategy: judge.search.evaluate(strategy).kl,
        )
        found.append(best)
    return found


class Rows:
    """What was measured, with what is known from before."""

    def __init__(self, name: str, sparsities: Sequence[float], only: str) -> None:
        self.name = f"shrink-{name}"
        self.sparsities = sparsities
        self.only = only
        self.rows: list[dict[str, Any]] = []
        path = RESULTS / f"{self.name}.json"
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        self._revision = provenance()["revision"]

    def save(self) -> None:
        """Write all rows."""
        save(self.name, {"rows": self.rows})

    def add(
        self, method: str, seed: int, test: LocalEvaluator, make: Callable[[], list[Strategy]]
    ) -> None:
        """Measure a method's strategy for every target on test text, if it is wanted."""
        if not method.startswith(self.only):
            return
        started = time.process_time()
        strategies = make()
        seconds = time.process_time() - started
        own = (method, seed)
        self.rows = [row for row in self.rows if (row["method"], row["seed"]) != own]
        for sparsity, strategy in zip(self.sparsities, strategies, strict=True):
            evaluation = test.evaluate(strategy)
            self.rows.append(
                {
                    "method": method, "seed": seed, "asked": sparsity, "kl": evaluation.kl,
                    "sparsity": 1 - evaluation.kept_fraction, "cpu_seconds": seconds,
                    "revision": self._revision,
                }
            )  # fmt: skip
        shown = ", ".join(f"{row['kl']:.4f}" for row in self.rows[-len(self.sparsities) :])
        print(f"seed {seed} {method}: {shown} ({seconds:.0f} CPU s)", flush=True)

    def show(self) -> None:
        """Print the middle of the seeds."""
        lines = []
        for method in dict.fromkeys(row["method"] for row in self.rows):
            own = [row for row in self.rows if row["method"] == method]
            middle = [
                float(torch.tensor([r["kl"] for r in own if r["asked"] == s]).median())
                for s in self.sparsities
            ]
            lines.append([method, *middle])
        print(table(["test KL, nats", *map(str, self.sparsities)], lines))


def depth_methods(rows: Rows, seed: int, scratch: Path) -> None:
    """Measure what removes blocks or parts."""
    for granularity in Granularity:
        run = learned(("depth",), granularity, seed, scratch / f"depth-{granularity}")
        judge = Judge(("depth",), granularity, seed)
        name = "blocks" if granularity is Granularity.BLOCK else "parts"
        rows.add(f"stratnet, {name}", seed, judge.test, lambda run=run: stratnet(run))
        units = float(run.manifest["cost_units"])
        rows.add(
            f"evopress, {name}", seed, judge.test,
            lambda judge=judge, units=units: evopress(judge, units, seed),
        )  # fmt: skip
        for method in DEPTH_SCORES if seed == 0 else ():
            made = DepthAllocator(method, judge.evidence())
            rows.add(f"{method}, {name}", seed, judge.test, lambda m=made: m.allocate(SPARSITIES))
        if seed == 0:
            window = WindowAllocator(judge.evidence())
            rows.add(
                f"window_cosine, {name}", seed, judge.test, lambda w=window: w.allocate(SPARSITIES)
            )
        if seed == 0 and granularity is Granularity.BLOCK:
            rows.add("all patterns, blocks", seed, judge.test, lambda j=judge: enumerated(j))


def width_methods(rows: Rows, seed: int, scratch: Path) -> None:
    """Measure what removes units, and both."""
    for dimensions in (("width",), ("depth", "width"), ("width", "low_rank")):
        run = learned(dimensions, "layer", seed, scratch / "-".join(dimensions))
        judge = Judge(dimensions, "layer", seed)
        name = "+".join(dimensions)
        rows.add(f"stratnet, {name}", seed, judge.test, lambda run=run: stratnet(run))
        if seed == 0 and "depth" not in dimensions:
            space = judge.space
            rows.add(
                f"uniform, {name}", seed, judge.test,
                lambda space=space: [space.uniform(s) for s in SPARSITIES],
            )  # fmt: skip


def modegpt_methods(rows: Rows, seed: int, scratch: Path) -> None:
    """Measure MoDeGPT's modules beside slicing; nothing of them is drawn, so for one seed."""
    if seed:
        return
    judge = Judge(("width", "low_rank"), "layer", seed)
    loaded, units = judge.prepared.loaded, judge.prepared.units
    assert units is not None, "of narrowing dimensions"
    tests = {
        "modegpt": judge.test_with(modegpt_units(loaded, judge.prepared.texts.calibration, units)),
        "slicing": judge.test_with(sliced_units(loaded)),
        "ours": judge.test_with(units),
    }
    shares = {"its allocation": MoDeGpt(judge.evidence())}
    shares["alike"] = MoDeGpt(judge.evidence(), math.inf)
    for modules, test in tests.items():
        for name, allocator in shares.items():
            rows.add(f"{modules}, {name}", seed, test, lambda a=allocator: a.allocate(SPARSITIES))
        for name, ending in (("queries, keys", ".pairs"), ("values", ".ranks"), ("MLP", ".mlp")):
            rows.add(f"{modules}, {name} alone", seed, test, lambda e=ending: alone(judge.space, e))


def alone(space: StrategySpace, ending: str) -> list[Strategy]:
    """Return the strategies in which one module of every block loses the targets' share of it."""
    ours = torch.tensor([axis.name.endswith(ending) for axis in space.axes])
    high = torch.tensor([axis.high for axis in space.axes], dtype=torch.float64)
    return space.decode(torch.tensor(SPARSITIES, dtype=torch.float64)[:, None] / high * ours)


def mixed_methods(rows: Rows, seed: int, scratch: Path) -> None:
    """Measure all dimensions together, each alone, and a fixed split of them."""
    for dimensions in (("depth",), ("width",), ("sparsity",), MIXED):
        run = learned(dimensions, "layer", seed, scratch / "-".join(dimensions))
        judge = Judge(dimensions, "layer", seed)
        name = "+".join(dimensions)
        rows.add(
            f"stratnet, {name}", seed, judge.test,
            lambda run=run: stratnet(run, rows.sparsities),
        )  # fmt: skip
        if dimensions == MIXED and seed == 0:
            rows.add("fixed split, tuned", seed, judge.test, lambda j=judge: fixed_splits(j))


def fixed_splits(judge: Judge) -> list[Strategy]:
    """Return the best fixed split for every budget, by the search text."""
    space = judge.space
    parts = [name for name in space.names if name.startswith("depth/")]
    alone = {part: judge.search.evaluate(_settings(space, {part: 1.0})).kl for part in parts}
    cheapest = sorted(parts, key=lambda part: alone[part])
    found = []
    for budget in BUDGETS:
        split = [
            _split(space, dict.fromkeys(cheapest[:gone], 1.0), width, budget)
            for gone in GONE
            for width in WIDTHS
        ]
        found.append(min(split, key=lambda strategy: judge.search.evaluate(strategy).kl))
    return found


def _split(space: StrategySpace, gone: dict[str, float], width: float, sparsity: float) -> Strategy:
    """Return parts gone, all others narrowed alike, and as many zeros as the budget then asks."""
    kept = space.kept_for_sparsity(sparsity)
    there = [name for name in space.names if f"depth/{name.partition('/')[2]}" not in gone]
    narrowed = gone | {name: width for name in there if name.startswith("width/")}
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        zeros = {name: middle for name in space.names if name.startswith("sparsity/")}
        if space.cost.size_of(_settings(space, narrowed | zeros).values) > kept:
            low = middle
        else:
            high = middle
    zeros = {name: high for name in space.names if name.startswith("sparsity/")}
    return _settings(space, narrowed | zeros)


def _settings(space: StrategySpace, chosen: dict[str, float]) -> Strategy:
    raw = Strategy(settings=tuple((name, chosen.get(name, 0.0)) for name in space.names))
    return space.decode(space.encode([raw]))[0]  # on the steps that there are


QUALITY = {"depth": depth_methods, "width": width_methods, "modegpt": modegpt_methods}


def measure_quality(
    name: str,
    seeds: int,
    methods: Sequence[Callable[..., None]],
    sparsities: Sequence[float] = SPARSITIES,
    *,
    only: str = "",
) -> None:
    """Measure every method at every target, or those alone whose names begin with ``only``."""
    rows = Rows(name, sparsities, only)
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as scratch:
            for measure in methods:
                measure(rows, seed, Path(scratch))
        rows.save()
    rows.show()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"speed, quality, latency (all if none), {', '.join(QUALITY)}, mixed",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="methods of qualities whose names begin so")
    parser.add_argument("--strategies", type=int, default=20, help="of the part latency")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = options.parts or ["speed", "quality", "latency"]
    if "speed" in parts:
        measure_speed()
    chosen = [part for name, part in QUALITY.items() if name in parts or "quality" in parts]
    if chosen:
        measure_quality("quality", options.seeds, chosen, only=options.only)
    if "mixed" in parts:
        measure_quality("mixed", options.seeds, (mixed_methods,), BUDGETS, only=options.only)
    for name in SHAPES if "latency" in parts else ():
        config = AutoConfig.for_model("llama", **dense_fields(SHAPES[name]))
        measure_latency(name, config, options.strategies, LatencyOptions(threads=1))


if __name__ == "__main__":
    main()
