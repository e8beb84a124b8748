"""Times two folders side by side in one vLLM process; `benchmarks.shrink` asks it by JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams

from unicuco.engines.vllm_plugin import register


def seconds(llm: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Return how long it takes to continue all prompts by so many tokens."""
    parameters = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return time.perf_counter() - started


def main() -> None:
    """Answer the question on standard input with seconds per prefill and per decoding step."""
    register()
    question = json.load(sys.stdin)
    engines = [
        LLM(
            model=folder, skip_tokenizer_init=True, max_model_len=1024, enforce_eager=True,
            dtype="float32", seed=0, disable_log_stats=True, enable_prefix_caching=False,
            max_num_batched_tokens=4096,
        )
        for folder in question["folders"]
    ]  # fmt: skip
    count, length = question["prefill"]
    batch, steps = question["decode"]
    vocabulary = question["vocabulary"]
    long = [[(7 * k + 13 * t) % vocabulary for t in range(length)] for k in range(count)]
    short = [[(5 * k + 3 * t + 1) % vocabulary for t in range(8)] for k in range(batch)]
    times: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in engines]
    for round_ in range(question["rounds"] + 1):
        for engine, own in zip(engines, times, strict=True):
            prefill = seconds(engine, long, 1)
            first, all_ = seconds(engine, short, 1), seconds(engine, short, 1 + steps)
            if round_:  # the first warms up
                own["prefill"].append(prefill)
                own["decode"].append((all_ - first) / steps)
    medians = [{kind: statistics.median(v) for kind, v in own.items()} for own in times]
    print(f"\n{json.dumps(medians)}")


if __name__ == "__main__":
    main()
