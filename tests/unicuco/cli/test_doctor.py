from __future__ import annotations

import json

import pytest

from unicuco.cli import checks
from unicuco.cli.app import app
from unicuco.cli.checks import Check, command_verdicts, run_checks


def test_json_names_every_check_and_every_command(unicuco) -> None:
    result = unicuco("doctor", "--json")
    assert result.code == 0
    document = json.loads(result.stdout)
    assert {"python", "torch", "ray", "vllm", "disk", "memory"} <= {
        check["name"] for check in document["checks"]
    }
    offered = {command.callback.__name__ for command in app.registered_commands} - {"doctor"}
    assert set(document["commands"]) == offered


def test_people_get_two_tables(unicuco) -> None:
    result = unicuco("doctor")
    assert result.code == 0
    assert "unicuco learn" in result.stdout
    assert "torch" in result.stdout


def test_a_failed_check_stops_the_commands_that_need_it_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "installed", lambda package: None)
    found = {check.name: check for check in run_checks()}
    assert not found["vllm"].ok
    assert "cpu" in found["vllm"].advice
    verdicts = command_verdicts(list(found.values()))
    assert "vllm" in verdicts["generate"]
    assert "ray" in verdicts["learn"]
    assert "vllm" not in verdicts["plan"]


def test_a_torchvision_that_breaks_transformers_is_recognised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import subprocess

    def broken(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "operator torchvision::nms does not exist")

    monkeypatch.setattr(checks, "installed", lambda package: "0.28.0")
    monkeypatch.setattr(checks.subprocess, "run", broken)
    check = checks.check_torchvision()
    assert not check.ok
    assert "uninstall" in check.advice


def test_a_full_disk_or_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    import types

    import psutil

    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: types.SimpleNamespace(total=9, used=8, free=1)
    )
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: types.SimpleNamespace(total=2**31, available=2**20)
    )
    assert not checks.check_disk().ok
    assert not checks.check_memory().ok


def test_all_is_well_when_no_check_failed() -> None:
    assert not any(command_verdicts([Check(name="ray", ok=True, found="1")]).values())
