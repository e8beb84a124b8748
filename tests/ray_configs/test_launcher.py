"""Files of Ray's cluster launcher: its own schema, known start options, closed to strangers."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["aws", "gcp"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A file with Ray's defaults filled in."""
    path = ROOT / "ray_configs" / f"{request.param}.yaml"
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert document["provider"]["type"] == request.param
    filled: dict[str, Any] = prepare_config(document)
    return filled


def started(commands: list[str]) -> dict[str, Any]:
    """Return what the one `ray start` among shell commands asks for, read by Ray's own parser."""
    (command,) = [command for command in commands if command.startswith("ray start ")]
    words = shlex.split(command)[2:]
    parsed: dict[str, Any] = start.make_context("start", words).params
    return parsed


def test_ray_takes_it(config: dict[str, Any]) -> None:
    validate_config(config)
    head, *workers = config["available_node_types"]
    assert head == config["head_node_type"]
    assert workers
    for name in workers:
        kind = config["available_node_types"][name]
        assert 0 == kind["min_workers"] < kind["max_workers"] <= config["max_workers"]


def test_a_wrong_field_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="'max_worker' was unexpected"):
        validate_config(config | {"max_worker": 3})


def test_a_token_opens_it_and_its_dashboard_is_on_loopback(config: dict[str, Any]) -> None:
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    head = started(config["head_start_ray_commands"])
    assert (head["head"], head["dashboard_host"]) == (True, "127.0.0.1")
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml", "where the launcher puts it"
    worker = started(config["worker_start_ray_commands"])
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"


def test_nodes_have_this_ray_and_this_project(config: dict[str, Any]) -> None:
    assert config["docker"]["image"] == f"rayproject/ray:{version('ray')}-py311-cpu"
    assert config["file_mounts"]["/home/ray/unicuco"] == "."
    (install,) = config["setup_commands"]
    for path in re.findall(r"/home/ray/unicuco(\S*)", install):
        assert (ROOT / path.lstrip("/")).exists()
