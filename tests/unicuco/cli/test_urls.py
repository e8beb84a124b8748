"""Commands on models and runs at URLs."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import fsspec
import pytest

from tests.unicuco.cli.conftest import Runner


@pytest.mark.slow
def test_a_model_and_its_run_may_lie_at_urls(
    unicuco: Runner,
    tmp_path: Path,
    tiny_llama: Path,
    tiny_text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNICUCO_CACHE", str(tmp_path / "cache"))
    store = f"memory://store-{secrets.token_hex(4)}"
    model, run = f"{store}/model", f"{store}/run"
    fsspec.filesystem("memory").put(f"{tiny_llama}/", f"{model}/", recursive=True)
    words = ["--calibration", tiny_text_file, "--tokens", 256, "--evaluations", 4]
    learned = unicuco("learn", model, "--out", run, *words, "--address", "none", "--json")
    assert (learned.code, learned.stderr) == (0, "")
    document = json.loads(learned.stdout)
    assert document["run"] == run
    assert document["manifest"]["base_model"]["path"] == model
    planned = unicuco("plan", run, "--sparsity", 0.5, "--json")
    assert json.loads(planned.stdout)["sparsity"] == pytest.approx(0.5, abs=0.01)
    cut = unicuco("prune", run, "--sparsity", 0.5, "--out", tmp_path / "variant", "--json")
    assert cut.code == 0
    text = ["--text", tiny_text_file, "--tokens", 256]
    measured = unicuco("evaluate", tmp_path / "variant", "--reference", model, *text, "--json")
    assert json.loads(measured.stdout)["kl"] > 0
    dense = unicuco("evaluate", model, "--reference", tiny_llama, *text, "--json")
    assert json.loads(dense.stdout)["kl"] == pytest.approx(0, abs=1e-6)
    assert unicuco("front", run, "--plot", tmp_path / "front.png").code == 0
    assert unicuco("report", run, "--out", tmp_path / "page.html").code == 0
    for refused, line in (
        (unicuco("report", run), "name it with --out"),
        (unicuco("prune", run, "--sparsity", 0.5, "--out", f"{store}/x"), "not a URL"),
        (unicuco("compress", model, "--sparsity", 0.5, "--out", "x", "--run", run), "not a URL"),
    ):
        assert refused.code == 2
        assert line in " ".join(refused.stderr.split())
    again = unicuco("learn", model, "--out", run, *words, "--address", "none")
    assert again.code == 1
    assert again.stderr.startswith(f"error: {run} already holds a run; add --resume")
    missing = unicuco("evaluate", f"{store}/nothing", *text)
    assert missing.stderr.startswith(f"error: no model at {store}/nothing: there is no config.json")
