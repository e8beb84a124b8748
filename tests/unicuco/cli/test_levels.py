"""``--pruner sparsegpt`` from the command line to a variant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_on_levels_is_learned_planned_pruned_evaluated_and_drawn(
    unicuco, tiny_llama: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "variant"
    learned = unicuco(
        "learn", tiny_llama, "--out", run, "--pruner", "sparsegpt", "--calibration", tiny_text_file,
        "--tokens", 256, "--context", 32, "--evaluations", 4, "--address", "none", "--json",
    )  # fmt: skip
    assert learned.code == 0, learned.stderr
    assert learned.stderr.splitlines()[0].startswith("levels: 0/2, ")
    assert learned.stderr.splitlines()[0].endswith(" MB on disk")
    planned = json.loads(unicuco("plan", run, "--sparsity", 0.6, "--json").stdout)
    cut = json.loads(unicuco("prune", run, "--sparsity", 0.6, "--out", out, "--json").stdout)
    assert cut["strategy"] == planned["strategy"]
    measured = unicuco(
        "evaluate", out, "--reference", tiny_llama, "--text", tiny_text_file, "--json"
    )
    assert json.loads(measured.stdout)["sparsity"] == pytest.approx(planned["sparsity"])
    assert unicuco("front", run, "--plot", tmp_path / "front.png").code == 0
    compared = unicuco(
        "compare", tiny_llama, "--run", run, "--allocators", "uniform,stratnet", "--sparsity", 0.6,
        "--calibration", tiny_text_file, "--text", tiny_text_file, "--tokens", 256,
        "--test-tokens", 512, "--address", "none", "--json",
    )  # fmt: skip
    assert len(json.loads(compared.stdout)["results"]) == 2, compared.stderr
    refused = unicuco("learn", tiny_llama, "--out", tmp_path / "no", "--pruner", "obc")
    assert refused.code == 2
    assert "pruner must be one of magnitude, wanda, sparsegpt" in refused.stderr
