"""``serve deploy ray_configs/serve.yaml``, as its first lines say, on a Ray that runs already."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from serve.config import ServeConfig
from serve.proxy import ENVIRONMENT
from tests.ray_heads import ROOT, ray_head
from tests.serve.conftest import Server, free_port, wait_until
from tests.serve.test_faults import FINAL, ask, check_done_once, job

pytestmark = pytest.mark.slow


def test_the_example_is_deployed_and_answers(tiny_run: Path, tmp_path: Path) -> None:
    dashboard, port = free_port(), free_port()
    document = yaml.safe_load((ROOT / "ray_configs" / "serve.yaml").read_text(encoding="utf-8"))
    document["http_options"]["port"] = port
    data = tmp_path / "data"
    document["applications"][0]["args"] |= {
        "runs": [str(tiny_run)], "data": str(data), "engines": 0, "strategy_replicas": 1,
        "pruning_replicas": 1,
    }  # fmt: skip
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    options = {"dashboard-host": "127.0.0.1", "dashboard-port": dashboard}
    with ray_head(lambda cluster: {**options}, ENVIRONMENT) as cluster:
        words = [str(Path(sys.executable).with_name("serve")), "deploy", str(file)]
        deployed = subprocess.run(
            [*words, "--address", f"http://127.0.0.1:{dashboard}"],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert deployed.returncode == 0, deployed.stderr
        server = Server(
            url=f"http://127.0.0.1:{port}",
            config=ServeConfig.of_runs([tiny_run], data=data),
            name="unicuco",
        )
        assert wait_until(lambda: is_ready(server.url), 120)
        with server.client() as client:
            body = {"model": "run", "requests": [{"sparsity": 0.5}]}
            (plan,) = client.post("/v1/strategies", json=body).json()["data"]
            assert plan["sparsity"] == pytest.approx(0.5, abs=0.01)
            made = ask(client, 0.5, "deployed")
            assert wait_until(lambda: job(client, made)["status"] in FINAL, 60)
            check_done_once(server, client, made)


def is_ready(url: str) -> bool:
    """Say whether the service answers; what answers for it meanwhile has the envelope."""
    try:
        answer = httpx.get(f"{url}/ready", timeout=10)
    except httpx.TransportError:  # nobody listens yet
        return False
    assert answer.is_success or answer.json()["error"]["code"], answer.text
    return answer.is_success
