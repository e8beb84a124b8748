"""The process of `benchmarks.requests` for llmcompressor, in that package's own environment.

Nothing of this project can be imported there but the clock beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

_MODIFIERS = {
    "llmcompressor-wanda": WandaPruningModifier,
    "llmcompressor-wanda-128": WandaPruningModifier,
    "llmcompressor-sparsegpt": SparseGPTModifier,
}


def main() -> None:
    """Answer the task's targets and report."""
    torch.set_num_threads(1)
    task = json.loads(Path(sys.argv[1]).read_text())
    out = Path(task["out"])
    clock = Clock()
    for sparsity in task["targets"]:
        with clock.request():
            prune(task, sparsity, out / f"{sparsity:g}")
    clock.report(out / "report.json")


def prune(task: dict[str, Any], sparsity: float, target: Path) -> None:
    """Load, prune and save, as the package's own examples do."""
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype="auto")
    windows = task["windows"]
    data = Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    )
    recipe = _MODIFIERS[task["method"]](
        sparsity=sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(task["model"]),
        dataset=data,
        recipe=recipe,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        output_dir=str(target),
    )


if __name__ == "__main__":
    main()
