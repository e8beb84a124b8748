"""Bits and zeros decided together, and packed variants, each against rivals at equal bytes.

- ``joint``: one StratNet of sparsity and weight bits against StratNets of either alone, at 0.5,
  0.35 and 0.25 of the bf16 bytes. Bytes are those of a lossless form in which zeros take a bit
  (`unicuco.dimensions.byte_cost`): all methods are counted so. A method that can't get there has no
  figure.
- ``packed``: what `pack --int8` makes at five sizes, against 8 bits per row with uniform pruning
  and zstd, and against 4 bits in groups of 128. Embeddings are quantised and counted everywhere;
  files are measured, tables and scales included.

``python -m benchmarks.bits_joint [joint] [packed] [--seeds 1] [--processes 2] …``; results go to
``benchmarks/results/bits_joint.json`` after every seed. KL is on test text, nats per token.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import torch
import zstandard
from torch import Tensor

from benchmarks.bits import pack_matrices
from benchmarks.common import RESULTS, save, table
from unicuco.bits import round_matrix
from unicuco.dimensions import ByteCost
from unicuco.evaluate import LocalEvaluator
from unicuco.headers import read_header
from unicuco.models import load_tokenizer, resolve_model, weight_files
from unicuco.packing import Int8Matrix, quantise_per_channel
from unicuco.packing.model import StoredMatrix
from unicuco.pipeline import LearnOptions, LocalBackend, Run, learn
from unicuco.pipeline.preparation import prepare
from unicuco.pipeline.quantising import Judge, Quantiser
from unicuco.pipeline.texts import test_windows, window_length
from unicuco.space import StrategySpace
from unicuco.types import Plan, Request, Strategy

_BUDGETS: Final = (0.5, 0.35, 0.25)  # of bf16
_SIZES: Final = (0.30, 0.26, 0.22, 0.19, 0.16)  # of bf16
_JOINT: Final = ("sparsity", "weight_bits")
_ZEROS_UP_TO: Final = 0.96
_BISECTIONS: Final = 9
_LEVEL: Final = 19  # of zstd: the best that is usual


# --- joint ---------------------------------------------------------------------------------------


def measure_joint(options: argparse.Namespace) -> Iterator[list[dict[str, object]]]:
    """Yield every seed's rows as soon as they are there, ``options.processes`` seeds at a time."""
    context = get_context("spawn")
    with ProcessPoolExecutor(
        options.processes, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        seeds = [pool.submit(_joint_rows, seed, options) for seed in range(options.seeds)]
        for done in as_completed(seeds):
            yield done.result()


def _joint_rows(seed: int, wanted: argparse.Namespace) -> list[dict[str, object]]:
    """Learn the three runs of a seed and judge their answers on test text."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        options = LearnOptions(
            model="reference", out=place / "judge", dimensions=_JOINT, rounding=wanted.rounding
        )
        options.out.mkdir()
        prepared = prepare(options, options.out, lambda _: None)
        tokenizer = load_tokenizer(prepared.loaded.folder)
        text = test_windows(tokenizer, None, tokens=wanted.test_tokens, context=prepared.context)
        judge = LocalEvaluator(*prepared.judging(text))
        for dimensions in (_JOINT, ("weight_bits",), ("sparsity",)):
            started = time.process_time()
            run = learn(
                _options(place, dimensions, seed, wanted.evaluations, wanted.rounding),
                backend=LocalBackend(),
                progress=lambda _: None,
            )
            seconds = time.process_time() - started
            for share in _BUDGETS:
                strategy = _answer(run, prepared.space, share)
                row = {"method": "+".join(dimensions), "seed": seed, "budget": share}
                row |= {"kl": None, "bytes": None, "cpu_seconds": seconds}
                if strategy is not None:
                    row |= {"kl": judge.evaluate(strategy).kl}
                    row |= {"bytes": _cost(prepared.space).packed_bytes(strategy.values)}
                rows.append(row)
                print(row, flush=True)
    return rows


def _options(
    place: Path, dimensions: tuple[str, ...], seed: int, evaluations: int | None, rounding: str
) -> LearnOptions:
    """Return the options of one run; zeros alone must go far to be as small as bits are."""
    alone = dimensions == ("sparsity",)
    return LearnOptions(
        model="reference",
        out=place / "-".join(dimensions),
        seed=seed,
        dimensions=dimensions,
        evaluations=None if alone else evaluations,  # its evaluations bring derivatives
        max_sparsity=_ZEROS_UP_TO if alone else 0.9,
        rounding="nearest" if alone else rounding,
    )


def _cost(space: StrategySpace) -> ByteCost:
    assert isinstance(space.cost, ByteCost)
    return space.cost


def _answer(run: Run, space: StrategySpace, share: float) -> Strategy | None:
    """Return a run's answer within a share of the bf16 bytes, as a strategy of the joint space."""
    budget = int(share * run.profile.total_bytes)
    if "weight_bits" in run.manifest["options"]["dimensions"]:
        (plan,) = run.plan([Request.from_dict({"max_packed_bytes": budget})])
        return _lifted(plan.strategy, space) if isinstance(plan, Plan) else None
    # Zeros alone: the sparsity whose packed bytes are the budget's.
    low, high = run.sparsity_range
    for _ in range(2 * _BISECTIONS):
        middle = (low + high) / 2
        (strategy,) = run.planner.along([middle])
        above = _cost(space).packed_bytes(_lifted(strategy, space).values) > budget
        low, high = (middle, high) if above else (low, middle)
    (strategy,) = run.planner.along([high])
    lifted = _lifted(strategy, space)
    return lifted if _cost(space).packed_bytes(lifted.values) <= budget else None


def _lifted(strategy: Strategy, space: StrategySpace) -> Strategy:
    own = dict(strategy.settings)
    return Strategy(settings=tuple((name, own.get(name, 0.0)) for name in space.names))


def show_joint(rows: list[dict[str, object]]) -> None:
    """Print the median KL of every method at every budget."""
    lines = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        line: list[object] = [method]
        for share in _BUDGETS:
            own = [r["kl"] for r in rows if r["method"] == method and r["budget"] == share]
            found = [kl for kl in own if isinstance(kl, float)]
            line.append(statistics.median(found) if found else "-")
        lines.append(line)
    print(table(["test KL at a share of bf16", *map(str, _BUDGETS)], lines))


# --- packed --------------------------------------------------------------------------------------


def measure_packed(tokens: int, seed: int) -> list[dict[str, object]]:
    """Measure packed variants and rivals at every size."""
    folder = resolve_model("reference")
    quantiser = Quantiser(folder, calibration=None, tokens=8192, seed=seed)
    context = window_length(quantiser.loaded.profile.max_context, None)
    text = test_windows(load_tokenizer(folder), None, tokens=tokens, context=context)
    judge = Judge(quantiser.loaded.model, text.ids)
    dense = quantiser.loaded.profile.total_bytes
    rest = _rest_bytes(folder, quantiser)
    rows: list[dict[str, object]] = []

    def add(method: str, share: float, num_bytes: int) -> None:
        row = {"method": method, "size": share, "bytes": num_bytes, "kl": judge.kl(), "seed": seed}
        rows.append(row)
        print(row, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "packed"

        def packed(log_step: float) -> int:
            return pack_matrices(folder, file, quantiser.at(2**log_step))

        def pruned(sparsity: float) -> int:
            return rest + _pruned_bytes(quantiser, sparsity)

        start = float(torch.tensor(quantiser.step_for(0.01)).log2())
        for share in _SIZES:
            budget = int(share * dense)
            add("packed", share, _smallest_setting(packed, budget, start - 3, start + 5))
            add("INT8, uniform, zstd", share, _smallest_setting(pruned, budget, 0.0, 0.98))
    size = rest + _four_bits(quantiser)
    add("INT4 group 128", size / dense, size)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "packed"
        found = _smallest_setting(packed, size, start - 3, start + 5)
        add("packed", size / dense, found)
    return rows


def _smallest_setting(size_of: Callable[[float], int], budget: int, low: float, high: float) -> int:
    """Find the least setting whose size is within the budget, leave it set; return its size."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if size_of(middle) <= budget else (middle, high)
    return size_of(high)


def _rest_bytes(folder: Path, quantiser: Quantiser) -> int:
    """Return the bytes of tensors that are not quantised."""
    entries = [entry for path in weight_files(folder) for entry in read_header(path).entries]
    return sum(e.end - e.begin for e in entries if e.name not in quantiser.model.matrices)


def _pruned_bytes(quantiser: Quantiser, sparsity: float) -> int:
    """Set the model to 8 bits per row with uniform zeros; return the bytes after zstd."""

    def change(matrix: StoredMatrix, weight: Tensor) -> Int8Matrix:
        drop = quantiser.drop(matrix, weight, sparsity)
        return quantise_per_channel(weight.masked_fill(drop, 0.0))

    coder = zstandard.ZstdCompressor(level=_LEVEL)
    matrices = quantiser.model.apply(change).values()
    return sum(len(coder.compress(m.codes.tobytes())) + 2 * len(m.rows) for m in matrices)


def _four_bits(quantiser: Quantiser) -> int:
    """Set the model to 4 bits in groups of 128; return the bytes, scales counted."""
    total = 0

    def change(matrix: StoredMatrix, weight: Tensor) -> Tensor:
        nonlocal total
        rounded = round_matrix(weight, 4, torch.bfloat16)
        total += rounded.codes.numel() // 2 + 2 * rounded.scales.numel()
        return rounded.dequantise()

    quantiser.model.set(change)
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that are named, or both, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="joint, packed; both if none")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="seeds of joint, side by side")
    parser.add_argument("--evaluations", type=int, default=None)
    parser.add_argument("--rounding", default="nearest", help="nearest, gptq")
    parser.add_argument("--test-tokens", type=int, default=8192)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = options.parts or ["joint", "packed"]
    path = RESULTS / "bits_joint.json"
    document: dict[str, object] = json.loads(path.read_text()) if path.is_file() else {}
    if "joint" in parts:
        rows: list[dict[str, object]] = []
        for found in measure_joint(options):
            rows = sorted([*rows, *found], key=operator.itemgetter("seed"))
            document["joint"] = rows
            save("bits_joint", document)
        show_joint(rows)
    if "packed" in parts:
        measured = [measure_packed(options.test_tokens, seed) for seed in range(options.seeds)]
        document["packed"] = [row for found in measured for row in found]
        columns = ("method", "size", "bytes", "kl")
        print(table(list(columns), [[row[c] for c in columns] for row in document["packed"]]))
    print("saved to", save("bits_joint", document))


if __name__ == "__main__":
    main()
