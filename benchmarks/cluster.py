"""What the cluster costs and gains: Ray's overhead, replicas, pipelines, memory of shards.

``python -m benchmarks.cluster [replicas|handing_over|pipelines|memory]…``; each part's results go
to ``benchmarks/results/cluster_PART.json``. Ratios within one run, medians; memory as the operating
system gives it. The model of random weights for ``memory`` is written to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.common import Bench, save, status_bytes, table
from benchmarks.speed import measure_handing_over, measure_replicas, pool_s
from cluster.driver import RayBackend
from cluster.pool import RayPool
from unicuco.dimensions import Granularity, build_space
from unicuco.evaluate import EvaluatorConfig
from unicuco.models import quiet_transformers
from unicuco.models.weights import folder_source
from unicuco.shards.evaluator import Relay, ShardedEvaluator, StageConfig, StageEvaluator
from unicuco.shards.plan import estimated_costs, hidden_size, plan_shards
from unicuco.shards.profile import load_ghost
from unicuco.shards.timing import measured_costs
from unicuco.types import Ask, ModelProfile, Strategy

_STRATEGIES = 10  # of one measurement of a pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description="Measure the cluster.")
    parser.add_argument("parts", nargs="*", help=f"Out of {', '.join(_PARTS)}; all if left out.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=1536, help="Of the random model.")
    parser.add_argument("--blocks", type=int, default=14, help="Of the random model.")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    values = parser.parse_args(arguments)
    if values.stage is not None:
        print(json.dumps(_stage_memory(json.loads(values.stage))))
        return
    for part in values.parts or _PARTS:
        figures = _PARTS[part](values)
        print(table(["what", "figure"], list(figures.items())))
        print("saved to", save(f"cluster_{part}", {"model": values.model, "figures": figures}))


def _replicas(values: argparse.Namespace) -> dict[str, object]:
    return dict(measure_replicas(Bench(values.model, test_tokens=512), values.pairs))


def _handing_over(values: argparse.Namespace) -> dict[str, object]:
    return dict(measure_handing_over(Bench(values.model, test_tokens=512), values.pairs))


def _pipelines(values: argparse.Namespace) -> dict[str, object]:
    """Time a pipeline of two shards against the same two stages one after the other, in turn."""
    bench = Bench(values.model, test_tokens=512)
    torch.set_num_threads(1)
    config, arrays = bench.prepared.evaluator, bench.search_arrays
    plan = plan_shards(measured_costs(config, bench.prepared.context), 2)
    stages = ShardedEvaluator(config, plan, arrays)
    figures: dict[str, object] = {"stages": str([len(blocks) for blocks in plan.stages])}
    backends = RayBackend(shards=2), RayBackend(), RayBackend(replicas=2)
    with backends[0], backends[1], backends[2]:
        pools = []
        for backend in backends:
            pools.append(backend.start_pool(config, arrays))
            # The next one asks what is free: this one must have taken what it takes.
            pool_s(pools[-1], [_ask(bench.space.uniform(0.5), derivatives=False)])
        for derivatives in (False, True):
            asks = [
                _ask(bench.space.uniform(0.3 + 0.4 * k / _STRATEGIES), derivatives=derivatives)
                for k in range(_STRATEGIES)
            ]
            rows = [_one_row(stages, pools, asks) for _ in range(1 + max(1, values.pairs // 3))][1:]
            name = "with derivatives" if derivatives else "values alone"
            for key in rows[0]:
                figures[f"{name}: {key}"] = statistics.median(row[key] for row in rows)
    return figures


def _ask(strategy: Strategy, *, derivatives: bool) -> Ask:
    return Ask(round=0, position=0, strategy=strategy, derivatives=derivatives)


def _one_row(
    stages: ShardedEvaluator, pools: Sequence[RayPool], asks: Sequence[Ask]
) -> dict[str, float]:
    per_stage = _stage_seconds(stages, asks[: max(2, len(asks) // 4)])
    pipeline, single, double = (pool_s(pool, asks) / len(asks) for pool in pools)
    ideal = sum(per_stage) / max(per_stage)
    return {
        "total over slowest stage": ideal,
        "two shards over one shard, the stages in turn": sum(per_stage) / pipeline,
        "share of the ideal reached": sum(per_stage) / pipeline / ideal,
        "two shards over one replica": single / pipeline,
        # Both keep two cores busy, whatever else runs; replicas need not wait for one another.
        "two shards over two replicas": double / pipeline,
    }


def _stage_seconds(stages: ShardedEvaluator, asks: Sequence[Ask]) -> list[float]:
    """Return the seconds that each stage spends on one strategy."""
    spent = [0.0] * len(stages.stages)

    def timed(number: int, step: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        result = step(*args)
        spent[number] += time.perf_counter() - started
        return result

    for ask in asks:
        message = None
        for number, stage in enumerate(stages.stages):
            message = timed(number, stage.forward, ask, message)
        for number, stage in reversed(list(enumerate(stages.stages[:-1]))):
            if ask.derivatives:
                message = timed(number, stage.backward, ask, message)
    return [seconds / len(asks) for seconds in spent]


def _memory(values: argparse.Namespace) -> dict[str, object]:
    """Run every stage of one to four shards in a process of its own and read what it holds."""
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_random_model(folder, values.hidden, values.blocks)
        profile = load_ghost(folder).profile
        figures["weights of the random model, M"] = profile.total_params / 1e6
        for shards in range(1, 5):
            plan = plan_shards(estimated_costs(profile), shards)
            for number, blocks in enumerate(plan.stages):
                found = _in_own_process([str(folder), blocks.start, blocks.stop])
                label = f"shard {number + 1} of {shards} (process {found.pop('pid')}), "
                figures |= {label + key: value for key, value in found.items()}
    return figures


def _in_own_process(stage: list[object]) -> dict[str, Any]:
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.cluster", "--stage", json.dumps(stage)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    ).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _stage_memory(stage: Sequence[Any]) -> dict[str, object]:
    """Build one stage, take a strategy through it and back, and say what this process holds."""
    folder, blocks = Path(stage[0]), range(stage[1], stage[2])
    ghost = load_ghost(folder)
    profile = ghost.profile
    torch.ones(64, 64) @ torch.ones(64, 64)  # what the library itself holds is not the shard's
    process = psutil.Process()
    before = process.memory_info().rss
    ids = torch.zeros(1, 256, dtype=torch.int64)
    arrays: dict[str, Any] = {"text/ids": ids.numpy()}
    for site in profile.sites:
        if site.block in blocks:
            rank = np.arange(site.num_columns, dtype=np.int16)
            arrays[f"rank/{site.path}"] = np.tile(rank, (site.num_rows, 1))
            arrays[f"fisher/{site.path}"] = np.zeros(site.num_columns)
    if blocks.stop == profile.num_blocks:
        k = min(1024, profile.vocabulary_size)
        arrays["text/probabilities"] = np.full((256, k), 0.5 / k, dtype=np.float32)
        arrays["text/indices"] = np.tile(np.arange(k, dtype=np.int32), (256, 1))
        arrays["text/negative_entropy"] = np.zeros(256, dtype=np.float32)
    evaluator = EvaluatorConfig(
        model_config=ghost.model.config.to_json_string(),
        profile=profile,
        dimensions=("sparsity",),
        granularity=Granularity.BLOCK,
        text_digest="",
        weights=folder_source(folder),
    )
    core = StageEvaluator(StageConfig(evaluator=evaluator, blocks=blocks), arrays)
    built = process.memory_info().rss - before
    space = build_space(profile, evaluator.dimensions, evaluator.granularity)
    held = core.stage.outer_bytes + sum(t.nbytes for t in core.stage.dense.values())
    held += sum(array.nbytes for name, array in arrays.items() if name.startswith("rank/"))
    _through(core, space.uniform(0.5), ids.shape[1])
    after = process.memory_info().rss - before
    peak = status_bytes("VmHWM")
    # A block as it is cut, its gradient, and what each block received.
    one = max(4 * count for count in _site_weights(profile))
    activations = 2 * one + 4 * (len(blocks) + 2) * ids.numel() * hidden_size(profile)
    return {
        "pid": process.pid,
        "weights and ranks, MB": held / 1e6,
        "resident when built, MB": built / 1e6,
        "resident when built over weights and ranks": built / held,
        "one block and activations, MB": activations / 1e6,
        "resident after an evaluation, MB": after / 1e6,
        "peak, MB": (peak - before) / 1e6,
        "peak less block and activations, over weights and ranks": (
            (peak - before - activations) / held
        ),
    }


def _site_weights(profile: ModelProfile) -> list[int]:
    """Return the weights in every block's sites."""
    return [
        sum(site.num_weights for site in profile.sites if site.block == block)
        for block in range(profile.num_blocks)
    ]


def _through(core: StageEvaluator, strategy: Strategy, width: int) -> None:
    """Take a strategy through a stage and back, with made-up states where others would come."""
    profile = core.config.profile
    ask = _ask(strategy, derivatives=True)
    states = np.full((1, width, hidden_size(profile)), 0.1, dtype=np.float32)
    core.forward(ask, None if core.stage.is_first else Relay(hidden=states))
    if not core.stage.is_last:
        slopes = dict.fromkeys((site.path for site in profile.sites), 0.0)
        core.backward(ask, Relay(hidden=states, kl_sums=(0.0,), slopes=(slopes,)))


def _write_random_model(folder: Path, hidden: int, blocks: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    with quiet_transformers():
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


_PARTS: dict[str, Callable[[argparse.Namespace], dict[str, object]]] = {
    "replicas": _replicas,
    "handing_over": _handing_over,
    "pipelines": _pipelines,
    "memory": _memory,
}


if __name__ == "__main__":
    main()
