"""From learning to evaluation with every process in less memory than the model takes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.cluster.test_learn import evaluations, job
from unicuco.export import read_variant
from unicuco.models import quiet_transformers
from unicuco.pipeline import Run, evaluate_variant, predicting, prune
from unicuco.testing.processes import child_environment
from unicuco.testing.tiny import tiny_tokenizer
from unicuco.types import Request, Target

# What the commands import anyway: memory that no model can save.
JUDGING = "unicuco.pipeline,unicuco.models.load,transformers.models.llama.modeling_llama"
LEARNING = f"{JUDGING},unicuco.search,unicuco.store,cluster.driver,matplotlib.pyplot"

CONTEXT = 32
SHARE = 0.8  # of the model that a process may take beyond its modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Commands that ran under a limit; ``actors`` are those of Ray's that did, and their own."""

    codes: list[int]
    output: str
    errors: str
    limit: int
    actors: dict[str, set[int]]


def run_capped(
    folder: Path, allowance: int, modules: str, program: str, *commands: Sequence[object]
) -> Ended:
    """Run commands with so many bytes beyond their modules; watch what Ray starts meanwhile."""
    words = json.dumps([list(map(str, command)) for command in commands])
    report = folder / "report.json"
    process = subprocess.Popen(
        # Threads' stacks are reserved and hardly used, but count: 1 MiB for each of Ray's forty.
        ["sh", "-c", 'ulimit -s 1024 && exec "$@"', "sh", sys.executable, "-m",
         "tests.cluster.capped", str(allowance), modules, program, words, str(report)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )  # fmt: skip
    actors: dict[str, set[int]] = {}
    while True:
        try:
            output, errors = process.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            for name, limit in actor_limits(process.pid):
                actors.setdefault(name, set()).add(limit)
    assert process.returncode == 0, errors
    found = json.loads(report.read_text(encoding="utf-8"))
    return Ended(**found, output=output, errors=errors, actors=actors)


def actor_limits(pid: int) -> list[tuple[str, int]]:
    """Return the class of every actor that a process started, and its limit on private memory."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, IndexError):
                title = child.cmdline()[0]
                if title.startswith("ray::") and "Actor" in title:
                    limit = child.rlimit(resource.RLIMIT_DATA)[0]
                    found.append((title.removeprefix("ray::").split(".")[0], limit))
    return found


def write_model(folder: Path) -> int:
    """Write a random Llama whose blocks and embeddings are small beside it; return its bytes."""
    hidden = 640
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=hidden**-0.5,
    )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(CONTEXT).save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_learning_cutting_and_judging_need_less_memory_than_the_model(
    tmp_path: Path, tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, variant = tmp_path / "model", tmp_path / "variant"
    allowance = int(SHARE * write_model(model))
    options = {"tokens": 2 * CONTEXT, "context": CONTEXT, "evaluations": 4, "granularity": "block"}

    (tmp_path / "whole").mkdir()
    whole = job(tmp_path / "whole", model, tiny_text_file, **options, address="none")
    sharded = job(tmp_path, model, tiny_text_file, **options, shards=3, address="local")
    learned = run_capped(
        tmp_path, allowance, LEARNING, "cluster.learn", ("--config", whole), ("--config", sharded)
    )
    assert learned.codes == [1, 0], learned.errors
    assert "does not fit into memory" in learned.errors
    assert not (tmp_path / "whole" / "run").exists()
    assert learned.actors.keys() == {"ShardActor", "LearnerActor"}
    # Fewer modules, so a lower limit of their own, and not what they inherit from the driver.
    assert max(set().union(*learned.actors.values())) < learned.limit
    run = tmp_path / "run"
    assert [row[5] for row in evaluations(run)] == ["ok"] * 4

    cut = ("prune", run, "--sparsity", "0.5", "--out", variant, "--json")
    words = ("--reference", model, "--text", tiny_text_file, "--tokens", "64", "--json")
    judged = run_capped(
        tmp_path, allowance, JUDGING, "unicuco.cli.app", cut, ("evaluate", variant, *words)
    )
    assert judged.codes == [0, 0], judged.errors
    found = json.loads(judged.output.splitlines()[-1])

    same = tmp_path / "same"
    prune(Run.open(run), Request(target=Target.SPARSITY, value=0.5), same)
    assert read_variant(variant).files == read_variant(same).files
    monkeypatch.setattr(predicting, "free_bytes", lambda: sys.maxsize)
    expected = evaluate_variant(same, reference=str(model), text=tiny_text_file, tokens=64)
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-5)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert found["sparsity"] == expected.sparsity == pytest.approx(0.5, abs=1e-6)
