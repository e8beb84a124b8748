from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve.config import KEYS_VARIABLE
from serve.deploy import ServeArguments, build

CONFIGS = Path(__file__).resolve().parents[2] / "ray_configs"


def test_the_example_is_what_serve_deploys_and_its_arguments_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = yaml.safe_load((CONFIGS / "serve.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(document)
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    monkeypatch.setenv(KEYS_VARIABLE, "one-long-key,another-one")
    config = ServeArguments.model_validate(application.args).to_domain()
    assert [name for name, _ in config.runs] == ["run"]
    assert len(config.key_digests) == 2
    assert build(ServeArguments.model_validate(application.args)) is not None


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        ServeArguments.model_validate({"runs": ["a"], "data": "d", "replica": 3})
