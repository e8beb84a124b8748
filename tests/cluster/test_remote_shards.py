"""Shards in processes of their own fetch their own tensors from a URL and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cluster.driver import RayBackend
from tests.range_server import range_server
from unicuco.headers import read_header
from unicuco.models import resolve_model, weight_files
from unicuco.testing import tiny_model_folder
from unicuco.testing.cases import make_evaluation_case
from unicuco.types import Ask, Evaluation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]


def test_each_shard_fetches_its_own_tensors_and_their_files_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNICUCO_CACHE", str(tmp_path / "cache"))
    local = tiny_model_folder(
        tmp_path / "served" / "model", num_blocks=3, tied=True, max_shard_size=12_000
    )
    with range_server(tmp_path / "served") as server:
        case = make_evaluation_case(resolve_model(f"{server.url}/model"))
        strategy = case.space.uniform(0.5)
        expected = case.evaluator().evaluate(strategy, derivatives=True)
        server.given.clear()
        with RayBackend("local", 1, 1, 3) as backend:
            pool = backend.start_pool(case.config, case.arrays)
            pool.submit(Ask(round=0, position=0, strategy=strategy, derivatives=True))
            _, found = pool.next_outcome()
    assert isinstance(found, Evaluation)
    assert (found.kl, found.gradient) == (expected.kl, expected.gradient)
    shards = sorted(server.given.values(), key=lambda given: sorted(given.items()))
    own = [needed(local, number) for number in range(3)]
    assert shards == sorted(own, key=lambda given: sorted(given.items()))
    assert len({frozenset(given) for given in own}) == 3, "other files for every shard"


def needed(folder: Path, number: int) -> Counter[str]:
    """Return the bytes of each file that the shard of one block needs, its header included."""
    outer = {0: ("embed_tokens",), 1: (), 2: ("embed_tokens", "model.norm")}[number]
    bytes_of: Counter[str] = Counter()
    for header in map(read_header, weight_files(folder)):
        own = [
            entry.end - entry.begin
            for entry in header.entries
            if any(word in entry.name for word in (f".layers.{number}.", *outer))
        ]
        if own:
            bytes_of[header.path.name] = header.data_offset + sum(own)
    return bytes_of
