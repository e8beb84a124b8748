"""A model that lies on the driver's disk alone, learned in shards on a node that can't open it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.jobs import joined, learning, rows
from tests.ray_heads import ROOT, ray_head
from unicuco.models import resolve_model, weight_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What a node's processes run first: to them the folder's files are not there.
HIDING = """
import os
import sys

def hide(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith({folder!r}):
        with open({log!r}, "a") as file:
            print(os.getpid(), arguments[0], file=file)
        raise FileNotFoundError(2, "No such file or directory", arguments[0])

sys.addaudithook(hide)
"""


def test_shards_that_do_not_see_the_model_are_served_by_the_drivers_node(
    tmp_path: Path, undisturbed: list[tuple[object, ...]]
) -> None:
    folder, log = resolve_model("reference"), tmp_path / "refused.txt"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        HIDING.format(folder=str(folder), log=str(log))
    )
    options = {"num-cpus": 0, "include-dashboard": "false"}
    with ray_head(lambda cluster: dict(options), {}) as cluster:
        node = cluster.start_node(cpus=2, PYTHONPATH=f"{tmp_path / 'site'}:{ROOT}")
        with learning(tmp_path, joined(cluster), shards=2) as job:
            job.wait_for_rows(1)
            shards = {process.pid for process in node.actors("ShardActor")}
            servers = {process.pid for process in node.actors("RangeServer")}
            code, output, errors = job.end()
    assert (code, errors) == (0, ""), output
    assert rows(tmp_path / "run") == undisturbed
    refused = [line.split() for line in log.read_text().splitlines()]
    assert {int(pid) for pid, _ in refused} == shards
    assert len(shards) == 2
    assert {path for _, path in refused} == set(map(str, weight_files(folder)))
    assert not servers, "it runs where the driver does"
