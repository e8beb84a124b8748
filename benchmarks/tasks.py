"""Task accuracy of the compared strategies: multiple choice by log likelihood, through lm-eval.

Tasks are defined from local files; nothing is fetched.

- ``continuation``: what comes next in the model's own test text, out of four pieces of it;
- ``hellaswag``: the items in ``../shared/data``, where present. A model of source code is at chance
  there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import table
from benchmarks.jobs import ROWS_SUFFIX, Arena, Job, arena, strategy_file
from benchmarks.ledger import WORK, Setting, result_file, write
from benchmarks.second_model import DATA, resolve
from unicuco.pipeline.texts import test_windows
from unicuco.rows import RowRule
from unicuco.types import Strategy

_HELLASWAG = DATA / "hellaswag" / "validation_first2000.jsonl"
_CONTEXT_TOKENS = 48
_ENDING_TOKENS = 16
_CHOICES = 4

Items = list[dict[str, Any]]  # Any: texts, and the index of the right one


def continuation_items(bench: Arena, setting: Setting, count: int) -> Items:
    """Make items from the test text and keep them in a local file."""
    path = WORK / setting.tag / f"continuation-{count}.jsonl"
    if not path.exists():
        width = _CONTEXT_TOKENS + _ENDING_TOKENS
        text = test_windows(
            bench.tokenizer, resolve(setting.model).test, tokens=count * width, context=width
        ).ids
        generator = torch.Generator().manual_seed(0)
        starts, endings = (
            [bench.tokenizer.decode(row) for row in part.tolist()]
            for part in text.split([_CONTEXT_TOKENS, _ENDING_TOKENS], dim=1)
        )
        items: Items = []
        for index, start in enumerate(starts):
            others = torch.randperm(count - 1, generator=generator)[: _CHOICES - 1]
            label = int(torch.randint(_CHOICES, (1,), generator=generator))
            choices = [endings[(index + 1 + int(k)) % count] for k in others]
            choices.insert(label, endings[index])
            items.append({"ctx": start, "endings": choices, "label": label})
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return _read(path, count)


def hellaswag_items(bench: Arena, setting: Setting, count: int) -> Items:
    """Read the first HellaSwag items; none where the file is not present."""
    return _read(_HELLASWAG, count) if _HELLASWAG.exists() else []


TASKS: dict[str, tuple[Callable[[Arena, Setting, int], Items], str]] = {
    "continuation": (continuation_items, ""),
    "hellaswag": (hellaswag_items, " "),
}


def check_names(names: Sequence[str]) -> None:
    """End with one line if a task is unknown."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise SystemExit(f"no task {', '.join(unknown)}; there are {', '.join(TASKS)}")


def accuracy(
    bench: Arena, strategy: Strategy, rows: RowRule | None, name: str, items: Items
) -> float:
    """Return the share of items whose right ending is the most likely one."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from lm_eval.api.task import ConfigurableTask  # type: ignore[import-untyped]
    from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]

    from benchmarks.harness import LocalModel

    entry = f"local_{name}"
    task = {
        "task": entry,
        "custom_dataset": partial(_dataset, items),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": TASKS[name][1],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    with bench.judge.pruned(strategy, rows) as model:
        harness = LocalModel(model, bench.tokenizer, bench.prepared.context)
        found = evaluate(
            lm=harness, task_dict={entry: ConfigurableTask(config=task)}, bootstrap_iters=0
        )
    return float(found["results"][entry]["acc,none"])


def measure(setting: Setting, methods: Sequence[str], options: argparse.Namespace) -> None:
    """Measure every strategy that the parts kept, and the dense model; resumes."""
    known = known_accuracies(setting, options.items)
    folders = sorted((WORK / setting.tag).glob("seed*"))
    for folder in folders:
        seed = int(folder.name.removeprefix("seed"))
        if options.seeds is not None and seed >= options.seeds:
            continue
        bench = arena(setting, seed)
        for name in options.tasks:
            items = TASKS[name][0](bench, setting, options.items)
            for label, strategy, rows in _strategies(bench, folder, methods):
                entry = _entry(name, label, seed)
                if items and entry not in known:
                    known[entry] = accuracy(bench, strategy, rows, name, items)
                    write(
                        result_file(setting, "tasks"), {"items": options.items, "accuracy": known}
                    )
        print(f"tasks: seed {seed}", flush=True)
    print(accuracy_table(known))


def lack(job: Job, options: argparse.Namespace) -> bool:
    """Whether a task was not yet measured on a job's strategies and one of them is not here."""
    known = known_accuracies(job.setting, options.items)
    return any(
        _entry(name, strategy_file(job.setting, job.seed, job.method, sparsity).stem, job.seed)
        not in known
        for sparsity in job.sparsities
        if not strategy_file(job.setting, job.seed, job.method, sparsity).exists()
        for name in options.tasks
    )


def known_accuracies(setting: Setting, items: int | None = None) -> dict[str, float]:
    """Return what was measured, on so many items of every task if that is said."""
    path = result_file(setting, "tasks")
    document = json.loads(path.read_text()) if path.exists() else {"items": items, "accuracy": {}}
    return dict(document["accuracy"]) if items in (None, document["items"]) else {}


def accuracy_table(known: dict[str, float]) -> str:
    """Return medians over seeds, one row per method and sparsity."""
    rows: dict[str, dict[str, list[float]]] = {}
    for entry, value in known.items():
        name, label, _ = entry.split("/")
        rows.setdefault(label, {}).setdefault(name, []).append(value)
    names = sorted({name for row in rows.values() for name in row})
    return table(
        ["method at sparsity", *(f"{name} accuracy" for name in names)],
        [
            [label, *(statistics.median(row[name]) if name in row else "–" for name in names)]
            for label, row in rows.items()
        ],
    )


def _strategies(
    bench: Arena, folder: Path, methods: Sequence[str]
) -> list[tuple[str, Strategy, RowRule | None]]:
    found: list[tuple[str, Strategy, RowRule | None]] = [
        ("dense", bench.prepared.space.uniform(0.0), None)
    ]
    for path in sorted((folder / "strategies").glob("*.json")):
        if path.stem.rpartition("-")[0] in methods:
            settings = tuple((name, value) for name, value in json.loads(path.read_text()))
            rule = path.with_suffix(ROWS_SUFFIX)
            rows = RowRule.load(rule) if rule.exists() else None
            found.append((path.stem, Strategy(settings=settings), rows))
    return found


def _entry(name: str, label: str, seed: int) -> str:
    return f"{name}/{label}/seed{seed}"


def _read(path: Path, count: int) -> Items:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


# Any: what lm-eval passes, and a dataset of Hugging Face's
def _dataset(items: Items, **_: Any) -> dict[str, Any]:
    from datasets import Dataset  # type: ignore[import-untyped]

    return {"test": Dataset.from_list(items)}
