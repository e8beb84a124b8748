"""Is cutting as fast as memory, and are plans as fast for a deep model as for a shallow one?

- ``memory``: cutting every matrix of a bf16 model of at least 1 GB (random matrices of a 7B's
  shapes) into a buffer, against the time in which this thread copies as many bytes as cutting reads
  (weights and ranks) and writes; also of one that is stored by columns, as GPT-2's are;
- ``disk``: writing a variant of such a model against a copy of its file that is hashed, synced and
  renamed as variants are; and by how much the process' memory rises above what it had before, base
  and ranks included;
- ``ranks``: bytes per weight of the rank store, and building it against one Wanda calibration;
- ``plans``: 64 requests of all kinds, 16 of them ``max_kl``, with intervals, at 56 and 224 axes.

Interleaved repeats, medians, one thread. ``python -m benchmarks.cutting [PART …]``; results go to
``benchmarks/results/cutting.json``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import careful_copy, save, status_bytes, table, unpredicted_plan
from benchmarks.speed import median_s, mixed_requests
from unicuco.calibration import TokenSet, collect_input_norms
from unicuco.dimensions import build_space
from unicuco.errors import UnicucoError
from unicuco.export import write_variant
from unicuco.importance import METRICS
from unicuco.models import load_model, quiet_transformers
from unicuco.pipeline import LearnOptions, LocalBackend, learn
from unicuco.ranks import RankStore, build_ranks, cut
from unicuco.testing.tiny import tiny_tokenizer
from unicuco.types import Request, Target

_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # of a 7B Llama
_CONTEXT = 64


def measure_memory(gigabytes: float, repeats: int) -> dict[str, float]:
    """Cut a model's matrices in memory, and copy as many bytes."""
    pairs = []
    num_bytes = 0
    while num_bytes < gigabytes * 1e9:
        rows, columns = _SHAPES[len(pairs) % len(_SHAPES)]
        weight = torch.randn(rows, columns).to(torch.bfloat16)
        pairs.append((weight, any_ranks(rows, columns)))
        num_bytes += weight.nbytes
    outs = [torch.zeros_like(weight) for weight, _ in pairs]
    spare = [torch.zeros_like(rank) for _, rank in pairs]

    def cut_all() -> None:
        for (weight, rank), out in zip(pairs, outs, strict=True):
            cut(weight, rank, weight.numel() * 6 // 10, out=out)

    def copy_all() -> None:  # reads and writes as many bytes of weights, and of ranks once more
        for (weight, rank), out, other in zip(pairs, outs, spare, strict=True):
            out.copy_(weight)
            other.copy_(rank)

    turned = [(weight.view(weight.shape[::-1]).T, rank) for weight, rank in pairs]

    def cut_all_by_columns() -> None:
        for (weight, rank), out in zip(turned, outs, strict=True):
            cut(weight, rank, weight.numel() * 6 // 10, out=out.view(out.shape[::-1]).T)

    cuts, turned_cuts, copies = _interleaved([cut_all, cut_all_by_columns, copy_all], repeats)
    copied = 2 * (num_bytes + sum(rank.nbytes for _, rank in pairs))
    touched = 2 * num_bytes + sum(rank.nbytes for _, rank in pairs)
    bandwidth = copied / copies
    return {
        "model_gb": num_bytes / 1e9,
        "cut_s": cuts,
        "copy_gb_per_s": bandwidth / 1e9,
        "cut_over_memory": cuts / (touched / bandwidth),
        "cut_by_columns_over_memory": turned_cuts / (touched / bandwidth),
    }


def any_ranks(rows: int, columns: int) -> Tensor:
    """Return some drop order, ``o x i`` int16: one random order, shifted from row to row.

    Sorting a gigabyte of scores takes minutes, and cutting does not care which weights go.
    """
    order = torch.randperm(columns, dtype=torch.int32)
    return ((order + torch.arange(rows, dtype=torch.int32)[:, None]) % columns).to(torch.int16)


def measure_disk(hidden: int, blocks: int, repeats: int) -> dict[str, float]:
    """Write a variant, and copy the model's file as carefully."""
    with tempfile.TemporaryDirectory(prefix="uc-cutting-") as name:
        folder = Path(name)
        model = _write_llama(folder / "model", hidden=hidden, blocks=blocks)
        loaded = load_model(model, dtype=torch.bfloat16)
        ranks = {
            site.path: any_ranks(site.num_rows, site.num_columns) for site in loaded.profile.sites
        }
        space = build_space(loaded.profile)
        plan = unpredicted_plan(space, space.uniform(0.6), 0.6)
        source = model / "model.safetensors"

        def write() -> None:
            write_variant(
                folder / "variant",
                base=model,
                profile=loaded.profile,
                ranks=RankStore(metric="wanda", ranks=ranks),
                space=space,
                plan=plan,
                provenance={"run": "", "seed": 0},
                overwrite=True,
            )

        rise = _rise(write)
        copy = partial(careful_copy, source, folder / "copied")
        writes, copies = _interleaved([write, copy], repeats)
        return {
            "file_mb": source.stat().st_size / 1e6,
            "write_rise_mb": rise / 1e6,
            "write_s": writes,
            "copy_s": copies,
            "write_over_copy": writes / copies,
        }


def measure_ranks(model: str, repeats: int) -> dict[str, float]:
    """Build the rank store, and calibrate once."""
    loaded = load_model(model)
    ids = torch.randint(loaded.profile.vocabulary_size, (12, 256))
    windows = TokenSet.from_ids(ids)
    norms = collect_input_norms(loaded.model, loaded.profile, windows)
    store = build_ranks(loaded.model, loaded.profile, METRICS["wanda"], norms)
    builds, calibrations = _interleaved(
        [
            lambda: build_ranks(loaded.model, loaded.profile, METRICS["wanda"], norms),
            lambda: collect_input_norms(loaded.model, loaded.profile, windows),
        ],
        repeats,
    )
    weights = sum(site.num_weights for site in loaded.profile.sites)
    return {
        "bytes_per_weight": sum(rank.nbytes for rank in store.ranks.values()) / weights,
        "build_s": builds,
        "calibration_s": calibrations,
        "build_over_calibration": builds / calibrations,
    }


def measure_plans(blocks: int) -> dict[str, float]:
    """Answer 64 requests from a run of a model with so many blocks, in a warm process."""
    with tempfile.TemporaryDirectory(prefix="uc-plans-") as name:
        folder = Path(name)
        model = _write_llama(folder / "model", hidden=64, blocks=blocks)
        options = LearnOptions(
            model=str(model), out=folder / "run", evaluations=8, tokens=4 * _CONTEXT
        )
        run = learn(options, backend=LocalBackend(), progress=lambda step: None)
        requests = [
            request
            if request.target is not Target.MAX_PARAMS
            else Request(target=Target.SPARSITY, value=0.3 + 0.005 * k)
            for k, request in enumerate(mixed_requests())
        ]
        failed = [answer for answer in run.plan(requests) if isinstance(answer, UnicucoError)]
        assert not failed, f"all 64 can be met: {failed}"
        axes = run.planner.space.num_axes
        return {f"plans_64_ms_at_{axes}": 1000 * median_s(lambda: run.plan(requests))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "memory": lambda: measure_memory(1.0, 7),
        "disk": lambda: measure_disk(1024, 16, 5),
        "ranks": lambda: measure_ranks("reference", 7),
        "plans": lambda: measure_plans(8) | measure_plans(32),
    }
    parser = argparse.ArgumentParser(description="Measure cutting, ranks and plans.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    values = parser.parse_args(arguments)
    unknown = [name for name in values.parts if name not in parts]
    if unknown:
        raise SystemExit(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    for name in values.parts or parts:
        figures |= parts[name]()
    print(table(["what", "figure"], list(figures.items())))
    print("saved to", save("cutting", {"figures": figures}))


def _interleaved(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in works]
    for number in range(repeats + 1):
        for own, work in zip(times, works, strict=True):
            started = time.perf_counter()
            work()
            if number:  # the first round warms up
                own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in times]


def _rise(work: Callable[[], object]) -> int:
    """Return by how many bytes resident memory rises at most while something is done."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def _write_llama(folder: Path, *, hidden: int, blocks: int) -> Path:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_CONTEXT,
        initializer_range=hidden**-0.5,
    )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(_CONTEXT).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
