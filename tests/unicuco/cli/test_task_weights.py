from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unicuco.cli.conftest import Runner


@pytest.fixture(scope="module")
def task_run(
    tiny_llama: Path, tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from unicuco.cli import main

    folder = tmp_path_factory.mktemp("task-run")
    prose = folder / "prose.txt"
    prose.write_text("The sea was calm, and old men slept at dawn.\n" * 400, encoding="utf-8")
    words = [
        "learn", tiny_llama, "--out", folder / "run", "--task", f"code={tiny_text_file}",
        "--task", f"prose={prose}", "--tokens", "256", "--context", "32",
        "--evaluations", "6", "--address", "none", "--json",
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_weighted_request_is_answered_and_echoed_by_option_and_by_line(
    unicuco: Runner, task_run: Path, tmp_path: Path
) -> None:
    option = unicuco(
        "plan", task_run, "--sparsity", 0.6, "--task-weights", "code=0.7,prose=0.3", "--json"
    )
    asked = {"sparsity": 0.6, "task_weights": {"code": 0.7, "prose": 0.3}}
    assert option.code == 0, option.stderr
    assert json.loads(option.stdout)["request"] == asked
    (tmp_path / "lines.jsonl").write_text(json.dumps(asked) + "\n")
    line = unicuco("plan", task_run, "--requests", tmp_path / "lines.jsonl", "--json")
    assert json.loads(line.stdout)["answers"] == [json.loads(option.stdout)]
    shown = unicuco("plan", task_run, "--sparsity", 0.6, "--task-weights", "code=0.7,prose=0.3")
    assert shown.code == 0


@pytest.mark.slow
def test_a_weighted_variant_is_cut_and_says_what_was_asked(
    unicuco: Runner, task_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "variant"
    result = unicuco(
        "prune", task_run, "--sparsity", 0.5, "--task-weights", "prose=1", "--out", out
    )
    assert result.code == 0, result.stderr
    document = json.loads((out / "strategy.json").read_text())
    assert document["request"] == {"sparsity": 0.5, "task_weights": {"prose": 1.0}}


@pytest.mark.slow
def test_names_that_the_run_does_not_know_end_with_3(unicuco: Runner, task_run: Path) -> None:
    result = unicuco("plan", task_run, "--sparsity", 0.6, "--task-weights", "code=0.5,poems=0.5")
    assert result.code == 3
    assert "no task 'poems'; its tasks are code, prose" in " ".join(result.stderr.split())


def test_a_run_of_one_text_refuses_weights_with_3(unicuco: Runner, tiny_run: Path) -> None:
    result = unicuco("plan", tiny_run, "--sparsity", 0.6, "--task-weights", "code=1")
    assert result.code == 3
    assert "no tasks to weigh" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("code=0.7,prose=0.2", "must sum to 1, got 0.9"),
        ("code=1.5,prose=-0.5", "prose must be at least 0"),
        ("code", "task-weights must be like"),
        ("code=much", "task-weights must be like"),
    ],
)
def test_weights_that_mean_nothing_end_with_2(
    unicuco: Runner, tiny_run: Path, weights: str, words: str
) -> None:
    result = unicuco("plan", tiny_run, "--sparsity", 0.6, "--task-weights", weights)
    assert result.code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_learning_with_one_task_or_without_a_name_ends_with_2(
    unicuco: Runner, tiny_llama: Path, tmp_path: Path
) -> None:
    for words in (["--task", "code=a.txt"], ["--task", "a.txt", "--task", "b.txt"]):
        result = unicuco("learn", tiny_llama, "--out", tmp_path / "run", *words)
        assert result.code == 2
        assert not (tmp_path / "run").exists()
