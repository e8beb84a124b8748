"""Jobs from a YAML file on a tiny model: on Ray as without it, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import unicuco
from cluster.learn import LearnConfig, main
from unicuco.store import EvaluationStore


def write(path: Path, options: object) -> Path:
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return path


def job(tmp_path: Path, model: Path, text: Path, **options: object) -> Path:
    document = {
        "model": str(model),
        "out": str(tmp_path / "run"),
        "calibration": str(text),
        "tokens": 256,
        "context": 64,
        "evaluations": 8,
        **options,
    }
    return write(tmp_path / "job.yaml", document)


def evaluations(run: Path) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(run / "evaluations.db")
    rows = connection.execute(
        "SELECT round, position, strategy_key, kl, gradient, status, text_digest FROM evaluations"
        " ORDER BY round, position"
    ).fetchall()
    connection.close()
    return rows


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_a_job_on_two_replicas_learns_what_one_process_does(
    tmp_path: Path, tiny_llama: Path, tiny_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = job(tmp_path, tiny_llama, tiny_text_file, address="none", out=str(tmp_path / "alone"))
    assert main(["--config", str(alone)]) == 0
    on_ray = job(tmp_path, tiny_llama, tiny_text_file, replicas=2, address="local")
    assert main(["--config", str(on_ray)]) == 0
    rows = evaluations(tmp_path / "run")
    assert len(rows) == 8
    assert {row[5] for row in rows} == {"ok"}
    assert rows == evaluations(tmp_path / "alone")
    printed = capsys.readouterr()
    assert printed.err == ""
    first, *_, last = printed.out.splitlines()
    assert json.loads(first.removeprefix("options "))["evaluations"] == 8
    assert last == f"learned {tmp_path / 'run'}"
    longer = job(tmp_path, tiny_llama, tiny_text_file, evaluations=10, resume=True, replicas=2)
    assert main(["--config", str(longer)]) == 0
    assert evaluations(tmp_path / "run")[:8] == rows
    assert len(evaluations(tmp_path / "run")) == 10


def test_a_run_that_another_driver_holds_is_one_line(
    tmp_path: Path, tiny_llama: Path, tiny_text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with EvaluationStore.open(tmp_path / "run" / "evaluations.db", create=True) as store:
        store.acquire_lease("learn")
        path = job(tmp_path, tiny_llama, tiny_text_file, resume=True, address="none")
        assert main(["--config", str(path)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert f"is in use by learn (process {os.getpid()} on " in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_a_job_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, tiny_llama: Path, tiny_text_file: Path
) -> None:
    path = job(tmp_path, tiny_llama, tiny_text_file, evaluations=2000, address="none")
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.learn", "--config", str(path)],
        env=os.environ | {"PYTHONPATH": str(Path(unicuco.__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "fisher.safetensors").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "stopped: `resume: true` goes on from here\n")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"model": "m"}, 2, "out: Field required"),
        (
            {"model": "m", "out": "o", "evaluation": 3},
            2,
            "evaluation: is no option; options: model",
        ),
        (
            {"model": "m", "out": "o", "replicas": "2"},
            2,
            "replicas: Input should be a valid integer",
        ),
        ({"model": "m", "out": "o", "pruner": "axe"}, 2, "pruner must be one of"),
        ({"model": "m", "out": "o", "replicas": 0}, 2, "replicas must be at least 1"),
        (
            {"model": "m", "out": "o", "threads": 0, "address": "local"},
            2,
            "threads must be at least",
        ),
        (
            {"model": "m", "out": "o", "replicas": 2, "address": "none"},
            2,
            "replicas, shards, threads and gpus need Ray",
        ),
        (["model"], 2, "must name options, one a line"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: object,
    code: int,
    message: str,
) -> None:
    assert main(["--config", str(write(tmp_path / "job.yaml", options))]) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 1, "can't be read: No such file"),
        (b"a: [", 2, "is no YAML"),
        (b"\xff\xfe", 2, "is no"),
    ],
)
def test_a_file_that_is_no_yaml_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    code: int,
    message: str,
) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    assert main(["--config", str(path)]) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "/proc/run"}, "/proc/run can't be made: No such file or directory"),
        ({"calibration": "/proc/none"}, "/proc/none"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_text_file: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    message: str,
) -> None:
    path = job(tmp_path, tiny_llama, tiny_text_file, **options)
    assert main(["--config", str(path)]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_an_error_that_nobody_expects_is_one_line_too_and_a_traceback_with_debug(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def odd(config: LearnConfig) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(LearnConfig, "backend", odd)
    path = job(tmp_path, tiny_llama, tiny_text_file)
    line = "error: unexpected KeyError: 'odd' (--debug shows where)\n"
    assert main(["--config", str(path)]) == 1
    assert capsys.readouterr().err == line
    assert main(["--config", str(path), "--debug"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.endswith(line)


def test_a_job_runs_on_the_cluster_it_was_submitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LearnConfig(model="m", out="o")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert config.effective_address == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert config.effective_address == "auto"
    assert LearnConfig(model="m", out="o", address="none").effective_address == "none"


def test_the_yaml_has_the_option_names_of_the_command_line() -> None:
    from dataclasses import fields

    from unicuco.pipeline import LearnOptions

    names = {field.name for field in fields(LearnOptions)} - {"publish_to"}  # `out` says both
    assert set(LearnConfig.model_fields) == names | {"threads", "gpus", "address"}
