"""Replicas on a Ray that is said to have two GPUs, which nobody uses.

It is another process': that of the tests' session has none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytestmark = pytest.mark.alone

PROGRAM = """
import json, sys, time
import ray
from cluster import driver
from cluster.driver import RayBackend
from cluster.local_ray import connect
from tests.cluster.synthetic import ARRAYS, Bowl, BowlConfig, DigestSearch, make_ask

driver.torch_knows_gpus = lambda: True
connect(address="local", num_cpus=3, num_gpus=2, include_dashboard=False, _temp_dir=sys.argv[1])
found = {}
for name, expected, options in [
    ("shared", 1.5, {"replicas": 3}),
    ("none", 0.0, {"replicas": 1, "gpus": 0}),
    ("some", 0.25, {"gpus": 0.25}),
]:
    with RayBackend("local", **options, build_evaluator=Bowl, build_search=DigestSearch) as backend:
        _, pool = backend.start(BowlConfig(), ARRAYS, 4)
        pool.submit(make_ask(b"12345678"))
        _, evaluation = pool.next_outcome()
        for _ in range(600):  # Ray tells what is left a moment later
            left = ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0.0)
            if left == expected:
                break
            time.sleep(0.1)
        found[name] = [evaluation.text_digest.split()[0], left]
print(json.dumps(found))
"""


def test_replicas_share_gpus_and_are_told_of_them() -> None:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    # A socket's path may have 107 characters: not pytest's folder.
    with TemporaryDirectory(prefix="ug-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, folder],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Three on two GPUs have half of one each.
    assert found == {"shared": ["cuda", 1.5], "none": ["cpu", 0.0], "some": ["cuda", 0.25]}
