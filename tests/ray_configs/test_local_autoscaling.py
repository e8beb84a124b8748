from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler._private.loader import load_function_or_class
from ray.autoscaler._private.util import validate_config

CONFIGS = Path(__file__).resolve().parents[2] / "ray_configs"


def test_ray_takes_it_and_its_provider_knows_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    document = yaml.safe_load((CONFIGS / "local-autoscaling.yaml").read_text(encoding="utf-8"))
    validate_config(document)
    options = document["provider"]
    provider = load_function_or_class(options["module"])
    assert provider is FakeMultiNodeProvider
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    nodes = provider(options, document["cluster_name"]).non_terminated_nodes({})
    assert nodes == [FAKE_HEAD_NODE_ID] == [options["head_node_id"]]
    assert document["head_node_type"] == FAKE_HEAD_NODE_TYPE
    (worker,) = set(document["available_node_types"]) - {FAKE_HEAD_NODE_TYPE}
    assert document["available_node_types"][worker]["max_workers"] == document["max_workers"]
