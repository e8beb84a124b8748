from __future__ import annotations

import inspect
from pathlib import Path

from cluster.learn import LearnConfig
from unicuco.cli.learn import learn
from unicuco.pipeline import LearnOptions
from unicuco.pipeline.options import DEFAULT_EVALUATIONS

CONFIGS = Path(__file__).resolve().parents[2] / "ray_configs"


def test_the_example_describes_a_run_with_the_defaults_of_the_command_line() -> None:
    config = LearnConfig.read(CONFIGS / "learn.yaml")
    options = config.to_domain()
    assert options == LearnOptions(
        model="reference",
        out=Path("out/run"),
        evaluations=DEFAULT_EVALUATIONS["default"],
        replicas=2,
    )


def test_every_file_here_has_a_test() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == {
        "aws.yaml",
        "gcp.yaml",
        "learn.yaml",
        "local-autoscaling.yaml",
        "raycluster.yaml",
        "rayjob.yaml",
        "rayservice.yaml",
        "redis.yaml",
        "serve.yaml",
    }


def test_a_job_has_the_options_of_the_command_line_with_the_same_defaults() -> None:
    parameters = inspect.signature(learn).parameters
    command = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in ("ctx", "as_json", "debug")
    }
    fields = {name: field.default for name, field in LearnConfig.model_fields.items()}
    # Threads of a replica are a matter of the cluster; a job's address depends on where it runs.
    assert set(fields) - {"threads"} == set(command)
    for name in set(command) - {"model", "out", "address"}:
        assert fields[name] == command[name], name
