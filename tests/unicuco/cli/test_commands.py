"""Every command for real, on a tiny model and a run of it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from unicuco.cli.learn_options import LearnChoices
from unicuco.engines import ENGINES
from unicuco.testing.echo import EchoEngine

PLAN_FIELDS = {
    "request", "strategy", "sparsity", "kept_params", "total_params", "bytes", "served_as",
    "predicted",
}  # fmt: skip


def one_document(result: Any) -> dict[str, Any]:
    assert result.code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def one_line(result: Any) -> str:
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def check_plan(document: dict[str, Any]) -> None:
    assert set(document) >= PLAN_FIELDS
    kl = document["predicted"]["kl"]
    assert 0 <= kl["lo95"] <= kl["mean"] <= kl["hi95"]
    assert document["served_as"] == "mask"


def test_plan_answers_one_request(unicuco, tiny_run: Path) -> None:
    document = one_document(unicuco("plan", tiny_run, "--sparsity", 0.6, "--json"))
    check_plan(document)
    assert document["request"] == {"sparsity": 0.6}
    assert document["sparsity"] == pytest.approx(0.6, abs=1e-3)
    people = unicuco("plan", tiny_run, "--sparsity", 0.6)
    assert "0.6000" in people.stdout


def test_plan_answers_many_in_order_and_errors_at_their_place(
    unicuco, tiny_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "requests.jsonl"
    asked = [{"sparsity": 0.5}, {"max_bytes": 5}, {"preference": 0.5}, {"max_kl": 0.3}]
    path.write_text("\n".join(map(json.dumps, asked)))
    result = unicuco("plan", tiny_run, "--requests", path, "--json")
    answers = one_document(result)["answers"]
    assert [answer.get("request") for answer in answers] == [asked[0], None, asked[2], asked[3]]
    assert answers[1]["error"]["code"] == 3
    assert answers[1]["error"]["nearest"] > 5
    for answer in (answers[0], answers[2], answers[3]):
        check_plan(answer)
    assert "request 2" in unicuco("plan", tiny_run, "--requests", path).stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--sparsity", "0.97"),
        ("--max-params", "1"),
        ("--max-bytes", "5"),
        ("--sparsity", "0.5", "--served-as", "shrink"),
    ],
)
def test_a_request_that_cannot_be_met_ends_with_3(unicuco, tiny_run: Path, words, tmp_path) -> None:
    for command in (("plan", tiny_run), ("prune", tiny_run, "--out", tmp_path / "v")):
        result = unicuco(*command, *words, "--json")
        assert result.code == 3
        one_line(result)
    assert list(tmp_path.iterdir()) == []


def test_prune_writes_the_variant_that_plan_describes(
    unicuco, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "variant"
    plan = one_document(unicuco("plan", tiny_run, "--sparsity", 0.5, "--json"))
    document = one_document(unicuco("prune", tiny_run, "--sparsity", 0.5, "--out", out, "--json"))
    assert document == {**plan, "out": str(out)}
    written = json.loads((out / "strategy.json").read_text())
    assert written["strategy"] == plan["strategy"]
    again = unicuco("prune", tiny_run, "--sparsity", 0.5, "--out", out)
    assert again.code == 1
    one_line(again)


def test_evaluate_prints_exactly_the_agreed_fields(
    unicuco, tiny_run: Path, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "variant"
    assert unicuco("prune", tiny_run, "--sparsity", 0.5, "--out", out).code == 0
    words = ("evaluate", out, "--text", tiny_text_file, "--tokens", 640)
    document = one_document(unicuco(*words, "--reference", tiny_llama, "--json"))
    assert set(document) == {"perplexity", "kl", "sparsity", "tokens", "context"}
    assert document["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert document["kl"] > 0
    assert document["tokens"] == 640
    assert one_document(unicuco(*words, "--json"))["kl"] is None
    assert "not measured" in unicuco(*words).stdout


def test_words_that_look_like_markup_are_only_words(
    unicuco, tiny_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"sparsity": 0.5, "task_weights": {"[/x]": 1}}\n')
    result = unicuco("plan", tiny_run, "--requests", path)
    assert result.code == 0
    assert "[/x]" in result.stdout
    out = tmp_path / "variant[" / "b]"
    result = unicuco("prune", tiny_run, "--sparsity", 0.5, "--out", out)
    assert result.code == 0, result.stderr
    assert "variant[/b]" in result.stdout
    result = unicuco("front", tiny_run, "--plot", tmp_path / "none" / "[/b].png")
    assert "none/[/b].png can't be written" in one_line(result)


@pytest.mark.parametrize("tokens", [1, None])
def test_a_text_with_nothing_to_predict_is_one_line(
    unicuco, tiny_llama: Path, tmp_path: Path, tokens: int | None
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" if tokens is None else "many words of text")
    limit = () if tokens is None else ("--tokens", tokens)
    result = unicuco("evaluate", tiny_llama, "--text", text, *limit)
    assert result.code == 1
    assert "needs 2 tokens or more" in one_line(result)


def test_front_tells_predicted_and_measured_apart_and_draws(
    unicuco, tiny_run: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "front.png"
    document = one_document(unicuco("front", tiny_run, "--plot", plot, "--json"))
    assert {"predicted", "measured_on_validation"} <= set(document)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "measured on validation text" in unicuco("front", tiny_run).stdout


def test_generate_prints_the_engine_s_answer(
    unicuco, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "vllm", EchoEngine)  # type: ignore[misc]  # vLLM has tests of its own
    words = ("generate", tiny_llama, "--prompt", "def f", "--max-tokens", 3)
    document = one_document(unicuco(*words, "--json"))
    assert set(document) == {"text", "token_ids", "finish_reason"}
    assert len(document["token_ids"]) == 3
    assert "def f" in unicuco(*words).stdout


@pytest.mark.slow
def test_learn_makes_a_run_and_resume_extends_it(
    unicuco, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ("learn", tiny_llama, "--out", out, "--calibration", tiny_text_file, "--tokens", 256)
    words = (*words, "--address", "none", "--json")
    document = one_document(unicuco(*words, "--evaluations", 4))
    assert document["run"] == str(out)
    assert document["manifest"]["evaluations"] == 4
    for name in ("run.json", "evaluations.db", "front.json", "front.png", "strategies.png"):
        assert (out / name).is_file()
    refused = unicuco(*words, "--evaluations", 5)
    assert refused.code == 1
    assert "--resume" in one_line(refused)
    longer = one_document(unicuco(*words, "--evaluations", 6, "--resume"))
    assert longer["manifest"]["evaluations"] == 6
    with sqlite3.connect(out / "evaluations.db") as database:
        (count,) = database.execute("SELECT count(*) FROM evaluations").fetchone()
    assert count == 6


@pytest.mark.slow
def test_compress_uses_the_run_that_is_there_and_reports(
    unicuco, tiny_run: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "variant"
    shutil.copytree(tiny_run, run)
    words = ("compress", tiny_llama, "--run", run, "--out", out, "--sparsity", 0.5, "--json")
    document = one_document(unicuco(*words))
    check_plan(document)
    assert document["measured"]["sparsity"] == pytest.approx(document["sparsity"], abs=1e-9)
    assert (out / "strategy.json").is_file()


@pytest.mark.slow
def test_compress_learns_as_it_is_told(
    unicuco, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "variant"
    words = (
        "compress", tiny_llama, "--sparsity", 0.5, "--pruner", "magnitude", "--granularity",
        "block", "--calibration", tiny_text_file, "--tokens", 256, "--context", 32,
        "--evaluations", 4, "--address", "none", "--json",
    )  # fmt: skip
    document = one_document(unicuco(*words, "--out", out))
    assert document["run"] == str(tmp_path / "variant.run")
    options = json.loads((tmp_path / "variant.run" / "run.json").read_text())["options"]
    assert (options["pruner"], options["granularity"]) == ("magnitude", "block")
    assert all(name.startswith("sparsity/block.") for name in document["strategy"]["settings"])
    again = unicuco(*words, "--out", tmp_path / "b", "--run", document["run"])
    assert one_document(again)["strategy"] == document["strategy"]
    other = unicuco(
        "compress", tiny_llama, "--run", document["run"], "--sparsity", 0.5, "--pruner",
        "sparsegpt", "--out", tmp_path / "c",
    )  # fmt: skip
    assert other.code == 2
    assert "learned with another --pruner" in other.stderr.splitlines()[-1]
    assert not (tmp_path / "c").exists()


def test_compress_refuses_before_it_learns(
    unicuco, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = unicuco("compress", tiny_llama, "--sparsity", 0.95, "--out", ".", "--address", "none")
    assert result.code == 3
    assert "up to 0.9" in one_line(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["learn", "compress"])
def test_what_learns_offers_the_same_options_with_one_default(unicuco, command: str) -> None:
    shown = unicuco(command, "--help").stdout
    names = {field.name for field in fields(LearnChoices)} - {"tasks"} | {"task"}
    assert all(f"--{name.replace('_', '-')} " in shown for name in names)
    assert "--learning" not in shown


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "nothing", "--sparsity", "0.5"),
        ("front", "nothing"),
        ("prune", "nothing", "--sparsity", "0.5", "--out", "v"),
        ("evaluate", "nothing"),
        ("learn", "nothing", "--out", "r", "--address", "none"),
        ("compress", "nothing", "--sparsity", "0.5", "--out", "v", "--address", "none"),
        ("generate", "nothing", "--prompt", "x"),
    ],
)
def test_a_path_that_is_not_there_gets_one_line_and_leaves_nothing(
    unicuco, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = unicuco(*words, "--json")
    assert result.code == 1
    assert "nothing" in one_line(result)
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_are_wrong_use_and_unlearned_dimensions_are_not(
    unicuco, tiny_llama: Path, tmp_path: Path
) -> None:
    words = ("learn", tiny_llama, "--out", tmp_path / "r", "--address", "none")
    for option in ("--pruner", "--granularity", "--dimensions", "--preset"):
        result = unicuco(*words, option, "nonsense")
        assert result.code == 2
        assert "nonsense" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own_prints_one_document(tiny_run: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "unicuco.cli",
        "plan",
        str(tiny_run),
        "--max-kl",
        "0.2",
        "--json",
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    check_plan(json.loads(done.stdout))
    assert done.stderr == ""
