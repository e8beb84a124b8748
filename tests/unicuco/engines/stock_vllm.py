"""Greedy tokens of several folders through stock vLLM, one after another: run as a program.

It imports nothing of this project: what vLLM knows of shrunk models, it knows by its entry points.
"""

from __future__ import annotations

import gc
import json
import sys

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

question = json.load(sys.stdin)
answers = []
for folder in question["folders"]:
    llm = LLM(
        model=folder, max_model_len=128, enforce_eager=True, dtype="float32", seed=0,
        disable_log_stats=True,
    )  # fmt: skip
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in question["prompts"]],
        SamplingParams(temperature=0.0, max_tokens=question["max_tokens"], ignore_eos=True),
        use_tqdm=False,
    )
    answers.append([list(output.outputs[0].token_ids) for output in outputs])
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
print(f"\n{json.dumps(answers)}")
