"""Heads that ``ray start`` starts, one with an autoscaler that adds raylets; nothing stays."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from ray.util import get_node_ip_address

from tests.serve.conftest import free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "ray_configs" / "local-autoscaling.yaml"
IDLE_MINUTES = 0.1
HEAD_CPUS = 2
OBJECTS_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running one: where it is, what its processes have in their environment."""

    address: str
    folder: Path
    environment: dict[str, str]

    def processes(self) -> list[psutil.Process]:
        """Return its processes, workers included."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(self.folder) in " ".join(process.cmdline()):
                    members = [process, *process.children(recursive=True)]
                    found |= {member.pid: member for member in members}
        return list(found.values())

    def num_raylets(self) -> int:
        """Return how many nodes there are, as the operating system sees them."""
        count = 0
        for process in self.processes():
            with suppress(psutil.Error):  # one that has just ended has no command line any more
                count += [Path(word).name for word in process.cmdline()[:1]] == ["raylet"]
        return count


@contextmanager
def autoscaled_cluster() -> Iterator[Cluster]:
    """Start the cluster of ``ray_configs/local-autoscaling.yaml`` on ports of its own; end it."""

    def options(cluster: Cluster) -> dict[str, object]:
        document = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        document["idle_timeout_minutes"] = IDLE_MINUTES
        document["provider"]["gcs_address"] = cluster.address
        written = cluster.folder / "autoscaling.yaml"
        written.write_text(yaml.safe_dump(document), encoding="utf-8")
        return {"autoscaling-config": written, "include-dashboard": "false"}

    environment = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with ray_head(options, environment) as cluster:
        yield cluster


@contextmanager
def ray_head(
    options: Callable[[Cluster], dict[str, object]], environment: Mapping[str, str]
) -> Iterator[Cluster]:
    """Run ``ray start --head`` with more options and environment inside the block; end it."""
    # A socket's path may have 107 characters: not pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="ua-", dir="/tmp"))
    cluster = Cluster(
        address=f"{get_node_ip_address()}:{free_port()}",
        folder=folder,
        environment=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            **environment,
        },
    )
    log = folder / "start.txt"
    with log.open("w") as output:
        words = command(cluster, options(cluster))
        head = subprocess.Popen(words, env=cluster.environment, stdout=output, stderr=output)
    try:
        assert wait_until(lambda: is_up(head, log), 90), log.read_text()
        yield cluster
    finally:
        end(cluster, head)


def command(cluster: Cluster, more: Mapping[str, object]) -> list[str]:
    """Return what starts the head."""
    options = {
        "port": cluster.address.rpartition(":")[2],
        "num-cpus": HEAD_CPUS,
        "num-gpus": 0,
        "object-store-memory": OBJECTS_BYTES,
        "temp-dir": cluster.folder,
        # What has a fixed port otherwise:
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
        **more,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *words]


def is_up(head: subprocess.Popen[bytes], log: Path) -> bool:
    """Say whether the head has started."""
    if head.poll() is not None:
        pytest.fail(log.read_text())
    return "block forever" in log.read_text()


def end(cluster: Cluster, head: subprocess.Popen[bytes]) -> None:
    """Kill every process of the cluster, those that are started meanwhile too, and its files."""
    deadline = time.monotonic() + 30
    while members := cluster.processes():
        assert time.monotonic() < deadline, members
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        head.wait(timeout=30)
        psutil.wait_procs(members, timeout=10)
    shutil.rmtree(cluster.folder, ignore_errors=True)
