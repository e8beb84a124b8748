"""Heads and nodes that ``ray start`` starts, one with an autoscaler; nothing of them stays."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml
from ray.util import get_node_ip_address

from tests.serve.conftest import free_port, wait_until

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "ray_configs" / "local-autoscaling.yaml"
IDLE_MINUTES = 0.1
HEAD_CPUS = 2
NODE_OPTIONS: dict[str, object] = {
    "num-gpus": 0,
    "object-store-memory": 100 * 2**20,
    # What has a fixed port otherwise:
    "dashboard-agent-listen-port": 0,
    "min-worker-port": 0,
    "max-worker-port": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running one: where it is, what its processes have in their environment."""

    address: str
    folder: Path
    environment: dict[str, str]
    nodes: list[Node] = field(default_factory=list)

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

    def start_node(self, cpus: int = 1, **environment: str) -> Node:
        """Start a further node; two at a time would take the same ports."""
        log = self.folder / f"node-{secrets.token_hex(4)}.txt"
        options = {"address": self.address, "num-cpus": cpus, **NODE_OPTIONS}
        with log.open("w") as output:
            process = subprocess.Popen(
                ray_start(options),
                env=self.environment | environment,
                stderr=output,
                stdout=output,
            )
        self.nodes.append(Node(process))
        assert wait_until(lambda: is_up(process, log), 90), log.read_text()
        return self.nodes[-1]


@dataclass(frozen=True, slots=True)
class Node:
    """A node that was added to a head, by the process that holds it."""

    process: subprocess.Popen[bytes]

    def processes(self) -> list[psutil.Process]:
        """Return its processes, workers included."""
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def actors(self, name: str) -> list[psutil.Process]:
        """Return the processes of actors of a class, or of those in a method: ``CLASS.METHOD``."""
        return actors(self.processes(), name)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes at once."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def autoscaled_cluster(
    *, head_cpus: int = HEAD_CPUS, worker_cpus: int = 2, max_workers: int = 2
) -> Iterator[Cluster]:
    """Start the cluster of ``ray_configs/local-autoscaling.yaml`` on ports of its own; end it."""

    def options(cluster: Cluster) -> dict[str, object]:
        document = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        document["idle_timeout_minutes"] = IDLE_MINUTES
        document["provider"]["gcs_address"] = cluster.address
        document["max_workers"] = max_workers
        worker = document["available_node_types"]["worker"]
        worker["max_workers"] = max_workers
        worker["resources"]["CPU"] = worker_cpus
        written = cluster.folder / "autoscaling.yaml"
        written.write_text(yaml.safe_dump(document), encoding="utf-8")
        return {
            "autoscaling-config": written,
            "include-dashboard": "false",
            "num-cpus": head_cpus,
        }

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
            # A server for a client is forked while gRPC's threads run: one in twenty dies of it.
            "GRPC_ENABLE_FORK_SUPPORT": "0",
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
        "temp-dir": cluster.folder,
        "ray-client-server-port": free_port(),  # fixed otherwise
        **NODE_OPTIONS,
        **more,
    }
    return [*ray_start(options), "--head"]


def ray_start(options: Mapping[str, object]) -> list[str]:
    """Return what starts a head or a node that ends with its process."""
    words = [f"--{name}={value}" for name, value in options.items()]
    return [str(Path(sys.executable).with_name("ray")), "start", "--block", *words]


def is_up(head: subprocess.Popen[bytes], log: Path) -> bool:
    """Say whether a head or a node has started."""
    if head.poll() is not None:
        pytest.fail(log.read_text())
    return "block forever" in log.read_text()


def end(cluster: Cluster, head: subprocess.Popen[bytes]) -> None:
    """Kill every process of the cluster and remove its files."""
    kill(cluster)
    for process in (head, *(node.process for node in cluster.nodes)):
        process.kill()
        process.wait(timeout=30)
    shutil.rmtree(cluster.folder, ignore_errors=True)


def actors(processes: Iterable[psutil.Process], name: str) -> list[psutil.Process]:
    """Return those that Ray calls so, e.g. ``EvaluatorActor.evaluate``, with what follows."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(f"ray::{name}"):
                found.append(process)
    return found


def kill(cluster: Cluster) -> None:
    """Kill every process of the cluster, those that are started meanwhile too."""
    deadline = time.monotonic() + 30
    while members := cluster.processes():
        assert time.monotonic() < deadline, members
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=10)
